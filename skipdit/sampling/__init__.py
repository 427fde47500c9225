"""Samples from a model: `skipdit sample`, sets of exactly so many, streams for other programs."""

from .config import SampleConfig

__all__ = ["SampleConfig"]
