"""Networks: tensors in, tensors out."""

from .backbone import SkipBackbone, SkipTransformerOutput
from .dit import SkipDiTTransformer2DModel
from .latte import SkipLatteTransformer3DModel
from .presets import create_model, list_models

__all__ = [
    "SkipBackbone",
    "SkipDiTTransformer2DModel",
    "SkipLatteTransformer3DModel",
    "SkipTransformerOutput",
    "create_model",
    "list_models",
]
