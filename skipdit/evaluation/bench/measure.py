"""The stopwatch of `skipdit bench`: everything that is compared is measured in turns, within one run."""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...cache import SkipCacheConfig
from ...errors import UserError
from ...models import SkipBackbone
from ...pipelines import SkipDiTPipeline, SkipLattePipeline, SkipPipeline
from ...schedulers import make_scheduler
from ...timing import timed
from ...weights import DTYPES
from .plan import BenchPlan

__all__ = ["ModeResult", "Timing", "enough_memory", "measure", "plain_pipeline", "time_in_turns"]

WARM_UP_PAIRS = 2
WARM_UP_STEPS = 4  # few, but with full and reused steps in every published window
GUIDANCE_SCALE = 4.0  # any value above 1 costs the same


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, measured several times."""

    median: float
    least: float
    most: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class ModeResult:
    """What one mode (eager, compiled, fast) took.

    Attributes:
        full, reused: One forward.
        sampling: Interval -> a whole sampling up to the latents; 1 stands for no cache.
        difference: Interval -> relative error of these latents against the first mode's.
        choices: What `pipe.compile` chose, in words; "" for other modes.
    """

    full: Timing
    reused: Timing
    sampling: dict[int, Timing]
    difference: dict[int, float]
    choices: str = ""


def time_in_turns(stopwatches: Mapping[object, Callable[[], float]], rounds: int) -> dict[object, Timing]:
    """Run all, `rounds` times, every other time backwards: a slow minute or a warming chip hits all alike.

    Args:
        stopwatches: Name -> a call that does the work once and returns its seconds.
        rounds: Times that each runs.
    """
    seconds: dict[object, list[float]] = {name: [] for name in stopwatches}
    for number in range(rounds):
        for name in list(stopwatches)[:: -1 if number % 2 else 1]:
            seconds[name].append(stopwatches[name]())
    return {name: Timing.of(values) for name, values in seconds.items()}


@torch.no_grad()
def measure(plan: BenchPlan, tell: Callable[[str], None] = lambda line: None) -> dict[str, ModeResult]:
    """Measure as planned.

    Args:
        plan: From `make_plan`.
        tell: Receives lines about the progress.

    Returns:
        Mode -> its times.

    Raises:
        UserError: The device runs out of memory.
    """
    with enough_memory(plan):
        return _measure(plan, tell)


@contextmanager
def enough_memory(plan: BenchPlan) -> Iterator[None]:
    """Tell the user what to do when the device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{plan.device} has too little memory: lower --batch-size {plan.batch_size} or take --dtype bf16."
        ) from error


def _measure(plan: BenchPlan, tell: Callable[[str], None]) -> dict[str, ModeResult]:
    pipelines = _pipelines(plan)
    tell(f"{plan.name} on {plan.device}: warming up ({', '.join(plan.modes)})")
    steps = {
        (mode, kind): stopwatch
        for mode, pipeline in pipelines.items()
        for kind, stopwatch in _step_stopwatches(pipeline, plan).items()
    }
    time_in_turns(steps, WARM_UP_PAIRS)
    took = time_in_turns(steps, plan.repeats)
    for mode in plan.modes:
        full, reused = took[mode, "full"].median, took[mode, "reused"].median
        tell(f"{mode}: {full * 1e3:.1f} ms a full step, {reused * 1e3:.1f} ms a reused one")

    settings: dict[int, SkipCacheConfig | None] = {1: None, **plan.caches}
    expected = plan.rounds * sum(
        took[mode, "full" if full else "reused"].median
        for mode in plan.modes
        for schedule in plan.schedules.values()
        for full in schedule
    )
    many = len(settings) * len(plan.modes) * plan.rounds
    tell(f"{many} samplings of {plan.steps} steps: about {expected:.0f} s")
    latents: dict[tuple[str, int], torch.Tensor] = {}
    samplings = {
        (mode, interval): _sampling_stopwatch(pipeline, plan, interval, cache, latents, (mode, interval))
        for interval, cache in settings.items()
        for mode, pipeline in pipelines.items()
    }
    for pipeline in pipelines.values():
        for cache in (None, next(iter(plan.caches.values()))):
            _sample(pipeline, plan, cache, WARM_UP_STEPS)
    sampled = time_in_turns(samplings, plan.rounds)
    return {
        mode: ModeResult(
            full=took[mode, "full"],
            reused=took[mode, "reused"],
            sampling={interval: sampled[mode, interval] for interval in settings},
            difference={n: _difference(latents[mode, n], latents[plan.modes[0], n]) for n in settings},
            choices=str(pipelines[mode]._acceleration or ""),
        )
        for mode in plan.modes
    }


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def plain_pipeline(plan: BenchPlan) -> SkipPipeline:
    """A pipeline with random weights and no autoencoder."""
    torch.manual_seed(0)
    model = plan.model_class(**plan.settings).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # multiplying zeros takes less power, which makes a GPU faster than it is
            torch.nn.init.normal_(parameter, std=0.02)
    return _pipeline_of(torch.nn.Module.to(model, plan.device, DTYPES[plan.dtype]), plan)


def _pipeline_of(model: SkipBackbone, plan: BenchPlan) -> SkipPipeline:
    pipeline_class = SkipLattePipeline if plan.is_video else SkipDiTPipeline
    pipeline = pipeline_class(model, vae=None, scheduler=make_scheduler(plan.sampler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipelines(plan: BenchPlan) -> dict[str, SkipPipeline]:
    """Mode -> a pipeline; all have the same weights."""
    pipelines = {"eager": plain_pipeline(plan)}
    for mode in plan.modes[1:]:
        pipelines[mode] = _pipeline_of(copy.deepcopy(pipelines["eager"].transformer), plan)
    if "compiled" in pipelines:
        pipelines["compiled"].transformer.compile()
    if "fast" in pipelines:
        pipelines["fast"].compile()
    return pipelines


def _step_stopwatches(pipeline: SkipPipeline, plan: BenchPlan) -> dict[str, Callable[[], float]]:
    """A full and a reused forward, called as the pipeline's loop calls them."""
    model, batch = pipeline.transformer, plan.input_shape[0]
    latents = torch.randn(plan.input_shape, device=plan.device, dtype=DTYPES[plan.dtype])
    labels = None if model.null_class is None else torch.zeros(batch, dtype=torch.long, device=plan.device)
    timesteps = torch.tensor([500], device=plan.device)
    inputs = latents, timesteps[0].expand(batch), labels
    step = pipeline._step_contexts(timesteps, batch if labels is None else labels, batch)

    def full() -> tuple[torch.Tensor, ...]:
        with step(0):
            return model(*inputs, return_dict=False, shallow=plan.shallow)

    features = full()[1]

    def reused() -> tuple[torch.Tensor, ...]:
        with step(0):
            return model(*inputs, return_dict=False, shallow=plan.shallow, deep_features=features)

    return {"full": lambda: timed(full, plan.device), "reused": lambda: timed(reused, plan.device)}


def _sampling_stopwatch(
    pipeline: SkipPipeline,
    plan: BenchPlan,
    interval: int,
    cache: SkipCacheConfig | None,
    latents: dict[tuple[str, int], torch.Tensor],
    name: tuple[str, int],
) -> Callable[[], float]:
    """A whole sampling, whose result goes into `latents`; also sees that it ran the steps that the plan counts."""

    def run() -> float:
        seconds, (full, reused), latents[name] = _sample(pipeline, plan, cache, plan.steps)
        planned = sum(plan.schedules[interval])
        if (full, reused) != (planned, len(plan.schedules[interval]) - planned):
            raise RuntimeError(
                f"N={interval} ran {full} full and {reused} reused steps, but {planned} full were planned."
            )
        return seconds

    return run


def _sample(
    pipeline: SkipPipeline, plan: BenchPlan, cache: SkipCacheConfig | None, steps: int
) -> tuple[float, tuple[int, int], torch.Tensor]:
    """Seconds, how many steps were full and reused, and the latents."""
    model = pipeline.transformer
    unconditional = model.config.num_classes is None
    inputs = {
        "class_labels": None if unconditional else [0] * plan.batch_size,
        "num_samples": plan.batch_size,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE_SCALE if plan.guided else 1.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "return_dict": False,
    }
    made: list[torch.Tensor] = []

    def call() -> None:
        made[:] = pipeline(**inputs)

    if cache is None:
        return timed(call, plan.device), (len(pipeline.scheduler.timesteps), 0), made[0]
    model.enable_cache(cache)
    try:
        seconds = timed(call, plan.device)
        return seconds, (model.cache_stats.full, model.cache_stats.reused), made[0]
    finally:
        model.disable_cache()
