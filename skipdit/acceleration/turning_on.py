"""Turn the chosen parts on, in an order in which they do not disturb each other, and off again."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from diffusers import DiffusionPipeline

from ..cache import SkipCacheConfig
from ..models import SkipBackbone
from .choice import CHOICES, Choice, choose, compiles_decoder, has_bf16
from .graphs import GraphedForward
from .modulation import Modulations
from .quality import psnr, trial_samples
from .undoing import recast, turn_on_blocks, turn_on_compiled, turn_on_float8, turn_on_kernels

__all__ = ["Acceleration", "accelerate"]

log = logging.getLogger("skipdit.acceleration")
FLOAT8 = ("attention", "mlp")


class Acceleration:
    """What was turned on for a pipeline, and why.

    Attributes:
        device: Where the pipeline was.
        choices: Every part, on or off, with the reason; `str` shows a line for each.
    """

    def __init__(self, device: torch.device, choices: list[Choice], stack: ExitStack, modulations: Modulations | None):
        self.device, self.choices = device, tuple(choices)
        self._stack, self._modulations = stack, modulations

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is on."""
        return tuple(choice.name for choice in self.choices if choice.on)

    def __str__(self) -> str:
        head = f"Turned on for {self.device}: {', '.join(self.parts)}"
        if not self.parts:
            head = f"The plain path on {self.device}"
        return "\n".join([head, *(f"  {choice}" for choice in self.choices)])

    def steps(
        self, timesteps: torch.Tensor, labels: torch.Tensor | int, batch: int
    ) -> Callable[[int], AbstractContextManager]:
        """Step index -> the context that a trajectory's forward runs in.

        Args:
            timesteps: [steps] on the device.
            labels: [batch] as the network sees them, or a number for an unconditional model.
            batch: Samples as the network sees them.
        """
        if self._modulations is None:
            return nullcontext
        return self._modulations.trajectory(timesteps, None if isinstance(labels, int) else labels, batch)

    def undo(self) -> None:
        """Put everything back; samples are bit for bit those of before."""
        self._stack.close()


def accelerate(
    pipeline: DiffusionPipeline,
    dtype: torch.dtype | None = None,
    float8: bool | Sequence[str] = False,
    least_psnr: float = 30.0,
    **wanted: bool | None,
) -> Acceleration:
    """Turn on what suits a pipeline's device; `SkipPipeline.compile` says what the arguments mean.

    Raises:
        ValueError: What is asked for cannot be had, or float8's samples are too far off; nothing is changed then.
    """
    device, model = pipeline._execution_device, pipeline.transformer
    choices = choose(device, wanted)
    on = {choice.name for choice in choices if choice.on}
    modulations = None
    with ExitStack() as stack:
        choices.append(_dtype(model.dtype, dtype, device))
        if dtype is not None:
            stack.callback(recast(model, dtype))
            if pipeline.vae is not None:
                stack.callback(recast(pipeline.vae, dtype))
        if float8:
            names = FLOAT8 if float8 is True else tuple(float8)
            choices.append(_float8(pipeline, names, least_psnr, stack))
        if "decoder" in on and pipeline.vae is not None:
            stack.callback(recast(pipeline.vae, channels_last=True))
        if "kernels" in on:
            stack.callback(turn_on_kernels(model))
        if "modulation" in on:
            modulations = Modulations(model)
            stack.callback(modulations.undo)
        if "blocks" in on:
            stack.callback(turn_on_blocks(model))
            if pipeline.vae is not None and compiles_decoder(device):
                stack.callback(turn_on_compiled([pipeline.vae.decoder]))
        if "graphs" in on:
            stack.enter_context(graphed(model, modulations))
        acceleration = Acceleration(device, choices, stack.pop_all(), modulations)
    if acceleration.parts:
        log.info("%s", acceleration)
    else:
        reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices if choice.name in CHOICES))
        log.warning("Nothing makes this pipeline faster on %s (%s): the plain path is taken.", device, reasons)
    return acceleration


def _dtype(now: torch.dtype, wanted: torch.dtype | None, device: torch.device) -> Choice:
    """Another dtype is never chosen, only hinted at: it alters samples beyond rounding of float32."""
    if wanted is None:
        hint = "; dtype=torch.bfloat16 would be faster here, and less exact" if now is torch.float32 else ""
        return Choice("dtype", False, f"{now} stays{hint if has_bf16(device) else ''}")
    if wanted not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compile(dtype={wanted}): choose torch.float32, torch.bfloat16 or torch.float16.")
    slow = ", which this device has no units for" if wanted is torch.bfloat16 and not has_bf16(device) else ""
    return Choice("dtype", True, f"{now} becomes {wanted} as asked{slow}")


def _float8(pipeline: DiffusionPipeline, names: tuple[str, ...], least_psnr: float, stack: ExitStack) -> Choice:
    """Turn float8 on if its samples are close enough to those without."""
    with _without_cache(pipeline.transformer):
        reference = trial_samples(pipeline)
        stack.callback(turn_on_float8(pipeline.transformer, names))
        samples = trial_samples(pipeline)
    found = psnr(samples, reference, 1.0 if pipeline.vae is not None else float(reference.max() - reference.min()))
    layers = " and ".join(names)
    if not found >= least_psnr:
        raise ValueError(
            f"float8 of {layers} is refused: its samples are {found:.1f} dB (PSNR) from those without, and "
            f"{least_psnr:g} is asked for; take fewer layers, or a lower least_psnr."
        )
    slow = "" if pipeline._execution_device.type == "cuda" else "; slower than without on this device"
    return Choice("float8", True, f"{layers} as asked; samples are {found:.1f} dB (PSNR) from those without{slow}")


@contextmanager
def graphed(model: SkipBackbone, modulations: Modulations | None, **options) -> Iterator[GraphedForward]:
    """Within it, a model's forward runs by graphs. A cache hook goes around them: it decides on the host."""
    own = "forward" in vars(model)
    key = (lambda: modulations.key) if modulations is not None else (lambda: None)

    def suits() -> bool:
        return not model.is_cache_enabled or isinstance(model._cache_config, SkipCacheConfig)

    with _without_cache(model):
        before = model.forward
        model.forward = forward = GraphedForward(before, key, suits, **options)
    try:
        yield forward
    finally:
        with _without_cache(model):
            if own:
                model.forward = before
            else:
                del model.forward


@contextmanager
def _without_cache(model: SkipBackbone) -> Iterator[None]:
    """A cache that is on is taken off and put on again afterwards."""
    config = model._cache_config if model.is_cache_enabled else None
    if config is not None:
        model.disable_cache()
    try:
        yield
    finally:
        if config is not None:
            model.enable_cache(config)
