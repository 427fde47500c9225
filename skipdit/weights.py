"""From the names and shapes of a state dict to the model that it belongs to."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from .checkpoints import load_state_dict
from .errors import UserError
from .models import SkipBackbone, SkipDiTTransformer2DModel, SkipLatteTransformer3DModel
from .models.presets import PRESETS, SIZES

__all__ = ["build", "describe", "infer_config", "read_folder"]

State = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES: dict[str, type[SkipBackbone]] = {
    cls.__name__: cls for cls in (SkipDiTTransformer2DModel, SkipLatteTransformer3DModel)
}
HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}

# What other files that lie about in `pretrained/` look like: a telling part of a name -> what it is.
STRANGERS = {
    "caption_projection.": "a text-to-video model (LatteT2V), which this command does not convert",
    "adaln_single.": "a text-conditioned model (PixArt or LatteT2V), which this command does not convert",
    "text_embedding_padding": "HunyuanDiT",
    "decoder.up_blocks.": "an autoencoder (VAE)",
    "decoder.up.0": "an autoencoder (VAE) in the layout of CompVis",
    "down_blocks.": "a U-Net of diffusers",
    "model.diffusion_model.": "a Stable Diffusion checkpoint",
    "lora_": "LoRA adapters",
    "encoder.layers.": "a text or image encoder",
}


def infer_config(state: State, where: str, num_heads: int | None = None, skip: str = "linear") -> dict[str, Any]:
    """Constructor arguments, with `_class_name`, of the model whose weights these are.

    Args:
        state: Names without prefixes -> tensors.
        where: The file, for messages.
        num_heads: Heads, if the hidden size is of no published model: shapes do not tell.
        skip: Kind of the long skips if there are any.

    Raises:
        UserError: It is another kind of model.
    """
    needed = ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight", "pos_embed")
    if absent := [name for name in needed if name not in state]:
        raise UserError(f"{where} is no DiT or Latte: it has no {absent[0]}. {_stranger(state)}")
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = num_heads or HEADS.get(hidden)
    if heads is None:
        raise UserError(f"{where} has hidden size {hidden}, which is of no published model: pass --num-heads.")
    patches = state["pos_embed"].shape[1]
    if math.isqrt(patches) ** 2 != patches:
        raise UserError(f"{where} is of {patches} patches, which is no square: only square models are converted.")
    config: dict[str, Any] = {
        "_class_name": "SkipLatteTransformer3DModel" if "temp_embed" in state else "SkipDiTTransformer2DModel",
        "sample_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        "num_classes": None,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        "skip": skip if _count(state, r"skip_linears\.(\d+)\.") else None,
    }
    if "temp_embed" in state:
        config["num_frames"] = state["temp_embed"].shape[1]
    if "y_embedder.embedding_table.weight" in state:
        table = state["y_embedder.embedding_table.weight"]
        config["num_classes"] = table.shape[0] - 1
    return config


def build(state: State, config: dict[str, Any], where: str, dtype: str = "fp32") -> SkipBackbone:
    """The model with these weights; the tensors are taken over, not copied.

    Raises:
        UserError: Names or shapes differ from the model that the config describes; they are listed.
    """
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            model = CLASSES[config["_class_name"]](**arguments)
    except ValueError as error:
        raise UserError(f"{where} is no model that can be built: {error}") from error
    _compare(state, model, where)
    state = {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _compare(state: State, model: SkipBackbone, where: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parts = []
    if missing := sorted(set(wanted) - set(given)):
        parts.append(f"missing: {_some(missing)}")
    if extra := sorted(set(given) - set(wanted)):
        parts.append(f"not known: {_some(extra)}")
    differ = [
        f"{name} {given[name]}, not {wanted[name]}" for name in wanted if given.get(name, wanted[name]) != wanted[name]
    ]
    if differ:
        parts.append(f"of another shape: {_some(differ)}")
    if parts:
        raise UserError(f"{where} looks like {describe(model)}, but does not fit it; {'; '.join(parts)}.")


def describe(model: SkipBackbone) -> str:
    """Name and kind of a model: "Latte-XL/2-skip (video, 16 frames, 101 classes)"."""
    config = model.config
    traits = ("depth", "hidden_size", "num_heads", "patch_size", "skip")
    name = next(
        (
            name
            for name, (cls, arguments) in PRESETS.items()
            if isinstance(model, cls) and all(arguments[trait] == config[trait] for trait in traits)
        ),
        ("Latte" if "num_frames" in config else "DiT")
        + f" of depth {config.depth} and hidden size {config.hidden_size}"
        + (f" with {config.skip} skips" if config.skip else " without skips"),
    )
    kind = f"video, {config.num_frames} frames" if "num_frames" in config else "image"
    classes = f"{config.num_classes} classes" if config.num_classes is not None else "unconditional"
    return f"{name} ({kind}, {classes})"


def read_folder(folder: Path) -> tuple[State, dict[str, Any]]:
    """Weights and config of a diffusers folder: of a pipeline, or of a transformer alone.

    Raises:
        UserError: It is no such folder, or its transformer is of another kind.
    """
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        config = json.loads((inner / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no diffusers folder: {inner / 'config.json'} cannot be read.") from error
    if config.get("_class_name") not in CLASSES:
        raise UserError(f"{inner} holds a {config.get('_class_name')}, not one of {', '.join(CLASSES)}.")
    files = sorted(inner.glob("*.safetensors")) or sorted(inner.glob("diffusion_pytorch_model*.bin"))
    if not files:
        raise UserError(f"{inner} has no weights: diffusion_pytorch_model.safetensors is expected.")
    state: State = {}
    for file in files:
        state |= load_state_dict(file)
    return state, config


def _count(state: State, pattern: str) -> int:
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return max(found) + 1 if found else 0


def _stranger(state: State) -> str:
    for part, what in STRANGERS.items():
        if any(part in name for name in state):
            return f"It looks like {what}."
    return f"Its names begin with {_some(sorted({name.split('.')[0] for name in state}))}."


def _some(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
