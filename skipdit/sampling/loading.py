"""From a user's words to a pipeline on a device: everything checked first, weights read last."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import logging

from ..checkpoints import load_state_dict
from ..config import nearest
from ..errors import UserError
from ..models import SkipBackbone, SkipDiTTransformer2DModel, SkipLatteTransformer3DModel
from ..models.presets import PRESETS
from ..pipelines import SkipDiTPipeline, SkipLattePipeline, SkipPipeline
from ..schedulers import TRAINING_SCHEDULE, make_scheduler
from ..weights import DTYPES, build
from .config import SampleConfig

__all__ = [
    "PIPELINES",
    "ModelSource",
    "check_dtype",
    "choose_device",
    "find_model",
    "load_vae",
    "read_class_names",
    "read_json",
    "resolve_classes",
]

PIPELINES: dict[type[SkipBackbone], type[SkipPipeline]] = {
    SkipDiTTransformer2DModel: SkipDiTPipeline,
    SkipLatteTransformer3DModel: SkipLattePipeline,
}
PRESET_SIZE, PRESET_FRAMES = 256, 16
AS_TRAINED = (*TRAINING_SCHEDULE, "trained_betas", "rescale_betas_zero_snr")
"""What a model was trained with, whichever sampler is put on it."""
AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny)}


@dataclass(frozen=True)
class ModelSource:
    """A model that is known but not yet read.

    Attributes:
        model: The network without storage (meta device), for its config and its checks.
        class_names: One a class, in order; empty if there are none.
        folder: Of a saved pipeline, or None.
        checkpoint: Weights of a preset, or None.
        vae: Folder or hub id of the preset's autoencoder, or None.
    """

    model: SkipBackbone
    class_names: tuple[str, ...]
    folder: Path | None = None
    checkpoint: Path | None = None
    vae: str | None = None

    @property
    def is_video(self) -> bool:
        return isinstance(self.model, SkipLatteTransformer3DModel)

    @property
    def num_classes(self) -> int | None:
        """None for an unconditional model."""
        return self.model.config.num_classes

    def check_size(self, image_size: int | None) -> None:
        """Raise UserError if clips or pictures of so many pixels a side cannot be cut into patches."""
        vae = self.folder / "vae" if self.folder is not None else Path(self.vae)
        step = self.model.config.patch_size * _vae_scale(vae)
        if image_size is not None and image_size % step:
            raise UserError(f"image_size={image_size} must be a multiple of {step} pixels.")

    @property
    def frame_interval(self) -> int | None:
        """Every how many-th frame of its training videos the network saw, if the pipeline says it."""
        return None if self.folder is None else read_json(self.folder / "model_index.json").get("frame_interval")

    def shape(self, image_size: int | None, num_frames: int | None) -> tuple[int, ...]:
        """Of one sample, [T, H, W, 3] or [H, W, 3], of that size or of the model's own."""
        vae = self.folder / "vae" if self.folder is not None else Path(self.vae)
        config = self.model.config
        own = config.sample_size if not isinstance(config.sample_size, int) else (config.sample_size,) * 2
        sides = [image_size or side * _vae_scale(vae) for side in own]
        return (*([num_frames or config.num_frames] if self.is_video else []), *sides, 3)

    def load(self, device: torch.device, dtype: str = "fp32", sampler: str | None = None) -> SkipPipeline:
        """Read the weights.

        Args:
            device: Where the pipeline goes.
            dtype: "fp32", "bf16" or "fp16".
            sampler: A name that `make_scheduler` knows; None: the pipeline's own, "ddim" for a preset.

        Raises:
            UserError: A file is damaged or does not fit.
        """
        pipeline = self._read_folder() if self.folder is not None else self._read_preset()
        if sampler is not None:
            trained = pipeline.scheduler.config
            pipeline.scheduler = make_scheduler(sampler, **{key: trained[key] for key in AS_TRAINED if key in trained})
        pipeline.transformer.eval()
        pipeline.vae.eval()
        for part in (pipeline.transformer, pipeline.vae):
            torch.nn.Module.to(part, DTYPES[dtype])  # ModelMixin.to would warn of layers to keep, of which we have none
        return pipeline.to(device)

    def _read_folder(self) -> SkipPipeline:
        logging.disable_progress_bar()  # of the files: over in a moment
        try:
            return PIPELINES[type(self.model)].from_pretrained(self.folder)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{self.folder} cannot be read as a pipeline ({_first_line(error)}).") from error
        finally:
            logging.enable_progress_bar()

    def _read_preset(self) -> SkipPipeline:
        config = {"_class_name": type(self.model).__name__, **self.model.config}
        transformer = build(load_state_dict(self.checkpoint), config, str(self.checkpoint))
        parts = transformer, load_vae(self.vae), make_scheduler("ddim"), self.class_names
        return PIPELINES[type(self.model)](*parts)


def find_model(config: SampleConfig) -> ModelSource:
    """Look up what `config.model` names, and see that all it needs is there; no weights are read.

    Raises:
        UserError: Neither a preset nor the folder of a pipeline, a missing file, or sizes that do not fit.
    """
    if config.model in PRESETS:
        return _find_preset(config)
    folder = Path(config.model)
    if (folder / "model_index.json").is_file():
        for key in ("checkpoint", "vae", "num_classes", "class_names"):
            if getattr(config, key) is not None:
                raise UserError(f"{key} is for presets: the pipeline in {folder} has its own; leave {key} out.")
        return _find_folder(folder)
    if folder.is_dir():
        raise UserError(f"{folder} holds no pipeline (no model_index.json): pass a folder that save_pretrained wrote.")
    if config.model.startswith(("DiT-", "Latte-")):
        raise UserError(f"No preset {config.model!r}: {nearest(config.model, list(PRESETS))}")
    raise UserError(f"No model {config.model!r}: it is neither a folder nor a preset such as Latte-XL/2-skip.")


def _find_folder(folder: Path) -> ModelSource:
    index = read_json(folder / "model_index.json")
    names = {cls.__name__: (model, cls) for model, cls in PIPELINES.items()}
    if index.get("_class_name") not in names:
        raise UserError(f"{folder} holds a {index.get('_class_name')}, not one of {', '.join(names)}.")
    model_class, _ = names[index["_class_name"]]
    settings = read_json(folder / "transformer" / "config.json")
    model = _without_storage(model_class, settings, str(folder))
    return ModelSource(model, tuple((index.get("class_names") or {}).values()), folder=folder)


def _find_preset(config: SampleConfig) -> ModelSource:
    for key in ("checkpoint", "vae"):
        if getattr(config, key) is None:
            raise UserError(f"{config.model} is a preset without weights: pass {key}=<path> as well.")
    checkpoint, vae = Path(config.checkpoint), Path(config.vae)
    is_hub_id = config.vae.count("/") == 1 and not vae.exists() and not vae.parent.exists()
    missing = {} if checkpoint.is_file() else {"checkpoint": checkpoint}
    if not is_hub_id and not (vae / "config.json").is_file():
        missing["vae"] = vae
    if missing:
        raise UserError(_describe_missing(missing))
    scale = _vae_scale(vae)
    image_size = config.image_size or PRESET_SIZE
    if image_size % scale:
        raise UserError(f"image_size={image_size} must be a multiple of {scale}, the autoencoder's scale.")
    model_class, settings = PRESETS[config.model]
    settings = {
        **settings,
        "num_classes": config.num_classes,
        "sample_size": image_size // scale,
    }
    if model_class is SkipLatteTransformer3DModel:
        settings["num_frames"] = config.num_frames or PRESET_FRAMES
    names = read_class_names(config.class_names) if config.class_names else ()
    if names and len(names) != config.num_classes:
        many = f"{len(names)} names for num_classes={config.num_classes}"
        raise UserError(f"{config.class_names} has {many}: give one name a class, or class_names=null.")
    model = _without_storage(model_class, settings, config.model)
    return ModelSource(model, names, checkpoint=checkpoint, vae=config.vae)


def _without_storage(model_class: type[SkipBackbone], settings: dict[str, Any], where: str) -> SkipBackbone:
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            return model_class(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {_first_line(error)}") from error


def _describe_missing(missing: dict[str, Path]) -> str:
    """One sentence: what is missing and the command that fetches it, if the registry has it."""
    from ..registry.catalogue import load_catalogue  # only here: sampling itself needs no registry

    known = {Path(entry.path): entry.id for entry in load_catalogue().entries}
    paths = " and ".join(map(str, missing.values()))
    which = f"{paths} {'is' if len(missing) == 1 else 'are'} not there"
    keys = " and ".join(f"{key}=<path>" for key in missing)
    if not all(path in known for path in missing.values()):
        return f"{which}: pass {keys}."
    ids = " ".join(known[path] for path in missing.values())
    return f"{which}: fetch with 'python pretrained/download_ckpts.py {ids}' (or pass {keys})."


def _vae_scale(folder: Path) -> int:
    """Image pixels per latent pixel."""
    if not (folder / "config.json").is_file():
        return 8  # of a hub's name; that of Stable Diffusion
    return 2 ** (len(read_json(folder / "config.json").get("block_out_channels", [0] * 4)) - 1)


def load_vae(vae: str | Path) -> AutoencoderKL | AutoencoderTiny:
    """An autoencoder by folder or hub id.

    Raises:
        UserError: It cannot be read, or is of another kind.
    """
    file = Path(vae) / "config.json"
    name = read_json(file).get("_class_name", "AutoencoderKL") if file.is_file() else "AutoencoderKL"
    if name not in AUTOENCODERS:
        raise UserError(f"{vae} holds a {name}: an AutoencoderKL or AutoencoderTiny is needed.")
    try:
        return AUTOENCODERS[name].from_pretrained(vae)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{vae} cannot be read as an autoencoder ({_first_line(error)}).") from error


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names of a text file in the order of the classes, a line each: bare, or as in classInd.txt "1 Archery".

    Raises:
        UserError: The file is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: a text file with a class name a line is needed.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    numbered = all(line.split()[0].isdigit() and len(line.split()) > 1 for line in lines)
    return tuple(line.split(maxsplit=1)[1] if numbered else line for line in lines)


def resolve_classes(words: Sequence[str], names: Sequence[str], num_classes: int | None) -> list[int] | None:
    """Class indices that the user's words stand for.

    Args:
        words: Names (any case), indices, or "all".
        names: Name of each class, or nothing.
        num_classes: None for an unconditional model.

    Returns:
        Indices in the order given; None for an unconditional model.

    Raises:
        UserError: A word is neither (the nearest name is suggested), or the model has no classes.
    """
    if num_classes is None:
        if list(words) != ["all"]:
            raise UserError(f"classes={_shown(words)}: this model is unconditional; leave classes out.")
        return None
    if not words:
        raise UserError("classes=[] asks for nothing: pass indices, names or all.")
    indices: list[int] = []
    by_name = {name.casefold(): index for index, name in enumerate(names)}
    for word in words:
        if word.casefold() in by_name:
            indices.append(by_name[word.casefold()])
        elif word == "all":
            indices.extend(range(num_classes))
        elif word.isdecimal() and int(word) < num_classes:
            indices.append(int(word))
        elif names and not word.lstrip("-").isdecimal():
            raise UserError(f"No class {word!r}: {nearest(word, names)}")
        else:
            raise UserError(f"No class {word!r}: this model has classes 0 to {num_classes - 1}.")
    return indices


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first that there is of CUDA, MPS, CPU.

    Raises:
        UserError: It is not known or not available.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"No device {name!r}: choose auto, cpu, cuda, cuda:1 or mps.")
    if kind == "mps" and not mps:
        raise UserError("device=mps is not available here: pass device=cpu or device=auto.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        found = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise UserError(f"device={name} is not available: there is {found}; pass device=cpu or device=auto.")
    return torch.device(name)


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raise UserError for a dtype that the device is slow in."""
    if device.type == "cpu" and dtype == "fp16":
        raise UserError("dtype=fp16 is many times slower than fp32 on the CPU: pass dtype=fp32 or bf16.")


def _shown(words: Sequence[str]) -> str:
    return f"[{', '.join(words)}]"


def read_json(path: Path) -> dict[str, Any]:
    """What a pipeline, or a set of samples, says of itself in a file.

    Raises:
        UserError: It is not there, no JSON, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read (it holds a {type(content).__name__}, not a mapping).")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200].rstrip(".")
