"""The autoencoder: every way to decode a clip, and whole samples, decoded beside the next batch's steps or after."""

import time
from typing import Any

import torch
from diffusers import AutoencoderKL

from skipdit import SkipCacheConfig, SkipLattePipeline, make_scheduler
from skipdit.acceleration.undoing import recast, turn_on_compiled

from .common import Record, Setting, build, error, exact_float32, median_seconds, variant

BATCHES = 4
# Name -> dtype, channels last, compiled.
WAYS = {
    "bfloat16": (torch.bfloat16, False, False),
    "bfloat16, channels last": (torch.bfloat16, True, False),
    "float32": (torch.float32, False, False),
    "float32, channels last": (torch.float32, True, False),
    "bfloat16, channels last, compiled": (torch.bfloat16, True, True),
}
SECONDS = 30.0  # that compiling the decoder takes on a card


def autoencoder(setting: Setting, device: torch.device) -> AutoencoderKL:
    """Stable Diffusion's, with random weights; of the small preset a small one."""
    small = setting.sizes["width"] < 100
    widths = (32, 32) if small else (128, 256, 512, 512)
    torch.manual_seed(0)
    with device:
        return AutoencoderKL(
            latent_channels=4,
            block_out_channels=widths,
            layers_per_block=1 if small else 2,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            scaling_factor=0.18215,
        ).eval().requires_grad_(False)  # fmt: skip


@torch.no_grad()
def decoding(setting: Setting, device: torch.device, note: Record) -> None:
    """Seconds for all frames of a clip in every way, then seconds a clip of whole samples."""
    vae = autoencoder(setting, device)
    over = dict(setting.overrides)
    torch.manual_seed(1)
    latents = torch.randn(over["num_frames"], 4, over["sample_size"], over["sample_size"], device=device)
    reference = note.prepare("float32, exact", lambda: exact_frames(vae, latents))
    for way, (_, _, compiled) in WAYS.items():
        seconds = SECONDS if compiled and device.type == "cuda" else 0.0
        note.attempt(f"decode: {way}", lambda w=way: decode_way(vae, latents, reference, w, setting), seconds)
    pipeline = note.prepare("samples: pipeline", lambda: whole_pipeline(setting, device, vae))
    for way in ("after", "beside") if pipeline is not None else ():
        note.attempt(f"samples: {way}", lambda w=way: sample_way(pipeline, setting, w), seconds=8)


def exact_frames(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    with exact_float32():
        return vae.decode(latents, return_dict=False)[0]


def decode_way(
    vae: AutoencoderKL, latents: torch.Tensor, reference: torch.Tensor | None, way: str, setting: Setting
) -> dict[str, Any]:
    """Seconds, set-up, error (None without a reference)."""
    dtype, channels_last, compiled = WAYS[way]
    back = [recast(vae, dtype, channels_last)]
    if compiled:
        back.append(turn_on_compiled([vae.decoder]))
    try:
        began = time.monotonic()
        found = vae.decode(latents.to(dtype), return_dict=False)[0].float()
        set_up = time.monotonic() - began
        call = lambda: vae.decode(latents.to(dtype), return_dict=False)  # noqa: E731
        seconds = median_seconds(call, latents.device, max(3, setting.repeats // 4))
    finally:
        for undo in reversed(back):
            undo()
    return {"seconds": seconds, "set_up": set_up, "error": None if reference is None else error(found, reference)}


def whole_pipeline(setting: Setting, device: torch.device, vae: AutoencoderKL) -> SkipLattePipeline:
    model = variant(build(setting, device), torch.bfloat16)
    pipeline = SkipLattePipeline(model, vae, make_scheduler("ddim"))
    pipeline.compile(dtype=torch.bfloat16, blocks=False)  # what compiling gains, the other sections tell
    pipeline.transformer.enable_cache(SkipCacheConfig.preset("class-to-video"))
    return pipeline


def sample_way(pipeline: SkipLattePipeline, setting: Setting, way: str) -> dict[str, float]:
    """Seconds a clip, from labels to pixels on the host; one batch warms up."""
    from skipdit.sampling import streaming
    from skipdit.sampling.config import SampleConfig

    clips = setting.clips[0]
    config = SampleConfig(model="given", total=BATCHES * clips, batch_size=clips, steps=setting.steps)
    before = streaming.OVERLAPS
    streaming.OVERLAPS = before if way == "beside" else ()
    try:
        list(streaming.sample_indices(pipeline, range(clips), lambda index: 0, config, shows=False))
        began = time.monotonic()
        list(streaming.sample_indices(pipeline, range(BATCHES * clips), lambda index: 0, config, shows=False))
        return {"seconds": (time.monotonic() - began) / (BATCHES * clips)}
    finally:
        streaming.OVERLAPS = before
