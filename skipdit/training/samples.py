"""What a run shows and hands over: grids of samples while it trains, and the finished pipeline."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from ..cache import SkipCacheConfig
from ..errors import UserError
from ..files import written_whole
from ..models import SkipBackbone, SkipLatteTransformer3DModel
from ..pipelines import SkipDiTPipeline, SkipLattePipeline
from ..schedulers import make_scheduler
from .config import PreviewConfig

__all__ = ["check_preview", "export_pipeline", "make_pipeline", "model_with", "write_preview"]


def check_preview(config: PreviewConfig, model: SkipBackbone, class_names: list[str] | None) -> list[int] | None:
    """The classes to show as indices; None for an unconditional model.

    Raises:
        UserError: A class, sampler or cache setting that the model cannot use.
    """
    try:
        make_scheduler(config.sampler)
        if config.cache != "off":
            model.enable_cache(SkipCacheConfig.parse(config.cache))
            model.disable_cache()
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


def make_pipeline(model: SkipBackbone, vae: AutoencoderKL, class_names: list[str] | None, sampler: str = "ddim"):
    """The pipeline class that goes with the backbone, set up with a sampler by name."""
    kind = SkipLattePipeline if isinstance(model, SkipLatteTransformer3DModel) else SkipDiTPipeline
    return kind(transformer=model, vae=vae, scheduler=make_scheduler(sampler), class_names=class_names)


@torch.no_grad()
def write_preview(pipeline, config: PreviewConfig, classes: list[int] | None, path: Path) -> None:
    """Sample a grid, one cell a sample, and write it as a GIF (clips) or a PNG (pictures).

    Each sample has a generator of its own, so the training's random state is untouched.
    """
    count = config.num_samples if classes is None else len(classes)
    generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + index) for index in range(count)]
    inputs = {"num_samples": count} if classes is None else {"class_labels": classes}
    if config.cache != "off":
        pipeline.transformer.enable_cache(SkipCacheConfig.parse(config.cache))
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        result = pipeline(
            **inputs,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
            output_type="pil",
        )
    if config.cache != "off":
        pipeline.transformer.disable_cache()
    clips = result.frames if "frames" in result else [[image] for image in result.images]
    columns = min(count, 5)
    grids = [_grid([clip[frame] for clip in clips], columns) for frame in range(len(clips[0]))]
    with written_whole(path.with_suffix(".gif" if len(grids) > 1 else ".png")) as temporary:
        grids[0].save(
            temporary,
            **({"save_all": True, "append_images": grids[1:], "duration": 125, "loop": 0} if len(grids) > 1 else {}),
        )


def _grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    scale = max(1, 64 // images[0].width)
    width, height = images[0].width * scale + gap, images[0].height * scale + gap
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), (64, 64, 64))
    for index, image in enumerate(images):
        image = image.resize((width - gap, height - gap), Image.Resampling.NEAREST)
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def export_pipeline(
    model: SkipBackbone, vae: AutoencoderKL, class_names: list[str] | None, dtype: str, folder: Path
) -> None:
    """Save a pipeline with the DDIM sampler in this dtype; `model` is converted in place, `vae` copied."""
    kind = getattr(torch, dtype)
    # nn.Module.to, because that of diffusers warns of modules kept in float32, of which there are none.
    parts = [torch.nn.Module.to(module, kind) for module in (model, copy.deepcopy(vae))]
    pipeline = make_pipeline(*parts, class_names)
    with written_whole(folder) as temporary:
        pipeline.save_pretrained(temporary)
