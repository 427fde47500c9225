"""One sampling call under several cache settings: what each costs, and how close it stays to the first."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..cache import SkipCacheConfig
from ..models import SkipBackbone
from .fidelity import psnr, ssim

__all__ = ["Run", "compare_caches", "to_json", "to_markdown"]


@dataclass(frozen=True)
class Run:
    """One cache setting.

    Attributes:
        name: As given, such as "no cache" or "N=2".
        cache: The setting, "off" or such as "N2-900-50".
        seconds: Median over the repeats of the whole call, decoding included.
        speedup: Seconds of the first run / seconds of this one.
        repeats: How many calls the median is over.
        full_share: Full steps / all steps, 0..1.
        psnr: Decibels against the first run, mean over clips; None for the first run itself.
        ssim: Likewise, up to 1.
        samples: Clips [B, T, 3, H, W] or pictures [B, 3, H, W] in [0, 1].
    """

    name: str
    cache: str
    seconds: float
    speedup: float
    repeats: int
    full_share: float
    psnr: float | None
    ssim: float | None
    samples: torch.Tensor = field(repr=False)


def compare_caches(
    transformer: SkipBackbone,
    caches: Mapping[str, SkipCacheConfig | None],
    sample: Callable[[], torch.Tensor],
    repeats: int = 1,
    budget: float = math.inf,
    on_done: Callable[[str, float], None] = lambda name, seconds: None,
) -> list[Run]:
    """Run `sample` under each setting, in turns, so that a slow minute of the machine hits all of them alike.

    Args:
        transformer: The pipeline's network; its cache is off before and after.
        caches: Name -> setting. The first is the reference, usually None (no cache).
        sample: Gives samples in [0, 1] on the CPU, the same at each call while the cache stays the same.
        repeats: Timed calls of each, at most.
        budget: Seconds; a further repeat begins only if it should end within them.
        on_done: Called with a setting's name and seconds after each call.

    Returns:
        One `Run` per setting, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    samples: dict[str, torch.Tensor] = {}
    shares: dict[str, float] = {}
    for done in range(repeats):
        so_far = sum(map(sum, seconds.values()))
        if done and so_far * (done + 1) / done > budget:
            break
        for name, cache in caches.items():
            with _enabled(transformer, cache):
                began = time.perf_counter()
                samples[name] = sample()
                seconds[name].append(time.perf_counter() - began)
                shares[name] = 1.0 if cache is None else transformer.cache_stats.full_share
            on_done(name, seconds[name][-1])
    reference = next(iter(caches))
    base = statistics.median(seconds[reference])
    runs = []
    for name, cache in caches.items():
        median = statistics.median(seconds[name])
        pair = samples[name], samples[reference]
        runs.append(
            Run(
                name=name,
                cache="off" if cache is None else str(cache),
                seconds=median,
                speedup=base / median,
                repeats=len(seconds[name]),
                full_share=shares[name],
                psnr=None if name == reference else psnr(*pair).mean().item(),
                ssim=None if name == reference else ssim(*pair).mean().item(),
                samples=samples[name],
            )
        )
    return runs


@contextmanager
def _enabled(transformer: SkipBackbone, cache: SkipCacheConfig | None) -> Iterator[None]:
    if cache is None:
        yield
        return
    transformer.enable_cache(cache)
    try:
        yield
    finally:
        transformer.disable_cache()


def to_markdown(runs: Sequence[Run]) -> str:
    """A table of the runs."""
    rows = ["| run | cache | seconds | speed-up | full steps | PSNR (dB) | SSIM |"]
    rows.append("|---|---|--:|--:|--:|--:|--:|")
    for run in runs:
        cost = f"{run.seconds:.2f} | {run.speedup:.2f}x | {run.full_share:.0%}"
        quality = " | " if run.psnr is None else f"{run.psnr:.1f} | {run.ssim:.4f}"
        rows.append(f"| {run.name} | {run.cache} | {cost} | {quality} |")
    return "\n".join(rows) + "\n"


def to_json(runs: Sequence[Run]) -> str:
    """The same figures, unrounded, for programs; an infinite PSNR (equal clips) becomes null."""
    rows = []
    for run in runs:
        row = {key: value for key, value in vars(run).items() if key != "samples"}
        rows.append({**row, "psnr": None if run.psnr == math.inf else run.psnr})
    return json.dumps(rows, indent=2, allow_nan=False) + "\n"
