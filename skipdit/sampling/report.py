"""What a sampling run made and what it cost, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..pipelines import SkipPipeline
from .planning import SamplePlan

__all__ = ["SampleReport", "report"]


@dataclass(frozen=True)
class SampleReport:
    """What a run made and what it cost.

    Attributes:
        folder: Where the files are.
        files: Their names.
        samples: How many clips or pictures are there.
        kind: "clip" or "picture".
        seconds: Sampling, decoding and writing, which overlap; without loading.
        full, reused: Sampler steps of one trajectory.
        cache: The cache setting as a word, or "off".
        made: How many of the samples this run made; the others were there.
    """

    folder: Path
    files: tuple[str, ...]
    samples: int
    kind: str
    seconds: float
    full: int
    reused: int
    cache: str
    made: int

    def summary(self) -> str:
        """Two lines for the terminal."""
        more = len(self.files) - 4
        overviews_first = sorted(self.files, key=lambda name: name[0].isdigit())
        shown = ", ".join(overviews_first[:4]) + (f" and {more} more" if more > 0 else "")
        many = f"{self.samples} {self.kind}{'s' if self.samples > 1 else ''}"
        there = "" if self.made == self.samples else f" ({self.samples - self.made} were there before)"
        where = f"{many} in {self.folder.resolve()}{there}: {shown}"
        if not self.made:
            return f"{where}\nNothing was left to do."
        alone = f"{self.full} full step{'s' if self.full > 1 else ''}"
        steps = f"{self.full} full + {self.reused} reused steps" if self.reused else alone
        cost = f"{self.seconds:.1f} s, {self.seconds / self.made:.2f} s per {self.kind}"
        return f"{where}\n{cost}; {steps} each (cache={self.cache})"


def report(
    plan: SamplePlan, pipeline: SkipPipeline | None, folder: Path, files: Sequence[str], seconds: float, made: int
) -> SampleReport:
    """What a run made; `pipeline` is the one that did, None if there was nothing to make."""
    stats = None if pipeline is None else pipeline.transformer.cache_stats
    full, reused = (plan.config.steps, 0) if stats is None else (stats.full, stats.reused)
    cache = "off" if plan.cache is None else str(plan.cache)
    return SampleReport(folder, tuple(files), plan.count, plan.kind, seconds, full, reused, cache, made)
