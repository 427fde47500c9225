"""Forwards, samplings and training steps of the whole model, plain and in every faster way."""

import time
from collections.abc import Callable
from typing import Any

import torch

from skipdit import SkipCacheConfig, SkipLattePipeline, kernels, make_scheduler
from skipdit.acceleration.graphs import record_on_cuda
from skipdit.diffusion import training_losses
from skipdit.models import SkipBackbone
from skipdit.operations import count_operations, speedup_bound
from skipdit.pipelines import guide

from .common import Record, Setting, build, error, median_seconds, timed, variant

GUIDANCE_SCALE = 7.0
FLOAT8 = ("attention", "mlp")
# Name -> kernels, compilation, float8. The plain ones first: a kernel that breaks the device takes nothing else along.
WAYS: dict[str, tuple[tuple[str, ...], str | None, tuple[str, ...]]] = {
    "eager": ((), None, ()),
    "compiled by block": ((), "blocks", ()),
    "eager + kernels": (kernels.KERNELS, None, ()),
    "compiled by block + kernels": (kernels.KERNELS, "blocks", ()),
    "compiled by block + attention kernel": (("attention",), "blocks", ()),
    "compiled by block + attention and MLP kernels": (("attention", "mlp"), "blocks", ()),
    "compiled by block + attention kernel + float8": (("attention",), "blocks", FLOAT8),
    "compiled whole + kernels": (kernels.KERNELS, "whole", ()),
    "compiled whole": ((), "whole", ()),
}
GRAPHED = "compiled by block + kernels"  # what CUDA graphs are put around
SECONDS = {None: 5.0, "blocks": 15.0, "whole": 60.0}  # to expect on a card, set-up included


def expected_seconds(compiled: str | None, device: torch.device) -> float:
    """What must be left before a way is tried."""
    return SECONDS[compiled] if device.type == "cuda" else 0.0


def inputs_of(setting: Setting, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Latents, timesteps and labels of a forward."""
    generator = torch.Generator().manual_seed(1)
    over = dict(setting.overrides)
    shape = (batch, 4, over["num_frames"], over["sample_size"], over["sample_size"])
    latents = torch.randn(shape, generator=generator).to(device, dtype)
    labels = torch.arange(batch, device=device) % over["num_classes"]
    return latents, torch.full((batch,), 500, device=device), labels


# ---------------------------------------------------------------------- forwards


@torch.no_grad()
def forward(setting: Setting, device: torch.device, note: Record) -> None:
    """A full and a reused forward in every way, and their error against float32."""
    base = build(setting, device)
    references = {}
    for clips in setting.clips:
        inputs = inputs_of(setting, 2 * clips, device, torch.float32)
        references[clips] = base(*inputs, return_dict=False, shallow=setting.shallow)
    quick = [(clips, way) for clips in setting.clips for way in WAYS if WAYS[way][1] != "whole"]
    slow = [(setting.clips[0], way) for way in WAYS if WAYS[way][1] == "whole"]
    for clips, way in quick + slow:
        note.attempt(
            f"B{2 * clips} {way}",
            lambda c=clips, w=way: forward_way(setting, device, base, references[c], c, w),
            seconds=expected_seconds(WAYS[way][1], device),
        )


def forward_way(
    setting: Setting,
    device: torch.device,
    base: SkipBackbone,
    reference: tuple[torch.Tensor, torch.Tensor],
    clips: int,
    way: str,
) -> dict[str, Any]:
    """Seconds, set-up, error, operations; the way that is GRAPHED also under a CUDA graph."""
    model = variant(base, torch.bfloat16, *WAYS[way])
    inputs = inputs_of(setting, 2 * clips, device, torch.bfloat16)
    features = reference[1].to(torch.bfloat16)

    def full() -> tuple[torch.Tensor, ...]:
        return model(*inputs, return_dict=False, shallow=setting.shallow)

    def reused() -> tuple[torch.Tensor, ...]:
        return model(*inputs, return_dict=False, shallow=setting.shallow, deep_features=features)

    result: dict[str, Any] = {}
    for name, call in (("full", full), ("reused", reused)):
        began = time.monotonic()
        output = call()[0].clone()
        _wait(device)
        reuse = name == "reused"
        operations = count_operations(model, inputs[0].shape, setting.shallow, reuse).total
        result[name] = {"set_up": time.monotonic() - began, "operations": operations}
        result[name]["seconds"] = median_seconds(call, device, setting.repeats)
        if not reuse:
            result["error"] = error(output, reference[0])
        if way == GRAPHED and device.type == "cuda":
            result[name]["graph_seconds"] = median_seconds(record_on_cuda(call), device, setting.repeats)
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------- samplings


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


def sampling(setting: Setting, device: torch.device, note: Record) -> None:
    """DDIM uncached, N=2 and N=4, from labels to latents, and how far the latents are from the eager ones."""
    base = build(setting, device)
    for clips in setting.clips[:1]:
        noise = inputs_of(setting, clips, device, torch.float32)[0]
        references = {}
        ways = [("eager", False), ("compiled by block", False), (GRAPHED, False), (GRAPHED, True)]
        ways.append(("compiled by block + attention kernel + float8", True))
        for way, graphed in ways:
            note.attempt(
                f"{clips} clip{'s' * (clips > 1)}, {way}{', CUDA graphs' * graphed}",
                lambda w=way, g=graphed, c=clips, z=noise, r=references: sampling_way(
                    setting, device, variant(base, torch.bfloat16, *WAYS[w]), c, z, g, r
                ),
                seconds=expected_seconds(WAYS[way][1], device),
            )
        note.attempt(
            f"{clips} clip{'s' * (clips > 1)}, pipe.compile()",
            lambda c=clips, z=noise, r=references: sampling_way(
                setting, device, variant(base, torch.bfloat16), c, z, False, r, compiled=True
            ),
            seconds=expected_seconds("blocks", device),
        )


def sampling_way(
    setting: Setting,
    device: torch.device,
    model: SkipBackbone,
    clips: int,
    noise: torch.Tensor,
    graphed: bool,
    references: dict[int, torch.Tensor],
    compiled: bool = False,
) -> dict[str, Any]:
    """Interval (1 is no cache) -> steps, seconds, speed-up, bound, error; eager's latents go into `references`."""
    if graphed:
        runs = graph_runs(model, setting, clips, noise, device)
    else:
        runs = pipeline_runs(model, setting, clips, noise, compiled)
    shape = (2 * clips, *noise.shape[1:])
    counts = [count_operations(model, shape, setting.shallow, reused).total for reused in (False, True)]
    result: dict[str, Any] = {}
    for interval, (schedule, run) in runs.items():
        latents = run()
        seconds = sorted(timed(run, device) for _ in range(max(3, setting.repeats // 5)))
        references.setdefault(interval, latents)
        result[str(interval)] = {
            "full": sum(schedule),
            "reused": len(schedule) - sum(schedule),
            "seconds": seconds[len(seconds) // 2],
            "least": seconds[0],
            "most": seconds[-1],
            "bound": speedup_bound(schedule, counts[1] / counts[0]),
            "difference": error(latents, references[interval]),
        }
    for found in result.values():
        found["speedup"] = result["1"]["seconds"] / found["seconds"]
    return result


def settings_of_cache(setting: Setting) -> dict[int, SkipCacheConfig | None]:
    return {1: None, **{n: SkipCacheConfig.preset("class-to-video", interval=n) for n in (2, 4)}}


def schedule_of(setting: Setting, cache: SkipCacheConfig | None) -> list[bool]:
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(setting.steps)
    timesteps = scheduler.timesteps.tolist()
    return [True] * len(timesteps) if cache is None else cache.schedule(timesteps)


def pipeline_runs(
    model: SkipBackbone, setting: Setting, clips: int, noise: torch.Tensor, compiled: bool = False
) -> dict[int, tuple[list[bool], Callable[[], torch.Tensor]]]:
    pipeline = SkipLattePipeline(model, vae=None, scheduler=make_scheduler("ddim"))
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        print(pipeline.compile(), flush=True)
    inputs = {
        "class_labels": list(range(clips)),
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

    return {
        interval: (schedule_of(setting, cache), lambda c=cache: run(c))
        for interval, cache in settings_of_cache(setting).items()
    }


def graph_runs(
    model: SkipBackbone, setting: Setting, clips: int, noise: torch.Tensor, device: torch.device
) -> dict[int, tuple[list[bool], Callable[[], torch.Tensor]]]:
    with torch.no_grad():
        sampler = GraphedSampler(model, setting, clips, device)
    runs = {}
    for interval, cache in settings_of_cache(setting).items():
        schedule = schedule_of(setting, cache)
        runs[interval] = schedule, lambda s=schedule: sampler(noise, s)
    return runs


# ---------------------------------------------------------------------- training


def training(setting: Setting, device: torch.device, note: Record) -> None:
    """Clips a second: forward, backward and AdamW, bf16 autocast over float32 weights, latents ready."""
    base = build(setting, device)
    for way in ("eager", "compiled by block", "compiled by block + kernels", "eager + kernels"):
        note.attempt(
            way,
            lambda w=way: training_way(setting, device, variant(base, torch.float32, *WAYS[w])),
            seconds=expected_seconds(WAYS[way][1], device),
        )
    for only in kernels.KERNELS[:2]:
        note.attempt(
            f"compiled by block + {only} kernel",
            lambda o=only: training_way(setting, device, variant(base, torch.float32, (o,), "blocks")),
            seconds=expected_seconds("blocks", device),
        )


def training_way(setting: Setting, device: torch.device, model: SkipBackbone) -> dict[str, float]:
    model.train().requires_grad_(True)
    # A rate of 0: every way sees the same weights at every step, so the losses can be compared.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    latents, timestep, labels = inputs_of(setting, setting.training_batch, device, torch.float32)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).to(device)
    found = {}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = training_losses(model, latents, timestep, noise, labels)
        loss = losses["loss"].mean()
        loss.backward()
        found["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["loss"] = loss.detach()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    step()
    _wait(device)
    set_up = time.monotonic() - began
    seconds = median_seconds(step, device, max(2, setting.repeats // 2))
    operations = 3 * count_operations(model, latents.shape).total
    return {
        "set_up": set_up,
        "seconds": seconds,
        "clips_per_second": len(latents) / seconds,
        "operations": operations,
        "loss": float(found["loss"]),
        "grad_norm": float(found["norm"]),
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
    }
