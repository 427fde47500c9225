"""What the tests of acceleration share: quiet pipelines, and their samples from fixed noise."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from replaying import replaying
from tiny_pipelines import tiny_pipeline

from skipdit import SkipCacheConfig
from skipdit.acceleration.graphs import GraphedForward
from skipdit.acceleration.modulation import Modulations
from skipdit.acceleration.turning_on import Acceleration, graphed

OFF = dict.fromkeys(("blocks", "modulation", "decoder"), False)
CACHE = SkipCacheConfig(interval=3, start=1000, stop=0)
TOLERANCE = 1e-5
"""Relative error of the samples in float32, which docs/speed.md states."""


def quiet(kind: str = "video", **settings):
    pipe = tiny_pipeline(kind, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samples(pipe, labels=(0, 2), steps: int = 7, output_type: str = "latent", **inputs) -> torch.Tensor:
    who = {"num_samples": 2} if pipe.transformer.null_class is None else {"class_labels": list(labels)}
    inputs = {"guidance_scale": 4.0, "generator": torch.manual_seed(0), **who, **inputs}
    return pipe(num_inference_steps=steps, output_type=output_type, return_dict=False, **inputs)[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def cached(pipe, on: bool):
    if on:
        pipe.transformer.enable_cache(CACHE)
    return pipe


@contextmanager
def recorded(pipe, modulation: bool = False, record=replaying) -> Iterator[GraphedForward]:
    """A pipeline as `compile(graphs=True)` makes it on a CUDA device."""
    model = pipe.transformer
    modulations = Modulations(model) if modulation else None
    with graphed(model, modulations, record=record) as forward:
        pipe._acceleration = model._acceleration = Acceleration(model, [], ExitStack(), modulations, forward)
        yield forward
        pipe.uncompile()
    if modulations:
        modulations.undo()
