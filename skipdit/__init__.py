"""Skip-DiT: diffusion transformers with long skip branches, and Skip-Cache to sample from them faster."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "SkipCacheConfig": "cache",
    "SkipDiTTransformer2DModel": "models",
    "SkipLatteTransformer3DModel": "models",
    "create_model": "models",
    "list_models": "models",
    "SkipDiTPipeline": "pipelines",
    "SkipLattePipeline": "pipelines",
    "make_scheduler": "schedulers",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from .cache import SkipCacheConfig
    from .models import SkipDiTTransformer2DModel, SkipLatteTransformer3DModel, create_model, list_models
    from .pipelines import SkipDiTPipeline, SkipLattePipeline
    from .schedulers import make_scheduler


def __getattr__(name: str):
    """Import on first use, so that `skipdit --help` does not wait for torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'skipdit' has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
