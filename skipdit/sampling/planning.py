"""What a sampling run will make, seen to be possible before any weights are read."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cache import SkipCacheConfig
from ..errors import UserError
from ..pipelines import SkipPipeline
from ..schedulers import make_scheduler
from ..weights import DTYPES
from .config import SampleConfig
from .labels import plan_labels
from .loading import ModelSource, check_dtype, choose_device, find_model, resolve_classes

__all__ = ["SamplePlan", "parse_cache", "plan_samples"]


@dataclass(frozen=True)
class SamplePlan:
    """Samples that are settled but not yet made.

    Attributes:
        config: The settings.
        source: The model.
        labels: Class of each sample; None for an unconditional model.
        count: Number of samples.
        cache: Skip-Cache, or None.
        device: Where they will be made.
    """

    config: SampleConfig
    source: ModelSource
    labels: tuple[int, ...] | None
    count: int
    cache: SkipCacheConfig | None
    device: torch.device

    @property
    def label_of(self) -> Callable[[int], int | None]:
        """The class of a sample by its index, as `sample_indices` asks for it."""
        return (lambda index: None) if self.labels is None else self.labels.__getitem__

    @property
    def kind(self) -> str:
        """What one sample is called: "clip" or "picture"."""
        return "clip" if self.source.is_video else "picture"

    def caption(self, index: int) -> str:
        """The name of a sample's class, its number if it has none; "" for an unconditional model."""
        if self.labels is None:
            return ""
        names = self.source.class_names
        return names[self.labels[index]] if names else str(self.labels[index])

    def load(self) -> SkipPipeline:
        """Read the weights; the cache is enabled, and with `fast` what suits the device is turned on and told."""
        pipeline = self.source.load(self.device, self.config.dtype, self.config.sampler)
        if self.cache is not None:
            pipeline.transformer.enable_cache(self.cache)
        if self.config.fast:
            chosen = pipeline.compile()
            if os.environ.get("RANK", "0") == "0":
                print(chosen, flush=True)
        return pipeline


def plan_samples(config: SampleConfig) -> SamplePlan:
    """Check that all fits together.

    Raises:
        UserError: Something is missing or does not fit; no weights have been read.
    """
    source = find_model(config)
    if config.total is None:
        labels = resolve_classes(config.classes, source.class_names, source.num_classes)
        labels = labels and tuple(label for label in labels for _ in range(config.num_samples))
        count = config.num_samples if labels is None else len(labels)
    else:
        labels = plan_labels(config.labels, config.classes, source, config.total, config.seed)
        count = config.total
    cache = parse_cache(config, source)
    _check(config, source)
    device = choose_device(config.device)
    check_dtype(config.dtype, device)
    return SamplePlan(config, source, labels, count, cache, device)


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
        cache = SkipCacheConfig.parse(config.cache, shallow, published.start, published.stop)
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
        fitting = "png or npz" if config.total is None else "png, npz or shards"
        raise UserError(f"format={sorted(wrong)[0]} is for clips: this model makes pictures; choose {fitting}.")
    if source.is_video and config.total is not None and "png" in config.format:
        raise UserError("format=png is for pictures: with total choose frames, npz or shards for clips.")
