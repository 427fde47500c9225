"""The work of `skipdit sample`: check everything, load, sample batch by batch, write."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .cache import SkipCacheConfig
from .config import save_config
from .errors import UserError
from .files import check_writable
from .gallery import open_gallery
from .loading import ModelSource, choose_device, find_model, resolve_classes
from .media import Pixels, to_uint8
from .pipelines import SkipLattePipeline, SkipPipeline
from .sampling_config import SampleConfig
from .schedulers import make_scheduler
from .weights import DTYPES

__all__ = ["SampleReport", "generate", "parse_cache", "sample_batches", "sample_generators"]


@dataclass(frozen=True)
class SampleReport:
    """What a run made and what it cost.

    Attributes:
        folder: Where the files are.
        files: Their names.
        samples: How many clips or pictures.
        kind: "clip" or "picture".
        seconds: Sampling and decoding, without loading.
        full, reused: Sampler steps of one trajectory.
        cache: The cache setting as a word, or "off".
    """

    folder: Path
    files: tuple[str, ...]
    samples: int
    kind: str
    seconds: float
    full: int
    reused: int
    cache: str

    def summary(self) -> str:
        """Two lines for the terminal."""
        more = len(self.files) - 4
        overviews_first = sorted(self.files, key=lambda name: name[0].isdigit())
        shown = ", ".join(overviews_first[:4]) + (f" and {more} more" if more > 0 else "")
        many = f"{self.samples} {self.kind}{'s' if self.samples > 1 else ''}"
        alone = f"{self.full} full step{'s' if self.full > 1 else ''}"
        steps = f"{self.full} full + {self.reused} reused steps" if self.reused else alone
        cost = f"{self.seconds:.1f} s, {self.seconds / self.samples:.2f} s per {self.kind}"
        return f"{many} in {self.folder.resolve()}: {shown}\n{cost}; {steps} each (cache={self.cache})"


def generate(config: SampleConfig) -> SampleReport:
    """Sample as the settings say, and write the files.

    Raises:
        UserError: Something is missing or does not fit; no weights have been read then.
    """
    source = find_model(config)
    labels = resolve_classes(config.classes, source.class_names, source.num_classes)
    labels = None if labels is None else [label for label in labels for _ in range(config.num_samples)]
    cache = parse_cache(config, source)
    _check(config, source)
    device = choose_device(config.device)
    if device.type == "cpu" and config.dtype == "fp16":
        raise UserError("dtype=fp16 is many times slower than fp32 on the CPU: pass dtype=fp32 or bf16.")
    count = config.num_samples if labels is None else len(labels)
    folder = check_writable(config.output)

    pipeline = source.load(device, config.dtype, config.sampler)
    if cache is not None:
        pipeline.transformer.enable_cache(cache)
    captions = [_caption(index, labels, source.class_names) for index in range(count)]
    began, writing = time.perf_counter(), 0.0
    with open_gallery(folder, captions, config.format, config.fps, source.is_video) as gallery:
        try:
            for pixels in sample_batches(pipeline, labels, count, config):
                before = time.perf_counter()
                gallery.add(pixels)
                writing += time.perf_counter() - before
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{device} has too little memory: lower batch_size={config.batch_size} or pass dtype=bf16."
            ) from error
        seconds = time.perf_counter() - began - writing
    save_config(config, folder / "settings.yaml")
    stats = pipeline.transformer.cache_stats
    full, reused = (config.steps, 0) if stats is None else (stats.full, stats.reused)
    kind = "clip" if source.is_video else "picture"
    word = "off" if cache is None else str(cache)
    return SampleReport(folder, tuple(gallery.files), count, kind, seconds, full, reused, word)


def sample_batches(
    pipeline: SkipPipeline, labels: Sequence[int] | None, count: int, config: SampleConfig
) -> Iterator[Pixels]:
    """Sample in batches; sample i is the same whatever the batch size.

    Args:
        pipeline: On its device, cache enabled or not.
        labels: Class of each sample; None for an unconditional model.
        count: Number of samples.
        config: `seed`, `steps`, `batch_size`, the guidance and the size are read.

    Yields:
        uint8 [n, T, H, W, 3] for clips, [n, H, W, 3] for pictures.
    """
    pipeline.set_progress_bar_config(disable=True)
    wishes = {"guidance_scale": config.guidance_scale, "guidance_channels": config.guidance_channels}
    wishes |= {"height": config.image_size, "width": config.image_size}
    if isinstance(pipeline, SkipLattePipeline):
        wishes["num_frames"] = config.num_frames
    wishes = {name: value for name, value in wishes.items() if value is not None}
    bar_format = "{desc} {percentage:3.0f}% |{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]"
    with tqdm(total=count, desc="Sampling", bar_format=bar_format, disable=None) as bar:
        for first in range(0, count, config.batch_size):
            indices = range(first, min(first + config.batch_size, count))
            share = len(indices) / config.steps

            def advance(_pipeline, _step, _timestep, tensors, share=share):
                bar.update(share)
                return tensors

            output = pipeline(
                class_labels=None if labels is None else [labels[index] for index in indices],
                num_samples=len(indices) if labels is None else None,
                num_inference_steps=config.steps,
                generator=sample_generators(config.seed, indices),
                output_type="np",
                callback_on_step_end=advance,
                **wishes,
            )
            values = output.get("frames", output.get("images"))
            if not np.isfinite(values).all():
                raise UserError("The samples are not finite numbers: lower guidance_scale, or pass dtype=fp32 or bf16.")
            yield to_uint8(values)


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample, on the CPU: a sample depends on (seed, index) only, on any device.

    torch seeds its CPU generator with 32 bits, so the seed is hashed to a start from which indices count on:
    no two samples of a run share their noise.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + index) % 2**32) for index in indices]


def parse_cache(config: SampleConfig, source: ModelSource) -> SkipCacheConfig | None:
    """The cache that `cache` and `cache_shallow` ask for, seen to fit the model; None: off.

    Raises:
        UserError: It is misspelled, or the model cannot use it.
    """
    if config.cache.lower() == "off":
        return None
    published = SkipCacheConfig.preset("class-to-video" if source.is_video else "class-to-image")
    shallow = config.cache_shallow or published.shallow
    try:
        cache = SkipCacheConfig.parse(config.cache, shallow)
        if "-" not in config.cache:  # N3: the published window of the task
            cache = SkipCacheConfig(cache.interval, shallow, published.start, published.stop)
        source.model.check_paths(shallow, None)
    except ValueError as error:
        raise UserError(f"cache={config.cache}: {error} cache=off is without.") from error
    return cache


def _check(config: SampleConfig, source: ModelSource) -> None:
    """The settings that only the model can judge."""
    if config.dtype not in DTYPES:
        raise UserError(f"No dtype {config.dtype!r}: choose from {', '.join(DTYPES)}.")
    if config.sampler is not None:
        try:
            make_scheduler(config.sampler)
        except ValueError as error:
            raise UserError(str(error)) from error
    if source.num_classes is None and (config.guidance_scale or 1) > 1:
        raise UserError(f"guidance_scale={config.guidance_scale:g}: this model is unconditional; leave it out.")
    source.check_size(config.image_size)
    if config.num_frames is not None and not source.is_video:
        raise UserError(f"num_frames={config.num_frames}: this model makes pictures; leave it out.")
    channels = source.model.config.in_channels
    if (config.guidance_channels or 1) > channels:
        raise UserError(f"guidance_channels={config.guidance_channels}: the latents have {channels} channels.")
    if not source.is_video and (wrong := {"mp4", "gif", "frames"} & set(config.format)):
        raise UserError(f"format={sorted(wrong)[0]} is for clips: this model makes pictures; choose png or npz.")


def _caption(index: int, labels: Sequence[int] | None, names: Sequence[str]) -> str:
    if labels is None:
        return ""
    return names[labels[index]] if names else str(labels[index])
