"""The sections of measure_gpu.py."""
