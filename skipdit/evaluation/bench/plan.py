"""What `skipdit bench` is going to measure: every option checked against the model, nothing computed yet."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...acceleration import compiler_for
from ...cache import SkipCacheConfig
from ...config import nearest
from ...errors import UserError
from ...files import check_writable
from ...models import SkipBackbone, SkipDiTTransformer2DModel, SkipLatteTransformer3DModel
from ...models.presets import PRESETS
from ...operations import Operations, count_operations
from ...sampling.loading import check_dtype, choose_device, read_json
from ...schedulers import make_scheduler
from ...weights import DTYPES

__all__ = ["BenchPlan", "make_plan"]

MODELS = {cls.__name__: cls for cls in (SkipDiTTransformer2DModel, SkipLatteTransformer3DModel)}
PUBLISHED_VAE_SCALE = 8  # pixels per latent position
# Stable Diffusion's, which the published models use.
PUBLISHED_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
PRESET_PIXELS, PRESET_FRAMES = 256, 16
PRESET_CLASSES = {SkipDiTTransformer2DModel: 1000, SkipLatteTransformer3DModel: 101}  # ImageNet, UCF101
CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class BenchPlan:
    """One bench.

    Attributes:
        name: The model as the user named it.
        model_class, settings: What builds it, with random weights.
        batch_size: Samples at once.
        guided: Whether each sample passes the network twice a step.
        sample_shape: Latents of the batch, [B, C, F, h, w] or [B, C, h, w].
        pixels: Side of a sample (height if they differ).
        caches: Interval -> setting, with the window of the task.
        schedules: Interval -> the trajectory's steps, True for a full one; 1 stands for no cache.
        shallow: Units that run at each end of a reused step.
        sampler, steps: The trajectory.
        device, dtype: What it runs on and in.
        compiled, against_plain: Each adds a mode: the whole network by torch.compile; `pipe.compile()`.
        breakdown: Whether the parts of a step are measured too.
        vae: Constructor arguments of the autoencoder that the breakdown measures; None: there is none.
        repeats: Timed pairs of a full and a reused step.
        rounds: Timed samplings of each setting.
        full, reused: Operations of the two kinds of step.
        output: Folder of the report.
    """

    name: str
    model_class: type[SkipBackbone]
    settings: dict[str, Any]
    batch_size: int
    guided: bool
    sample_shape: tuple[int, ...]
    pixels: int
    caches: dict[int, SkipCacheConfig]
    schedules: dict[int, list[bool]]
    shallow: int
    sampler: str
    steps: int
    device: torch.device
    dtype: str
    compiled: bool
    against_plain: bool
    breakdown: bool
    vae: dict[str, Any] | None
    repeats: int
    rounds: int
    full: Operations
    reused: Operations
    output: Path

    @property
    def is_video(self) -> bool:
        return len(self.sample_shape) == 5

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what the network sees: under guidance both branches as one batch."""
        return (self.batch_size * (2 if self.guided else 1), *self.sample_shape[1:])

    @property
    def share(self) -> float:
        """Operations of a reused step / operations of a full one."""
        return self.reused.total / self.full.total

    @property
    def modes(self) -> tuple[str, ...]:
        """The plain path first."""
        return ("eager", *["compiled"] * self.compiled, *["fast"] * self.against_plain)


def make_plan(args: argparse.Namespace) -> BenchPlan:
    """Check the options of `skipdit bench`; also sets the number of CPU threads.

    Raises:
        UserError: One of them is wrong; the message says which.
    """
    _check_numbers(args)
    device = _device(args.device)
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype}: choose from {', '.join(DTYPES)}.")
    check_dtype(args.dtype, device)
    model_class, settings, vae = _find(args.model)
    scale = _vae_scale(vae)
    settings = _sized(model_class, settings, scale, args)
    with torch.device("meta"):
        try:
            model = model_class(**settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"--model {args.model}: {error}") from error
    caches = _caches(model, args)
    schedules = _schedules(caches, args)
    cfg = model.config
    frames = [cfg.num_frames] if model_class is SkipLatteTransformer3DModel else []
    sample_shape = (args.batch_size, cfg.in_channels, *frames, *model._sides(cfg.sample_size))
    guided = cfg.num_classes is not None and not args.no_guidance
    input_shape = (args.batch_size * (2 if guided else 1), *sample_shape[1:])
    shallow = next(iter(caches.values())).shallow
    if args.compile:
        _check_compiler(device)
    output = check_writable(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return BenchPlan(
        name=args.model,
        model_class=model_class,
        settings=settings,
        batch_size=args.batch_size,
        guided=guided,
        sample_shape=sample_shape,
        pixels=sample_shape[-2] * scale,
        caches=caches,
        schedules=schedules,
        shallow=shallow,
        sampler=args.sampler,
        steps=args.steps,
        device=device,
        dtype=args.dtype,
        compiled=args.compile,
        against_plain=args.against_plain,
        breakdown=args.breakdown,
        vae=_decodable(vae, cfg.in_channels),
        repeats=args.repeats,
        rounds=args.rounds,
        full=count_operations(model, input_shape),
        reused=count_operations(model, input_shape, shallow, reused=True),
        output=output,
    )


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("batch_size", "num_frames", "size", "shallow", "steps", "repeats", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
    if args.steps > 1000:
        raise UserError(f"--steps {args.steps}: the noise schedule has 1000 timesteps; take at most as many.")
    if min(args.intervals) < 2:
        raise UserError(f"--intervals {min(args.intervals)}: an interval is 2 or more; no cache is always measured.")


def _device(name: str) -> torch.device:
    device = choose_device("cpu" if name == "auto" and not torch.cuda.is_available() else name)
    if device.type == "mps":
        raise UserError("--device mps: its calls cannot be timed here; choose auto, cpu or cuda.")
    return device


def _find(name: str) -> tuple[type[SkipBackbone], dict[str, Any], dict[str, Any] | None]:
    """Class and constructor arguments of a preset or a folder, and its autoencoder's config if that is known."""
    if name in PRESETS:
        model_class, settings = PRESETS[name]
        sizes = {
            "sample_size": PRESET_PIXELS // PUBLISHED_VAE_SCALE,
            "num_classes": PRESET_CLASSES[model_class],
        }
        if model_class is SkipLatteTransformer3DModel:
            sizes["num_frames"] = PRESET_FRAMES
        return model_class, {**settings, **sizes}, PUBLISHED_VAE
    if name.startswith(("DiT-", "Latte-")) and not Path(name).is_dir():
        raise UserError(f"No preset {name!r}: {nearest(name, list(PRESETS))}")
    for folder in (Path(name), CHECKOUT / name):  # the carried pipeline is found from any folder
        for part in (folder / "transformer" / "config.json", folder / "config.json"):
            if part.is_file():
                vae = folder / "vae" / "config.json"
                return *_read(part), read_json(vae) if vae.is_file() else None
    raise UserError(
        f"No model {name!r}: it is neither a preset such as Latte-XL/2-skip nor a folder with the "
        "config.json of a model or pipeline."
    )


def _read(path: Path) -> tuple[type[SkipBackbone], dict[str, Any]]:
    settings = read_json(path)
    model_class = MODELS.get(settings.get("_class_name"))
    if model_class is None:
        raise UserError(f"{path} is of a {settings.get('_class_name')}, not of one of {', '.join(MODELS)}.")
    return model_class, {key: value for key, value in settings.items() if not key.startswith("_")}


def _vae_scale(vae: dict[str, Any] | None) -> int:
    """Pixels per latent position."""
    channels = (vae or PUBLISHED_VAE).get("block_out_channels")
    return 2 ** (len(channels) - 1) if channels else PUBLISHED_VAE_SCALE


def _decodable(vae: dict[str, Any] | None, channels: int) -> dict[str, Any] | None:
    """Constructor arguments of an AutoencoderKL; None for another kind or one of other latents."""
    if vae is None or vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return None
    settings = {key: value for key, value in vae.items() if not key.startswith("_")}
    return settings if settings.get("latent_channels", 4) == channels else None


def _sized(
    model_class: type[SkipBackbone], settings: dict[str, Any], scale: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The constructor arguments with the size that the options ask for."""
    settings = dict(settings)
    if args.num_frames is not None:
        if model_class is not SkipLatteTransformer3DModel:
            raise UserError(f"--num-frames {args.num_frames}: {args.model} makes pictures; leave it out.")
        settings["num_frames"] = args.num_frames
    if args.size is not None:
        step = scale * settings.get("patch_size", 2)
        if args.size % step:
            raise UserError(f"--size {args.size} must be a multiple of {step} pixels for {args.model}.")
        settings["sample_size"] = args.size // scale
    return settings


def _caches(model: SkipBackbone, args: argparse.Namespace) -> dict[int, SkipCacheConfig]:
    task = "class-to-video" if isinstance(model, SkipLatteTransformer3DModel) else "class-to-image"
    published = SkipCacheConfig.preset(task)
    if not model.config.skip:
        hint = f"use {args.model}-skip" if f"{args.model}-skip" in PRESETS else "take a model with skip='linear'"
        raise UserError(f"{args.model} has no long skips, so a step cannot be reused: {hint}.")
    shallow = args.shallow or published.shallow
    try:
        model.check_paths(shallow, None)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from error
    try:
        published = replace(published, shallow=shallow, forecast=args.forecast)
    except ValueError as error:
        raise UserError(f"--forecast: {error}") from error
    return {interval: replace(published, interval=interval) for interval in sorted(set(args.intervals))}


def _schedules(caches: dict[int, SkipCacheConfig], args: argparse.Namespace) -> dict[int, list[bool]]:
    try:
        scheduler = make_scheduler(args.sampler)
    except ValueError as error:
        raise UserError(f"--sampler {args.sampler}: {error}") from error
    scheduler.set_timesteps(args.steps)
    timesteps = scheduler.timesteps.tolist()
    schedules = {interval: cache.schedule(timesteps) for interval, cache in caches.items()}
    return {1: [True] * len(timesteps), **schedules}


def _check_compiler(device: torch.device) -> None:
    compiler, missing = compiler_for(device)
    if not compiler:
        raise UserError(f"--compile: {missing}; leave --compile out.")
