"""FVD while a run trains: clips of the averaged weights against the training data, shared by all processes."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import ClipDataset, MovingDigits
from ..errors import UserError
from ..evaluation.gathering import Gathering, gather_cached
from ..evaluation.metrics import expected_floor, frechet_distance
from ..evaluation.networks.detectors import load_detector
from ..evaluation.sides import DigitsSide, FileSide, Side
from ..evaluation.statistics import Moments
from ..pipelines import SkipLattePipeline
from ..sampling.streaming import sample_generators
from .config import DataConfig, FvdConfig
from .data import build_data

__all__ = ["FvdMeter"]


class FvdMeter:
    """Measures what `skipdit evaluate` would, on fewer clips.

    Args:
        config: How many clips, sampled how.
        data: The training data; latents written ahead still need the clips they were made of.
        output: Of the run; statistics of the real clips are kept there.
        accelerator: Each process samples its share.

    Raises:
        UserError: The network's weights or the clips are missing, or the data are pictures.
    """

    def __init__(self, config: FvdConfig, data: DataConfig, output: Path, accelerator: Accelerator):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.detector = load_detector("i3d", config.i3d, accelerator.device)
        self.real = self._open(build_data(replace(data, latents=None), output)[0])
        if (frames := self.real.settings["num_frames"]) < self.detector.minimum_frames:
            least = self.detector.minimum_frames
            raise UserError(f"fvd.every: FVD needs clips of {least} frames, this run has {frames}; set fvd.every=0.")
        if len(self.real) < 2:
            raise UserError("fvd.every: FVD needs 2 real clips or more, this run has 1; set fvd.every=0.")

    def _open(self, data: object) -> Side:
        count = self.config.real_clips
        if isinstance(data, MovingDigits):
            return DigitsSide(data, count)
        if isinstance(data, ClipDataset):
            return FileSide(data, count)
        raise UserError("fvd.every: FVD is of clips, and this run trains on pictures; set fvd.every=0.")

    def measure(self, pipeline: SkipLattePipeline) -> dict[str, float]:
        """ "fvd" of the pipeline, and "fvd_floor", what as many clips of a perfect generator get at least."""
        with self.accelerator.main_process_first():  # which keeps the statistics for all
            how = Gathering([self.detector], batch_size=self.config.batch_size)
            real = gather_cached(self.real, how, "real clips", self.output / "statistics", lambda line: None)["i3d"]
        first, step = self.accelerator.process_index, self.accelerator.num_processes
        moments = self._sample(pipeline, list(range(first, self.config.clips, step)))
        whole = Moments.empty(self.detector.dim)
        for part in gather_object([moments]):
            whole.merge(part)
        floor = expected_floor(real.moments, whole.count)
        return {"fvd": frechet_distance(real.moments, whole), "fvd_floor": floor}

    @torch.no_grad()
    def _sample(self, pipeline: SkipLattePipeline, indices: list[int]) -> Moments:
        moments = Moments.empty(self.detector.dim)
        classes = pipeline.transformer.null_class
        pipeline.set_progress_bar_config(disable=True)
        for first in range(0, len(indices), self.config.batch_size):
            some = indices[first : first + self.config.batch_size]
            inputs = {"num_samples": len(some)} if classes is None else {"class_labels": [i % classes for i in some]}
            frames = pipeline(
                **inputs,
                num_inference_steps=self.config.steps,
                guidance_scale=self.config.guidance_scale,
                generator=sample_generators(self.config.seed, some),
                output_type="pt",
            ).frames
            if not torch.isfinite(frames).all():
                raise UserError("the samples are not finite numbers")
            clips = (frames * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
            moments.update(self.detector.features(clips))
        return moments
