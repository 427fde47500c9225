"""What `skipdit sample` can be told; read without importing torch, so that its help is quick."""

import math
from dataclasses import dataclass

from ..config import nearest, setting

__all__ = ["SampleConfig"]

FORMATS = ("mp4", "gif", "png", "frames", "npz", "shards")
LOSSLESS = ("png", "frames", "npz", "shards")


@dataclass
class SampleConfig:
    """Settings of `skipdit sample`; `null` leaves a choice to the pipeline or to what was published."""

    model: str = setting("", "folder of a pipeline, or with checkpoint a preset such as Latte-XL/2-skip")
    checkpoint: str | None = setting(None, "published weights of the preset (.pt, .safetensors)")
    vae: str | None = setting(None, "AutoencoderKL or AutoencoderTiny of the preset: folder or hub id")
    num_classes: int | None = setting(None, "classes of the preset; null: unconditional")
    class_names: str | None = setting(None, "text file with a class name a line, for a preset")
    image_size: int | None = setting(None, "pixels of a side; null: the pipeline's own, 256 for a preset")
    num_frames: int | None = setting(None, "frames of a clip; null: the pipeline's own, 16 for a preset")
    classes: list[str] = setting(["all"], "indices or names, [3, Archery], or all")
    num_samples: int = setting(1, "samples of each class; in total for an unconditional model")
    total: int | None = setting(None, "instead: so many in all, for evaluation; resumable, by any number of processes")
    labels: str = setting("uniform", "of total: uniform or random over classes, or as in a data folder or text file")
    seed: int = setting(0, "noise of sample i depends on (seed, i) alone")
    steps: int = setting(50, "sampler steps")
    sampler: str | None = setting(None, "ddim, ddpm, dpm++ or unipc; null: the pipeline's, ddim for a preset")
    guidance_scale: float | None = setting(None, "1: no guidance; null: the pipeline's (7 video, 4 images)")
    guidance_channels: int | None = setting(None, "guided latent channels; null: all for video, 3 for images")
    cache: str = setting(
        "off", "Skip-Cache: N2-900-50 (interval, start, stop), N2 (published window), either with -F1 or -F2, or off"
    )
    cache_shallow: int | None = setting(None, "units kept at each end; null: as published (1 pair, 4 blocks)")
    dtype: str = setting("fp32", "fp32, bf16 or fp16")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    fast: bool = setting(False, "pipe.compile(): what is faster on the device; takes a minute to start")
    batch_size: int = setting(8, "samples at once; those of total on the CPU one by one")
    fps: float = setting(8.0, "frames per second of mp4 and gif")
    format: list[str] = setting([], "of mp4, gif, png, frames, npz; with total: shards, npz, frames, png (pictures)")
    samples_per_shard: int = setting(64, "of total: samples in a file")
    output: str = setting("outputs/samples", "folder; files of the same name are replaced, those of total continued")

    def __post_init__(self) -> None:
        least = {"num_samples": 1, "steps": 1, "batch_size": 1, "seed": 0, "samples_per_shard": 1}
        optional = {
            "total": 1,
            "image_size": 8,
            "num_frames": 1,
            "num_classes": 1,
            "guidance_channels": 1,
            "cache_shallow": 1,
            "guidance_scale": 0,
        }
        for name, bound in {**least, **optional}.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value} must be {bound} or more.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be finite; 1 is without guidance.")
        if self.steps > 1000:
            raise ValueError(f"steps={self.steps} must be 1000 or less, the steps of training.")
        if not 0 < self.fps <= 100:
            raise ValueError(f"fps={self.fps:g} must be above 0 and at most 100.")
        for word in self.format:
            if word not in FORMATS:
                raise ValueError(f"No format {word!r}: {nearest(word, FORMATS)}")
        self._check_total()
        if not self.model:
            raise ValueError("No model to sample from: pass --config configs/digits/sample.yaml or model=<its folder>.")

    def _check_total(self) -> None:
        """Settings that contradict `total` or its absence."""
        if self.total is None:
            if self.labels != "uniform":
                raise ValueError(f"labels={self.labels} goes with total=<number>; leave it out otherwise.")
            if "shards" in self.format:
                raise ValueError("format=shards goes with total=<number>; without it, choose npz.")
            return
        if self.num_samples > 1:
            raise ValueError(f"total={self.total} and num_samples={self.num_samples} are two counts: leave one out.")
        if lossy := [word for word in self.format if word not in LOSSLESS]:
            raise ValueError(f"format={lossy[0]} is for looking at: with total choose frames, npz or shards.")
