"""The work of `skipdit sample`: files to look at, or a set of exactly so many samples."""

import os
import time

from ..config import save_config
from ..errors import UserError
from ..files import check_writable
from .collecting import collect
from .collection import MANIFEST
from .config import SampleConfig
from .gallery import open_gallery
from .planning import SamplePlan, plan_samples
from .report import SampleReport, report
from .streaming import iterate_samples, sample_indices

__all__ = ["carry_out", "generate", "iterate_samples", "sample_indices"]


def generate(config: SampleConfig) -> SampleReport:
    """Sample as the settings say, and write the files.

    Raises:
        UserError: Something is missing or does not fit; no weights have been read then.
    """
    return carry_out(plan_samples(config))


def carry_out(plan: SamplePlan) -> SampleReport:
    """`generate`, when all is checked."""
    return _exhibit(plan) if plan.config.total is None else collect(plan)


def _exhibit(plan: SamplePlan) -> SampleReport:
    """Write files to look at, in one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("Several processes share samples by their number: pass total=<number>, or start one process.")
    config = plan.config
    folder = check_writable(config.output)
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds a set of samples (total=...), which this would mix up: choose another output.")
    pipeline = plan.load()
    captions = [plan.caption(index) for index in range(plan.count)]
    began = time.perf_counter()
    with open_gallery(folder, captions, config.format, config.fps, plan.source.is_video) as gallery:
        for _, pixels in sample_indices(pipeline, range(plan.count), plan.label_of, config):
            gallery.add(pixels.numpy())
        seconds = time.perf_counter() - began
    save_config(config, folder / "settings.yaml")
    return report(plan, pipeline, folder, gallery.files, seconds, plan.count)
