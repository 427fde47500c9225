"""What a run shows and hands over: grids of samples while it trains, and the finished pipeline."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..cache import SkipCacheConfig
from ..errors import UserError
from ..files import written_whole
from ..media import Pixels, make_grid, to_uint8, write_gif, write_png
from ..models import SkipBackbone, SkipLatteTransformer3DModel
from ..pipelines import SkipDiTPipeline, SkipLattePipeline, SkipPipeline
from ..schedulers import make_scheduler
from .config import PreviewConfig, TrainConfig

FPS = 8

__all__ = ["preview_classes", "export_pipeline", "make_pipeline", "model_with", "write_preview"]


def preview_classes(config: PreviewConfig, model: SkipBackbone, class_names: list[str] | None) -> list[int] | None:
    """The classes to show as indices; None for an unconditional model.

    Raises:
        UserError: A class, sampler or cache setting that the model cannot use.
    """
    try:
        make_scheduler(config.sampler)
        for cache in config.cache:
            with _cached(model, cache):
                pass
    except ValueError as error:
        raise UserError(f"preview: {error}") from error
    if model.null_class is None:
        if config.classes:
            raise UserError("preview.classes: this model is unconditional; set preview.num_samples instead.")
        return None
    return [_class_index(name, model.null_class, class_names) for name in config.classes] or list(
        range(min(model.null_class, 16))
    )


def _class_index(name: int | str, num_classes: int, class_names: list[str] | None) -> int:
    if isinstance(name, str) and name in (class_names or ()):
        return class_names.index(name)
    if isinstance(name, int) and 0 <= name < num_classes:
        return name
    names = f" or one of {', '.join(class_names[:12])}" if class_names else ""
    raise UserError(f"preview.classes: no class {name!r}; choose 0..{num_classes - 1}{names}.")


def model_with(model: SkipBackbone, weights: dict[str, torch.Tensor]) -> SkipBackbone:
    """A fresh model of the same config that carries other weights; nothing is drawn from the random state."""
    with torch.random.fork_rng(devices=[]):
        twin = type(model).from_config(model.config)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    buffers = {name for name, _ in twin.named_buffers()}
    if unexpected or set(missing) - buffers:
        raise RuntimeError(f"Averaged weights do not fit the model: {unexpected or missing}.")
    return twin.eval().requires_grad_(False)


def make_pipeline(
    model: SkipBackbone,
    vae: AutoencoderKL,
    class_names: list[str] | None,
    config: TrainConfig,
    sampler: str = "ddim",
) -> SkipPipeline:
    """The pipeline class that goes with the backbone, set up with a sampler for what it was trained to predict."""
    scheduler = make_scheduler(sampler, **config.objective.sampler_settings)
    parts = {"transformer": model, "vae": vae, "scheduler": scheduler, "class_names": class_names}
    if isinstance(model, SkipLatteTransformer3DModel):
        return SkipLattePipeline(**parts, frame_interval=config.data.arguments.get("frame_interval"))
    return SkipDiTPipeline(**parts)


@torch.no_grad()
def write_preview(pipeline, config: PreviewConfig, classes: list[int] | None, path: Path) -> None:
    """Sample a labelled grid for each setting of the cache, one cell a sample: GIFs of clips, PNGs of pictures.

    Each sample has a generator of its own, so the training's random state is untouched.
    """
    count = config.num_samples if classes is None else len(classes)
    inputs = {"num_samples": count} if classes is None else {"class_labels": classes}
    pipeline.set_progress_bar_config(disable=True)
    for cache in config.cache:
        generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + index) for index in range(count)]
        with torch.random.fork_rng(devices=[]), _cached(pipeline.transformer, cache):
            result = pipeline(
                **inputs,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance_scale,
                generator=generators,
                output_type="np",
            )
        names = pipeline.class_names
        captions = None if classes is None else [names[index] if names else str(index) for index in classes]
        grid = _grid(result, captions)
        where = path if cache == "off" else path.with_name(f"{path.name}-{cache}")
        if len(grid) > 1:
            write_gif(where.with_suffix(".gif"), grid, FPS)
        else:
            write_png(where.with_suffix(".png"), grid[0])


@contextmanager
def _cached(model: SkipBackbone, cache: str) -> Iterator[None]:
    if cache != "off":
        model.enable_cache(_published(model, cache))
    try:
        yield
    finally:
        if cache != "off":
            model.disable_cache()


def _published(model: SkipBackbone, word: str) -> SkipCacheConfig:
    """ "N2-900-50", or "N2" with the published window of the task; as many units stay as published."""
    task = "class-to-video" if isinstance(model, SkipLatteTransformer3DModel) else "class-to-image"
    preset = SkipCacheConfig.preset(task)
    return SkipCacheConfig.parse(word, preset.shallow, preset.start, preset.stop)


def _grid(result, captions: list[str] | None) -> Pixels:
    """Frames of the grid [T, H, W, 3]; one of pictures."""
    clips = to_uint8(result.frames if "frames" in result else result.images[:, None])
    return make_grid(clips, captions, columns=min(len(clips), 5))


def export_pipeline(
    model: SkipBackbone,
    vae: AutoencoderKL,
    class_names: list[str] | None,
    config: TrainConfig,
    folder: Path,
) -> None:
    """Save a pipeline with the DDIM sampler in the dtype asked for; `model` is converted in place, `vae` copied."""
    kind = getattr(torch, config.export_dtype)
    # nn.Module.to, because that of diffusers warns of modules kept in float32, of which there are none.
    parts = [torch.nn.Module.to(module, kind) for module in (model, copy.deepcopy(vae))]
    pipeline = make_pipeline(*parts, class_names, config)
    with written_whole(folder) as temporary:
        pipeline.save_pretrained(temporary)
