"""Settings that sample the same clips, timed in turns, with what each costs and what becomes of the clips."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...errors import UserError
from ...pipelines import SkipPipeline
from ..fidelity import fidelity
from ..networks.detectors import Detector
from ..statistics import FeatureStatistics

__all__ = ["Contender", "Measured", "attached", "count_flops", "measure", "timed"]


@dataclass(frozen=True)
class Contender:
    """One way to sample.

    Attributes:
        name: For people, such as "Skip-Cache N2-900-50".
        family: What it is a setting of: "no cache", "Skip-Cache", "fewer steps" or a rival's name.
        network: "skip" or "vanilla".
        pipeline: Of that network.
        steps: Sampler steps.
        cache: Config for `enable_cache`, or None.
    """

    name: str
    family: str
    network: str
    pipeline: SkipPipeline
    steps: int
    cache: Any = None


@dataclass
class Measured:
    """What came of a contender.

    Attributes:
        seconds: Of all its calls, decoding left out.
        clips: How many.
        flops: Floating-point operations of the network for one clip, counted while it ran.
        pairs: Metric -> value of each clip against the same network without cache; empty for that one itself.
        statistics: Of the features of its clips, if there is a detector.
        shown: Its first clips, uint8 [n, T, H, W, 3].
    """

    seconds: float = 0.0
    clips: int = 0
    flops: float = 0.0
    pairs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    statistics: FeatureStatistics | None = None
    shown: torch.Tensor | None = None

    def mean(self, metric: str) -> float | None:
        """Over the clips; None if it was not measured."""
        return torch.cat(self.pairs[metric]).double().mean().item() if metric in self.pairs else None


@contextmanager
def attached(contender: Contender) -> Iterator[None]:
    """With the contender's cache on its network, and off again after."""
    network = contender.pipeline.transformer
    if contender.cache is None:
        yield
        return
    network.enable_cache(contender.cache)
    try:
        yield
    finally:
        network._reset_stateful_cache()
        network.disable_cache()


Sample = Callable[[SkipPipeline, int, Sequence[int]], torch.Tensor]
"""(pipeline, steps, indices) -> latents of those samples, from the noise that belongs to them."""


def count_flops(contender: Contender, sample: Sample) -> float:
    """Operations of the network for one clip, counted over a whole trajectory as it really runs.

    What `torch.utils.flop_counter` counts: matrix products and convolutions, attention included.
    """
    with attached(contender), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample(contender.pipeline, contender.steps, [0])
    return float(counter.get_total_flops())


def measure(
    contenders: Sequence[Contender],
    sample: Sample,
    decode: Callable[[SkipPipeline, torch.Tensor], torch.Tensor],
    batches: Sequence[Sequence[int]],
    detector: Detector | None,
    metrics: Sequence[str],
    on_done: Callable[[str, float], None] = lambda name, seconds: None,
) -> list[Measured]:
    """Every contender samples every batch, in turns, so that a slow minute of the machine hits all of them alike.

    Batches go through the contenders there and back; with an even number of batches a steady drift cancels.

    Args:
        contenders: The first of each network has no cache and is what the others of that network are compared with.
        sample: Timed.
        decode: Latents -> uint8 [n, T, H, W, 3]; not timed.
        batches: Indices of the clips.
        detector: For the distance to real clips; None: not asked for.
        metrics: Of pairs, as `fidelity` knows them.
        on_done: Told a contender's name and its seconds for a batch.
    """
    found = [Measured() for _ in contenders]
    if detector is not None:
        for measured in found:
            measured.statistics = FeatureStatistics.empty(detector.dim)
    for number, indices in enumerate(batches):
        values: dict[int, torch.Tensor] = {}
        order = range(len(contenders))
        # There and back, so that a load that rises or falls hits the first and the last alike.
        for place in order if number % 2 == 0 else reversed(order):
            contender, measured = contenders[place], found[place]
            with attached(contender):
                latents, seconds = timed(contender, sample, indices)
            on_done(contender.name, seconds)
            clips = decode(contender.pipeline, latents)
            values[place] = clips.permute(0, 1, 4, 2, 3).float() / 255
            measured.seconds += seconds
            measured.clips += len(clips)
            if detector is not None:
                measured.statistics.update(detector.features(clips))
            if measured.shown is None:
                measured.shown = clips
        _compare_pairs(contenders, found, values, list(metrics))
    return found


def _compare_pairs(
    contenders: Sequence[Contender], found: Sequence[Measured], values: dict[int, torch.Tensor], metrics: list[str]
) -> None:
    """Clips [n, T, 3, H, W] of each contender against those of the first of its network."""
    references: dict[str, torch.Tensor] = {}
    for place, contender in enumerate(contenders):
        if contender.network not in references:
            references[contender.network] = values[place]
            continue
        for name, value in fidelity(values[place], references[contender.network], metrics).items():
            found[place].pairs.setdefault(name, []).append(value)


def timed(contender: Contender, sample: Sample, indices: Sequence[int]) -> tuple[torch.Tensor, float]:
    """Latents and seconds of one call, with nothing left waiting on the device before or after.

    Raises:
        UserError: The latents are not finite numbers.
    """
    device = contender.pipeline.device
    _finish(device)
    began = time.perf_counter()
    latents = sample(contender.pipeline, contender.steps, indices)
    _finish(device)
    seconds = time.perf_counter() - began
    if not torch.isfinite(latents).all():
        raise UserError(f"The samples of {contender.name} are not finite: lower guidance_scale, or pass dtype=fp32.")
    return latents, seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
