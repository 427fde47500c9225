"""What `pipe.compile()` is going to do: everything is checked here, and nothing changed yet."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from ..models.layers import FLOAT8_LAYERS, check_float8
from .choice import Choice, choose, has_bf16

__all__ = ["Plan", "check_on_device", "settle"]

FLOAT8 = ("attention", "mlp")


@dataclass(frozen=True)
class Plan:
    """What `settle` found: parts with their reasons, and what else was asked for."""

    choices: tuple[Choice, ...]
    dtype: torch.dtype | None
    float8: tuple[str, ...]
    least_psnr: float

    @property
    def on(self) -> set[str]:
        return {choice.name for choice in self.choices if choice.on}


def settle(
    pipeline: DiffusionPipeline,
    dtype: torch.dtype | None = None,
    float8: bool | str | Sequence[str] = False,
    least_psnr: float = 30.0,
    **wanted: bool | None,
) -> Plan:
    """Decide what to turn on, changing nothing; `SkipPipeline.compile` says what the arguments mean.

    Raises:
        ValueError: What is asked for cannot be had.
    """
    check_on_device(pipeline)
    names = _float8_names(float8)
    if names:
        check_float8(pipeline.transformer, names)
    choices = choose(pipeline._execution_device, wanted)
    choices.append(_dtype(pipeline.transformer.dtype, dtype, pipeline._execution_device))
    return Plan(tuple(choices), dtype, names, least_psnr)


def check_on_device(pipeline: DiffusionPipeline) -> None:
    """Raise ValueError where weights come and go at every call: graphs and vectors ahead need them to stay."""
    for part in (pipeline.transformer, pipeline.vae):
        for module in () if part is None else part.modules():
            registry = getattr(module, "_diffusers_hook", None)
            names = registry.hooks if registry is not None else ()
            if hasattr(module, "_hf_hook") or any("offload" in name for name in names):
                raise ValueError(
                    "compile() needs weights that stay on the device, and this pipeline offloads them: leave "
                    "offloading out, or take the plain path by uncompile()."
                )


def _float8_names(asked: bool | str | Sequence[str]) -> tuple[str, ...]:
    """Layers that are to run in float8."""
    if isinstance(asked, bool):
        return FLOAT8 if asked else ()
    if not isinstance(asked, Sequence):
        raise ValueError(f"compile(float8={asked!r}): choose True, False or some of {', '.join(FLOAT8_LAYERS)}.")
    return (asked,) if isinstance(asked, str) else tuple(asked)


def _dtype(now: torch.dtype, wanted: torch.dtype | None, device: torch.device) -> Choice:
    """Another dtype is never chosen, only hinted at: it alters samples beyond rounding of float32."""
    if wanted is None:
        hint = "; dtype=torch.bfloat16 would be faster here, and less exact" if now is torch.float32 else ""
        return Choice("dtype", False, f"{now} stays{hint if has_bf16(device) else ''}")
    if wanted not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compile(dtype={wanted}): choose torch.float32, torch.bfloat16 or torch.float16.")
    slow = ", which this device has no units for" if wanted is torch.bfloat16 and not has_bf16(device) else ""
    return Choice("dtype", True, f"{now} becomes {wanted} as asked{slow}")
