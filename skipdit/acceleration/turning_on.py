"""Turn the chosen parts on, in an order in which they do not disturb each other, and off again."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from threading import RLock

import torch
from diffusers import DiffusionPipeline

from ..cache import SkipCacheConfig
from ..models import SkipBackbone
from .choice import CHOICES, Choice, compiles_decoder
from .graphs import GraphedForward, fingerprint
from .modulation import Modulations
from .planning import Plan
from .quality import psnr, trial_samples
from .undoing import recast, turn_on_blocks, turn_on_compiled, turn_on_float8, turn_on_kernels

__all__ = ["Acceleration", "accelerate", "graphed"]

log = logging.getLogger("skipdit.acceleration")


class Acceleration:
    """What was turned on for a pipeline, and why.

    Attributes:
        device: Where the pipeline was.
        choices: Every part, on or off, with the reason; `str` shows a line for each.
    """

    def __init__(
        self,
        model: SkipBackbone,
        choices: Sequence[Choice],
        stack: ExitStack,
        modulations: Modulations | None = None,
        graphs: GraphedForward | None = None,
    ):
        self.device, self.choices = model.device, tuple(choices)
        self._model, self._stack, self._modulations, self._graphs = model, stack, modulations, graphs
        self._alone = RLock()

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
        if vars(self._model).get("_acceleration") is not self:  # another pipeline has compiled it since
            return nullcontext
        if self._model.device != self.device:
            log.warning("compile() chose for %s; call it again to choose for %s.", self.device, self._model.device)
        vectors, recordings = nullcontext, nullcontext
        if self._modulations is not None:
            vectors = self._modulations.trajectory(timesteps, None if isinstance(labels, int) else labels, batch)
        if self._graphs is not None:
            recordings = partial(self._graphs.recordings_of, fingerprint(self._model))

        @contextmanager
        def step(index: int) -> Iterator[None]:
            with self._alone, vectors(index), recordings():  # vectors and a graph's tensors are those of one step
                yield

        return step

    def undo(self) -> None:
        """Put everything back; samples are bit for bit those of before, unless weights were changed meanwhile."""
        self._stack.close()
        if vars(self._model).get("_acceleration") is self:
            del self._model._acceleration

    def __deepcopy__(self, memo: dict) -> None:
        """A copied network is not compiled."""
        return None


def accelerate(pipeline: DiffusionPipeline, plan: Plan) -> Acceleration:
    """Turn on what `settle` decided.

    Raises:
        ValueError: Samples with float8 are too far off; nothing is on then.
    """
    model, vae, on, choices = pipeline.transformer, pipeline.vae, plan.on, list(plan.choices)
    modulations = graphs = None
    if (former := vars(model).get("_acceleration")) is not None:  # by another pipeline that shares the network
        former.undo()
    with ExitStack() as stack:
        if plan.dtype is not None:
            stack.callback(recast(model, plan.dtype))
            if vae is not None:
                stack.callback(recast(vae, plan.dtype))
        if plan.float8:
            choices.append(_float8(pipeline, plan.float8, plan.least_psnr, stack))
        if "decoder" in on and vae is not None:
            stack.callback(recast(vae, channels_last=True))
        if "kernels" in on:
            stack.callback(turn_on_kernels(model))
        if "modulation" in on:
            modulations = Modulations(model)
            stack.callback(modulations.undo)
        if "blocks" in on:
            stack.callback(turn_on_blocks(model))
            if vae is not None and compiles_decoder(model.device):
                stack.callback(turn_on_compiled([vae.decoder]))
        if "graphs" in on:
            graphs = stack.enter_context(graphed(model, modulations))
        acceleration = model._acceleration = Acceleration(model, choices, stack.pop_all(), modulations, graphs)
    if acceleration.parts:
        log.info("%s", acceleration)
    else:
        reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices if choice.name in CHOICES))
        device = acceleration.device
        log.warning("Nothing makes this pipeline faster on %s (%s): the plain path is taken.", device, reasons)
    return acceleration


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
