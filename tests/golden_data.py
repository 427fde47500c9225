"""The tensors recorded from the published model (tests/golden), and models that carry its weights."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from skipdit.models import SkipBackbone, SkipDiTTransformer2DModel, SkipLatteTransformer3DModel

FOLDER = Path(__file__).parent / "golden"
FAMILIES = ("latte_skip", "dit_skip")
SIZES = ("sample_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")


@lru_cache
def golden(family: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors in this project's axis order (videos [B, C, F, h, w]) and the description beside them."""
    tensors = load_file(FOLDER / f"{family}.safetensors")
    about = json.loads((FOLDER / f"{family}.json").read_text())
    if family == "latte_skip":  # recorded frames first
        tensors = {
            key: value.transpose(-4, -3) if value.ndim >= 5 and not key.startswith("weights.") else value
            for key, value in tensors.items()
        }
    return tensors, about


def golden_weights(family: str) -> dict[str, torch.Tensor]:
    return {key[len("weights.") :]: value for key, value in golden(family)[0].items() if key.startswith("weights.")}


def golden_model(family: str, **overrides: Any) -> SkipBackbone:
    """The recorded model; with skip=None or num_classes=None the weights that go with these are left out."""
    about = golden(family)[1]
    arguments = {key: about[key] for key in SIZES}
    kind = SkipDiTTransformer2DModel
    if family == "latte_skip":
        kind, arguments["num_frames"] = SkipLatteTransformer3DModel, about["num_frames"]
    model = kind(**{**arguments, **overrides}).eval().requires_grad_(False)
    weights = golden_weights(family)
    if model.config.skip is None:
        weights = {key: value for key, value in weights.items() if not key.startswith("skip_")}
    if model.config.num_classes is None:
        weights = {key: value for key, value in weights.items() if not key.startswith("y_embedder")}
    model.load_state_dict(weights, strict=True)
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
