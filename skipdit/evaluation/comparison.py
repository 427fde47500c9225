"""One sampling call under several cache settings: what each costs, and how close it stays to the first."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
            if cache is not None:
                transformer.enable_cache(cache)
            try:
                began = time.perf_counter()
                samples[name] = sample()
                seconds[name].append(time.perf_counter() - began)
                on_done(name, seconds[name][-1])
                shares[name] = 1.0 if cache is None else transformer.cache_stats.full_share
            finally:
                if cache is not None:
                    transformer.disable_cache()
    reference = next(iter(caches))
    base = statistics.median(seconds[reference])
    runs = []
    for name, cache in caches.items():
        median = statistics.median(seconds[name])
        pair = samples[name], samples[reference]
        quality = (
            (None, None) if name == reference else (psnr(*pair).mean().item(), ssim(*pair).mean().item())
        )
        word = "off" if cache is None else str(cache)
        runs.append(Run(name, word, median, base / median, shares[name], *quality, samples[name]))
    return runs


def to_markdown(runs: Sequence[Run]) -> str:
    """A table of the runs."""
    rows = [
        "| run | cache | seconds | speed-up | full steps | PSNR (dB) | SSIM |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        psnr_text = "" if run.psnr is None else f"{run.psnr:.1f}"
        ssim_text = "" if run.ssim is None else f"{run.ssim:.3f}"
        rows.append(
            f"| {run.name} | {run.cache} | {run.seconds:.2f} | {run.speedup:.2f}x | {run.full_share:.0%} "
            f"| {psnr_text} | {ssim_text} |"
        )
    return "\n".join(rows) + "\n"


def to_json(runs: Sequence[Run]) -> str:
    """The same figures, unrounded, for programs."""
    rows = [{key: value for key, value in vars(run).items() if key != "samples"} for run in runs]
    return json.dumps(rows, indent=2) + "\n"
