"""Whole samplings up to the latents, and how long they take to start."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from skipdit import SkipCacheConfig, SkipLattePipeline, make_scheduler
from skipdit.acceleration.graphs import record_on_cuda
from skipdit.models import SkipBackbone
from skipdit.operations import count_operations, speedup_bound
from skipdit.pipelines import guide

from .common import Record, Setting, build, error, timed, variant
from .models import EAGER, GRAPHED, SHIPPED, WAYS, expected_seconds, inputs_of, pipeline_of, wait

GUIDANCE_SCALE = 7.0
ROUNDS = 3  # timed samplings of a kind; the median counts
START = 25.0  # seconds that a process needs to start and to compile from what is kept
Runs = dict[int, tuple[list[bool], Callable[[], torch.Tensor]]]  # interval, 1 without cache -> full steps, sampling


def sampling(setting: Setting, device: torch.device, note: Record) -> None:
    """DDIM uncached, N=2 and N=4, from labels to latents, and how far the latents are from the eager ones."""
    base = build(setting, device)
    references: dict[int, torch.Tensor] = {}
    one, four = setting.clips

    def attempt(clips: int, way: str, graphed: bool = False, intervals: tuple[int, ...] = (1, 2, 4)) -> None:
        name = f"{clips} clip{'s' * (clips > 1)}, {way}{', CUDA graphs' * graphed}"
        known = references if clips == one else {}
        measure = lambda: sampling_way(setting, device, base, clips, way, graphed, intervals, known)  # noqa: E731
        note.attempt(name, measure, seconds=expected_seconds(way, device))

    attempt(one, EAGER)
    attempt(one, SHIPPED)
    seconds = START if device.type == "cuda" else 0.0
    note.attempt("second start", lambda: second_start(setting, device), seconds=seconds)
    attempt(four, SHIPPED, intervals=(1, 2))
    attempt(one, GRAPHED, graphed=True)
    attempt(one, "compiled by block + attention kernel + float8", graphed=True)
    attempt(one, GRAPHED)


def sampling_way(
    setting: Setting,
    device: torch.device,
    base: SkipBackbone,
    clips: int,
    way: str,
    graphed: bool,
    intervals: tuple[int, ...],
    references: dict[int, torch.Tensor],
) -> dict[str, Any]:
    """Interval (1 is no cache) -> steps, seconds, speed-up, bound and, where eager's latents are known, difference.

    "set_up" is the first call; the very first one's, and what comes before it. Eager's latents go into `references`.
    """
    model = variant(base, torch.bfloat16, *WAYS[way])
    noise = inputs_of(setting, clips, device, torch.float32)[0]
    began = time.monotonic()
    if graphed:
        runs = graph_runs(model, setting, noise)
    else:
        runs = pipeline_runs(pipeline_of(model, way), setting, noise)
    shape = (2 * clips, *noise.shape[1:])
    costs = [count_operations(model, shape, setting.shallow, reused).total for reused in (False, True)]
    result: dict[str, Any] = {}
    for interval in intervals:
        schedule, run = runs[interval]
        latents = run()
        wait(device)
        set_up = time.monotonic() - began
        if way == EAGER:
            references[interval] = latents
        result[str(interval)] = {
            "set_up": set_up,
            "full": sum(schedule),
            "reused": len(schedule) - sum(schedule),
            **median_and_span([timed(run, device) for _ in range(ROUNDS)]),
            "bound": speedup_bound(schedule, costs[1] / costs[0]),
            "difference": error(latents, references[interval]) if interval in references else None,
        }
        began = time.monotonic()
    for found in result.values():
        found["speedup"] = result["1"]["seconds"] / found["seconds"]
    return result


def median_and_span(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"seconds": ordered[len(ordered) // 2], "least": ordered[0], "most": ordered[-1]}


# ---------------------------------------------------------------------- starting


def second_start(setting: Setting, device: torch.device) -> dict[str, float]:
    """Seconds of `pipe.compile()` and its first call in another process, which finds what this one has compiled."""
    command = [sys.executable, "-m", "gpu.sampling", json.dumps(asdict(setting)), str(device)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    if ran.returncode:
        raise RuntimeError(f"the second process failed: {ran.stderr.strip()[-1500:]}")
    return {"seconds": float(ran.stdout.split()[-1])}


def start(setting: Setting, device: torch.device) -> float:
    """In the other process: the same seconds as the "set_up" of `sampling_way`."""
    model = variant(build(setting, device), torch.bfloat16)
    noise = inputs_of(setting, setting.clips[0], device, torch.float32)[0]
    began = time.monotonic()
    pipeline_runs(pipeline_of(model, SHIPPED), setting, noise)[1][1]()
    wait(device)
    return time.monotonic() - began


# ---------------------------------------------------------------------- two ways to sample


def settings_of_cache(setting: Setting) -> dict[int, SkipCacheConfig | None]:
    return {1: None, **{n: SkipCacheConfig.preset("class-to-video", interval=n) for n in (2, 4)}}


def schedule_of(setting: Setting, cache: SkipCacheConfig | None) -> list[bool]:
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(setting.steps)
    timesteps = scheduler.timesteps.tolist()
    return [True] * len(timesteps) if cache is None else cache.schedule(timesteps)


def pipeline_runs(pipeline: SkipLattePipeline, setting: Setting, noise: torch.Tensor) -> Runs:
    model = pipeline.transformer
    inputs = {
        "class_labels": list(range(len(noise))),
        "num_inference_steps": setting.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "latent",
        "latents": noise,
    }

    def run(cache: SkipCacheConfig | None) -> torch.Tensor:
        if cache is None:
            return pipeline(**inputs).frames
        model.enable_cache(cache)
        try:
            return pipeline(**inputs).frames
        finally:
            model.disable_cache()

    caches = settings_of_cache(setting).items()
    return {interval: (schedule_of(setting, cache), lambda c=cache: run(c)) for interval, cache in caches}


def graph_runs(model: SkipBackbone, setting: Setting, noise: torch.Tensor) -> Runs:
    with torch.no_grad():
        sampler = GraphedSampler(model, setting, len(noise), noise.device)
    runs = {}
    for interval, cache in settings_of_cache(setting).items():
        schedule = schedule_of(setting, cache)
        runs[interval] = schedule, lambda s=schedule: sampler(noise, s)
    return runs


class GraphedSampler:
    """DDIM with guidance and Skip-Cache in which the host only launches: one CUDA graph for each kind of step.

    Everything that changes from step to step lies on the device: the timestep and the two coefficients of DDIM (Song
    et al. 2021, eq. 12, as prev = a x + b noise) come from a table. Without CUDA the steps run as they are.
    """

    def __init__(self, model: SkipBackbone, setting: Setting, clips: int, device: torch.device):
        self.model, self.shallow = model, setting.shallow
        scheduler = make_scheduler("ddim")
        scheduler.set_timesteps(setting.steps)
        self.timesteps = scheduler.timesteps.tolist()
        table = [self._coefficients(*scheduler._alphas(timestep)) for timestep in self.timesteps]
        self.table = torch.tensor(table, dtype=torch.float32, device=device)
        self.times = torch.tensor(self.timesteps, device=device)
        latents, _, labels = inputs_of(setting, clips, device, torch.float32)
        self.latents, self.channels = latents, latents.shape[1]
        self.labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
        self.timestep, self.coefficients = self.times[:1].clone(), self.table[0].clone()
        cfg = model.config
        tokens = (cfg.num_frames, (cfg.sample_size // cfg.patch_size) ** 2, cfg.hidden_size)
        self.features = torch.zeros(2 * clips, *tokens, dtype=model.dtype, device=device)
        if device.type == "cuda":
            self.full, self.reused = record_on_cuda(self._full), record_on_cuda(self._reused)
        else:
            self.full, self.reused = self._full, self._reused

    @staticmethod
    def _coefficients(alpha: float, following: float) -> tuple[float, float]:
        of_latents = (following / alpha) ** 0.5
        return of_latents, (1 - following) ** 0.5 - of_latents * (1 - alpha) ** 0.5

    def _step(self, features: torch.Tensor | None) -> torch.Tensor:
        doubled = torch.cat([self.latents, self.latents]).to(self.model.dtype)
        timestep = self.timestep.expand(len(doubled))
        output, features = self.model(
            doubled, timestep, self.labels, return_dict=False, shallow=self.shallow, deep_features=features
        )
        noise = guide(output.float(), GUIDANCE_SCALE, self.channels)[:, : self.channels]
        self.latents.copy_(self.coefficients[0] * self.latents + self.coefficients[1] * noise)
        return features

    def _full(self) -> None:
        self.features.copy_(self._step(None))

    def _reused(self) -> None:
        self._step(self.features)

    @torch.no_grad()
    def __call__(self, noise: torch.Tensor, schedule: list[bool]) -> torch.Tensor:
        """Latents of the samples; `schedule` says which steps are full."""
        self.latents.copy_(noise)
        for index, full in enumerate(schedule):
            self.timestep.copy_(self.times[index : index + 1])
            self.coefficients.copy_(self.table[index])
            (self.full if full else self.reused)()
        return self.latents.clone()


if __name__ == "__main__":
    print(start(Setting(**json.loads(sys.argv[1])), torch.device(sys.argv[2])))
