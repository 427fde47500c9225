"""Diffusers' own caches on our models: which can be attached, which are refused and why."""

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

_SKIPS_BLOCKS = {"FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig"}
_REFUSED = {
    "FasterCacheConfig": "it splits text-conditioned inputs by name, which class-conditional models do not have",
    "SeaCacheConfig": "it needs to know the model's output norm, which is registered for diffusers' own models only",
    "TextKVCacheConfig": "there are no text keys and values to cache",
}


def check_foreign_cache(config: Any, has_skips: bool, block_class: type) -> None:
    """Make the blocks known to diffusers' block caches, or refuse the cache.

    Args:
        config: One of diffusers' cache configs.
        has_skips: Whether the model has long skips.
        block_class: Class of the model's blocks, with `forward(hidden_states, ...) -> hidden_states`.

    Raises:
        ValueError: This cache cannot work on such a model; the message says why.
    """
    name = type(config).__name__
    if name in _REFUSED:
        raise ValueError(f"{name} is not supported on class-conditional models: {_REFUSED[name]}.")
    if has_skips and name in _SKIPS_BLOCKS:
        raise ValueError(
            f"{name} skips whole blocks, whose outputs the long skips of this model carry to the later ones: "
            "use SkipCacheConfig here, or a vanilla model (skip=None)."
        )
    TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(return_hidden_states_index=0))
