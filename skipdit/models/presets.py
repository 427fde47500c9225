"""Model variants as data: a name such as "Latte-XL/2-skip" maps to constructor arguments."""

from typing import Any

from .backbone import SkipBackbone
from .dit import SkipDiTTransformer2DModel
from .latte import SkipLatteTransformer3DModel

FAMILIES: dict[str, type[SkipBackbone]] = {"DiT": SkipDiTTransformer2DModel, "Latte": SkipLatteTransformer3DModel}
SIZES: dict[str, dict[str, int]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}
PATCH_SIZES = (2, 4, 8)
SKIPS: dict[str, str | None] = {"": None, "-skip": "linear", "-skip-residual": "residual"}

PRESETS: dict[str, tuple[type[SkipBackbone], dict[str, Any]]] = {
    f"{family}-{size}/{patch}{suffix}": (model_class, {**SIZES[size], "patch_size": patch, "skip": skip})
    for family, model_class in FAMILIES.items()
    for size in SIZES
    for patch in PATCH_SIZES
    for suffix, skip in SKIPS.items()
}


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(PRESETS)


def create_model(name: str, **overrides: Any) -> SkipBackbone:
    """Build a model with random weights.

    Args:
        name: "<DiT|Latte>-<XL|L|B|S>/<2|4|8>", vanilla, or with "-skip" (as published) or "-skip-residual".
        **overrides: Constructor arguments that the name does not fix (`num_classes=101`) or that replace its own.

    Raises:
        ValueError: The name is not known.

    Example:
        >>> create_model("Latte-S/8-skip", num_classes=101).num_units
        6
    """
    if name not in PRESETS:
        raise ValueError(
            f"No model {name!r}: names are <DiT|Latte>-<XL|L|B|S>/<2|4|8>, with -skip or -skip-residual added for long "
            "skips, for example Latte-XL/2-skip."
        )
    model_class, arguments = PRESETS[name]
    return model_class(**{**arguments, **overrides})
