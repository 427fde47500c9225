"""Forwards and training steps of the whole model: as it is, as `pipe.compile()` makes it, and in other ways."""

import time
from typing import Any

import torch

from skipdit import SkipLattePipeline, kernels, make_scheduler
from skipdit.acceleration.graphs import record_on_cuda
from skipdit.diffusion import training_losses
from skipdit.models import SkipBackbone
from skipdit.operations import count_operations

from .common import Record, Setting, build, error, exact_float32, median_seconds, variant

FLOAT8 = ("attention", "mlp")
EAGER, SHIPPED = "eager", "pipe.compile()"
GRAPHED = "compiled by block + kernels"  # what the tests' own CUDA graphs are put around
# Name -> kernels, compilation, float8; in the order of their weight.
WAYS: dict[str, tuple[tuple[str, ...], str | None, tuple[str, ...]]] = {
    EAGER: ((), None, ()),
    SHIPPED: ((), None, ()),  # the pipeline turns on what it chooses
    GRAPHED: (kernels.KERNELS, "blocks", ()),
    "compiled by block": ((), "blocks", ()),
    "eager + kernels": (kernels.KERNELS, None, ()),
    "compiled by block + attention kernel + float8": (("attention",), "blocks", FLOAT8),
    "compiled by block + attention kernel": (("attention",), "blocks", ()),
    "compiled by block + attention and MLP kernels": (("attention", "mlp"), "blocks", ()),
    "compiled whole + kernels": (kernels.KERNELS, "whole", ()),
}
FOUR_CLIPS = (EAGER, SHIPPED, GRAPHED)
SECONDS = {None: 5.0, "blocks": 18.0, "whole": 60.0}  # to expect on a card, set-up included


def expected_seconds(way: str, device: torch.device) -> float:
    """What must be left before a way is tried."""
    return SECONDS["blocks" if way == SHIPPED else WAYS[way][1]] if device.type == "cuda" else 0.0


def inputs_of(setting: Setting, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Latents, timesteps and labels of a forward."""
    generator = torch.Generator().manual_seed(1)
    over = dict(setting.overrides)
    shape = (batch, 4, over["num_frames"], over["sample_size"], over["sample_size"])
    latents = torch.randn(shape, generator=generator).to(device, dtype)
    labels = torch.arange(batch, device=device) % over["num_classes"]
    return latents, torch.full((batch,), 500, device=device), labels


def pipeline_of(model: SkipBackbone, way: str) -> SkipLattePipeline:
    """A pipeline without an autoencoder; of the way that ships, compiled."""
    pipeline = SkipLattePipeline(model, vae=None, scheduler=make_scheduler("ddim"))
    pipeline.set_progress_bar_config(disable=True)
    if way == SHIPPED:
        print(pipeline.compile(), flush=True)
    return pipeline


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------- forwards


def forwards(setting: Setting) -> list[tuple[int, str]]:
    """Clips and way, in the order of their weight."""
    one, four = setting.clips
    quick = [way for way in WAYS if WAYS[way][1] != "whole"]
    order = [(clips, way) for clips in (one, four) for way in (EAGER, SHIPPED)]
    order += [(clips, way) for clips, ways in ((one, quick), (four, FOUR_CLIPS), (one, WAYS)) for way in ways]
    return list(dict.fromkeys(order))


@torch.no_grad()
def forward(setting: Setting, device: torch.device, note: Record) -> None:
    """A full and a reused forward in every way, and their error against float32."""
    base = build(setting, device)
    references = {
        clips: note.prepare(f"B{2 * clips} float32", lambda c=clips: exact_output(setting, device, base, c))
        for clips in setting.clips
    }
    for clips, way in forwards(setting):
        note.attempt(
            f"B{2 * clips} {way}",
            lambda c=clips, w=way: forward_way(setting, device, base, references[c], c, w),
            seconds=expected_seconds(way, device),
        )


def exact_output(setting: Setting, device: torch.device, base: SkipBackbone, clips: int) -> torch.Tensor:
    with exact_float32():
        return base(*inputs_of(setting, 2 * clips, device, torch.float32), return_dict=False)[0]


def forward_way(
    setting: Setting, device: torch.device, base: SkipBackbone, reference: torch.Tensor | None, clips: int, way: str
) -> dict[str, Any]:
    """Seconds, set-up, operations, error (None without a reference); calls are those of a pipeline's loop."""
    model = variant(base, torch.bfloat16, *WAYS[way])
    latents, timesteps, labels = inputs_of(setting, 2 * clips, device, torch.bfloat16)
    began = time.monotonic()
    step = pipeline_of(model, way)._step_contexts(timesteps[:1], labels, len(latents))
    features = None

    def call() -> tuple[torch.Tensor, ...]:
        options = {"shallow": setting.shallow, "deep_features": features}
        with step(0):
            return model(latents, timesteps[0].expand(len(latents)), labels, return_dict=False, **options)

    result: dict[str, Any] = {}
    for name in ("full", "reused"):
        output, deep = (tensor.clone() for tensor in call())
        wait(device)
        operations = count_operations(model, latents.shape, setting.shallow, name == "reused").total
        result[name] = {"set_up": time.monotonic() - began, "operations": operations}
        result[name]["seconds"] = median_seconds(call, device, setting.repeats)
        if way == GRAPHED and device.type == "cuda":
            result[name]["graph_seconds"] = median_seconds(record_on_cuda(call), device, setting.repeats)
        if name == "full":
            result["error"] = None if reference is None else error(output, reference)
        features, began = deep, time.monotonic()
    return result


# ---------------------------------------------------------------------- training


def training(setting: Setting, device: torch.device, note: Record) -> None:
    """Clips a second: forward, backward and AdamW, bf16 autocast over float32 weights, latents ready.

    In train.py the settings `kernels` and `compile` turn these on; the latter compiles the network as a whole.
    """
    base = build(setting, device)
    for way in (EAGER, "eager + kernels", GRAPHED, "compiled by block"):
        note.attempt(
            way,
            lambda w=way: training_way(setting, device, variant(base, torch.float32, *WAYS[w])),
            seconds=expected_seconds(way, device),
        )
    for only in kernels.KERNELS[:2]:
        note.attempt(
            f"compiled by block + {only} kernel",
            lambda o=only: training_way(setting, device, variant(base, torch.float32, (o,), "blocks")),
            seconds=expected_seconds(GRAPHED, device),
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
    wait(device)
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
