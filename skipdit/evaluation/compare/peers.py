"""Rival caches: diffusers' own, attached to a vanilla pipeline by a word such as "pab:2"."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import FasterCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from ...config import nearest
from ...errors import UserError
from ...pipelines import SkipPipeline

__all__ = ["PEERS", "magnitude_ratios", "parse_peer", "peer_config"]

PEERS = {
    "pab": "Pyramid Attention Broadcast: attention reused, every <n>-th step in full",
    "taylorseer": "TaylorSeer: attention and MLP forecast by a first-order series, every <n>-th step in full",
    "fbcache": "First Block Cache: the rest reused while the first block changes by less than <threshold>",
    "magcache": "MagCache: the rest reused while the expected error stays below <threshold>",
    "fastercache": "FasterCache",
}
OF_COUNTS = ("pab", "taylorseer", "fastercache")
WARM_STEPS = 3  # TaylorSeer's own default: steps before the first forecast
MOST_SKIPPED = 3  # MagCache's own default: steps skipped in a row


def parse_peer(word: str) -> tuple[str, float]:
    """Name and strength of "pab:2".

    Raises:
        UserError: It is spelled otherwise.
    """
    name, _, strength = word.partition(":")
    if name not in PEERS:
        raise UserError(f"No rival cache {name!r}: {nearest(name, list(PEERS))}")
    try:
        value = float(strength)
    except ValueError as error:
        raise UserError(f"Rival cache {word!r} is not spelled <name>:<number>, for example pab:2.") from error
    if value <= 0 or (name in OF_COUNTS and (value != int(value) or value < 2)):
        kind = "a whole number from 2" if name in OF_COUNTS else "above 0"
        raise UserError(f"Rival cache {word!r}: its number must be {kind}.")
    return name, value


def peer_config(word: str, pipeline: SkipPipeline, steps: int, sample: Callable[[int], Any]) -> Any:
    """The diffusers config of a rival cache.

    Args:
        word: As `parse_peer` reads it.
        pipeline: That it will be attached to.
        steps: Sampler steps.
        sample: Samples clips with that many steps; MagCache is calibrated on them.
    """
    name, value = parse_peer(word)
    if name == "pab":
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(value),
            current_timestep_callback=lambda: pipeline.current_timestep,
        )
    if name == "taylorseer":
        return TaylorSeerCacheConfig(
            cache_interval=int(value),
            disable_cache_before_step=WARM_STEPS,
            cache_identifiers=[r"blocks\.\d+\.attn", r"blocks\.\d+\.mlp"],
            taylor_factors_dtype=torch.float32,
        )
    if name == "fbcache":
        return FirstBlockCacheConfig(threshold=value)
    if name == "fastercache":
        return FasterCacheConfig(spatial_attention_block_skip_range=int(value))
    ratios = magnitude_ratios(pipeline, lambda: sample(steps))
    return MagCacheConfig(
        threshold=value, max_skip_steps=MOST_SKIPPED, num_inference_steps=steps, mag_ratios=torch.tensor(ratios)
    )


def magnitude_ratios(pipeline: SkipPipeline, sample: Callable[[], Any]) -> list[float]:
    """Mean ratio of the norms of what all blocks together add, step by step to the step before (MagCache, eq. 4).

    Args:
        pipeline: Its network is watched, without any cache.
        sample: Runs the pipeline once.

    Returns:
        One number a step, the first 1.
    """
    blocks: Sequence[torch.nn.Module] = pipeline.transformer.blocks
    ratios: list[float] = []
    seen: dict[str, torch.Tensor | None] = {"input": None, "norm": None}

    def before(_module, args, kwargs):
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    def after(_module, _args, output):
        norm = (output - seen["input"]).float().norm(dim=-1)
        ratios.append(1.0 if seen["norm"] is None else (norm / (seen["norm"] + 1e-8)).mean().item())
        seen["norm"] = norm

    handles = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after),
    ]
    try:
        sample()
    finally:
        for handle in handles:
            handle.remove()
    return ratios
