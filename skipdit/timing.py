"""The stopwatch."""

import time
from collections.abc import Callable

import torch

__all__ = ["timed"]


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by events on the device's stream where it is a CUDA device."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
