"""From settings to the parts of a run, with every mismatch named before any work."""

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.utils.data import Dataset

from ..config import nearest
from ..data.latents import hash_weights
from ..errors import UnreadableError, UserError
from ..files import LONGEST_WAIT
from ..models import SkipBackbone
from ..models.presets import FAMILIES, PRESETS
from .config import DataConfig, ModelConfig, TrainConfig
from .data import encode
from .order import Draw, read_item

__all__ = ["build_accelerator", "build_model", "check_fit", "load_vae"]


def build_model(config: ModelConfig) -> SkipBackbone:
    """A network with fresh weights.

    Raises:
        UserError: Its name or an argument is not known, or the sizes do not fit each other.
    """
    names = {**{family: (kind, {}) for family, kind in FAMILIES.items()}, **PRESETS}
    if config.name not in names:
        raise UserError(f"model.name={config.name!r} is not known: {nearest(config.name, list(names))}")
    kind, arguments = names[config.name]
    known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in config.arguments:
        if name not in known:
            raise UserError(f"No setting 'model.arguments.{name}': {nearest(name, known)}")
    try:
        return kind(**{**arguments, **config.arguments})
    except (TypeError, ValueError) as error:
        raise UserError(f"model.arguments: {error}") from error


def load_vae(path: str) -> AutoencoderKL | AutoencoderTiny:
    """The frozen autoencoder, in float32.

    Raises:
        UserError: There is none at the path.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"No autoencoder in {path}: train the one of the digits with 'skipdit train-vae output={path}', "
            "or set vae= to the folder of another."
        )
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
        kind = AutoencoderTiny if name == "AutoencoderTiny" else AutoencoderKL
        vae = kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no autoencoder: {str(error).strip().splitlines()[0]}") from error
    return vae.eval().requires_grad_(False)


def check_fit(
    model: SkipBackbone,
    vae: AutoencoderKL,
    dataset: Dataset,
    class_names: list[str] | None,
    config: DataConfig,
    vae_path: str,
) -> None:
    """See on the first item that data, autoencoder and network go together.

    Raises:
        UserError: Names the setting that does not fit.
    """
    cfg = model.config
    if cfg.num_classes is not None and class_names is not None and cfg.num_classes != len(class_names):
        raise UserError(
            f"model.arguments.num_classes={cfg.num_classes}, but {config.name} has {len(class_names)} classes."
        )
    if cfg.num_classes is not None and class_names is None:
        raise UserError(f"model.arguments.num_classes={cfg.num_classes}, but this data has no classes: set it to null.")
    if getattr(dataset, "vae_hash", None) not in (None, hash_weights(vae.state_dict())):
        raise UserError(
            f"{dataset.folder} was written by another autoencoder than vae={vae_path}: set vae to that one."
        )
    _check_shape(model, vae, dataset, config)


def _check_shape(model: SkipBackbone, vae: AutoencoderKL, dataset: Dataset, config: DataConfig) -> None:
    cfg = model.config
    item = _first_readable(dataset)
    latents = item["mean"] if "mean" in item else encode(vae, item["video"][None], config.encode_batch)[0][0]
    sides = (cfg.sample_size, cfg.sample_size) if isinstance(cfg.sample_size, int) else tuple(cfg.sample_size)
    wanted = {
        "in_channels": (latents.shape[0], cfg.in_channels),
        "sample_size": (tuple(latents.shape[-2:]), sides),
    }
    if "num_frames" in cfg:
        frames = latents.shape[1] - getattr(dataset, "images", 0) if latents.ndim == 4 else 1
        wanted["num_frames"] = (frames, cfg.num_frames)
    elif latents.ndim == 4:
        raise UserError(f"{config.name} gives clips, but the model makes pictures: set model.name=Latte.")
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise UserError(f"model.arguments.{name} is {expected}, but the latents of {config.name} have {found}.")


def _first_readable(dataset: Dataset) -> dict[str, Any]:
    error = None
    for index in range(len(dataset)):
        try:
            return read_item(dataset, Draw(index, 0))
        except UnreadableError as found:
            error = found
    raise UserError(f"No item of the data can be read; the last one: {error}.")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of the processes and devices that it was launched on.

    Raises:
        UserError: This machine cannot do what the config asks for.
    """
    if config.tracker and importlib.util.find_spec(config.tracker) is None:
        raise UserError(f"tracker={config.tracker} needs the package {config.tracker}: install it or use tracker=null.")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # Others wait while one process counts frames, writes a checkpoint or measures FVD.
    processes = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT).num_processes
    passes = config.passes(processes)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=passes,
            log_with=config.tracker,
            project_dir=config.output,
        )
    except ValueError as error:
        raise UserError(f"accelerate: {str(error).splitlines()[0]}") from error
    if (plugin := accelerator.state.deepspeed_plugin) is not None:  # which wants to know before it sees a batch
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size // processes // passes
        plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
    return accelerator
