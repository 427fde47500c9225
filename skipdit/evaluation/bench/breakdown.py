"""Where the time of a step goes: every part by itself at its real shape, beside what the hardware would allow.

The limit of a part is the larger of its operations by the matrix rate and its bytes by the memory rate, both measured
in the same run. Bytes are those of tensors that must be in memory between matrix products: each product reads its
inputs and weights and writes its output once, each norm and gate reads and writes the hidden states once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ...kernels import gate_residual, norm_modulate
from ...models import SkipBackbone
from ...models.layers import NORM_EPS, Block
from ...operations import TIMESTEP_FREQUENCIES
from ...pipelines import SkipPipeline, guide
from ...timing import timed
from ...weights import DTYPES
from .measure import Timing, enough_memory, plain_pipeline, time_in_turns
from .plan import BenchPlan

__all__ = ["Breakdown", "Part", "make_parts", "measure_breakdown", "measure_rates"]

FRAMES_AT_ONCE = 16  # that the autoencoder decodes, as the pipelines do by default
GUIDANCE_SCALE = 4.0
PRODUCTS = ("convolution", "addmm", "mm", "bmm", "_scaled_dot_product", "_native_multi_head_attention")


@dataclass(frozen=True)
class Part:
    """One kind of work.

    Attributes:
        name: For the table.
        full, reused: How often a full and a reused step do it; neither: once for all samples, at the end.
        run: Does it `times` times.
        operations: Of one time, multiply and add as two; matrix products and convolutions only.
        moved: Bytes of one time.
        times: See `run`.
    """

    name: str
    full: int
    reused: int
    run: Callable[[], object]
    operations: int
    moved: int
    times: int = 1


@dataclass(frozen=True)
class Breakdown:
    """What was found.

    Attributes:
        matrix, memory: Operations and bytes a second of a large product and a large copy in this run.
        parts: What was measured.
        took: Name -> seconds of one time.
    """

    matrix: float
    memory: float
    parts: list[Part]
    took: dict[str, Timing]

    def limit(self, part: Part) -> float:
        """Seconds of one time that the rates allow."""
        return max(part.operations / self.matrix, part.moved / self.memory)


@torch.no_grad()
def measure_breakdown(plan: BenchPlan) -> Breakdown:
    """Measure the rates and every part of the plain path, in turns.

    Raises:
        UserError: The device runs out of memory.
    """
    with enough_memory(plan):
        matrix, memory = measure_rates(plan.device, DTYPES[plan.dtype])
        parts = make_parts(plan, plain_pipeline(plan))
        stopwatches = {part.name: _stopwatch(part, plan.device) for part in parts}
        time_in_turns(stopwatches, 1)
        return Breakdown(matrix, memory, parts, time_in_turns(stopwatches, max(plan.repeats, 3)))


def _stopwatch(part: Part, device: torch.device) -> Callable[[], float]:
    """Seconds of one time; on a card of several in a row, so that the host is ahead as it is in a forward."""
    calls = 10 if device.type == "cuda" and part.times == 1 else 1

    def run() -> None:
        for _ in range(calls):
            part.run()

    return lambda: timed(run, device) / (calls * part.times)


def measure_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy, read and write counted."""
    on_card = device.type == "cuda"
    side, count = (8192, 2**29) if on_card else (1024, 2**24)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    stopwatches = {
        "matrix": lambda: timed(lambda: left @ right, device),
        "memory": lambda: timed(lambda: target.copy_(source), device),
    }
    time_in_turns(stopwatches, 2)
    took = time_in_turns(stopwatches, 7)
    return 2 * side**3 / took["matrix"].median, 8 * count / took["memory"].median


# ---------------------------------------------------------------------- the parts


def make_parts(plan: BenchPlan, pipeline: SkipPipeline) -> list[Part]:
    """The parts of a step in the order of its work, and the autoencoder where the plan has one."""
    model, shape, dtype = pipeline.transformer, plan.input_shape, DTYPES[plan.dtype]
    latents = torch.randn(shape, device=plan.device, dtype=dtype)
    parts = [*_embeddings(model, plan, latents), *_block_parts(model, plan), _fusion(model, plan), _final(model, plan)]
    parts.append(_sampler(pipeline, plan))
    if plan.vae is not None:
        parts.append(_autoencoder(plan))
    return parts


def _sizes(model: SkipBackbone, plan: BenchPlan) -> tuple[tuple[int, ...], int, int]:
    """Shape of the hidden states without their width, that is [B, (F,) P]; their number; bytes of all of them."""
    shape, patch = plan.input_shape, model.config.patch_size
    axes = (*((shape[0], shape[2]) if plan.is_video else shape[:1]), shape[-2] * shape[-1] // patch**2)
    tokens = torch.Size(axes).numel()
    return axes, tokens, tokens * model.config.hidden_size * DTYPES[plan.dtype].itemsize


def _weights(*modules: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _hidden(model: SkipBackbone, plan: BenchPlan) -> torch.Tensor:
    axes, _, _ = _sizes(model, plan)
    return torch.randn(*axes, model.config.hidden_size, device=plan.device, dtype=DTYPES[plan.dtype])


def _embeddings(model: SkipBackbone, plan: BenchPlan, latents: torch.Tensor) -> list[Part]:
    """Patches, positions, timestep and label; and what adaLN makes of the latter in every block."""
    axes, tokens, values = _sizes(model, plan)
    batch, dim, blocks = axes[0], model.config.hidden_size, model.config.depth
    pictures = latents.transpose(1, 2).flatten(0, 1).contiguous() if plan.is_video else latents
    rows, columns = model._grid(pictures.shape[-2:])
    timestep = torch.full((batch,), 500, device=plan.device)
    labels = None if model.null_class is None else torch.zeros(batch, dtype=torch.long, device=plan.device)

    def condition() -> torch.Tensor:
        return model.t_embedder(timestep) + model.embed_labels(labels, (batch,))

    def embed() -> None:
        model.x_embedder(pictures) + model.patch_positions(rows, columns)
        condition()

    conditioning = condition().reshape(batch, *(1,) * (len(axes) - 1), dim)
    in_patch = model.config.in_channels * model.config.patch_size**2
    return [
        Part(
            "embedding", 1, 1, embed,
            2 * tokens * in_patch * dim + 2 * batch * (TIMESTEP_FREQUENCIES + dim) * dim,
            2 * latents.nbytes + 3 * values + _weights(model.x_embedder, model.t_embedder),
        ),
        Part(
            "modulation (adaLN)", blocks, _reused_blocks(model, plan),
            lambda: model.blocks[0].adaLN_modulation(conditioning),
            12 * batch * dim * dim, _weights(model.blocks[0].adaLN_modulation),
        ),
    ]  # fmt: skip


def _reused_blocks(model: SkipBackbone, plan: BenchPlan) -> int:
    return 2 * plan.shallow * model.blocks_per_unit


def _block_parts(model: SkipBackbone, plan: BenchPlan) -> list[Part]:
    """Norm, sub-layer, gate and residual: attention over patches, over frames, and the MLP."""
    axes, tokens, values = _sizes(model, plan)
    block, x, dim = model.blocks[0], _hidden(model, plan), model.config.hidden_size
    shape = (axes[0], *(1,) * (len(axes) - 1), 6 * dim)
    vectors = torch.randn(shape, device=plan.device, dtype=x.dtype).chunk(6, dim=-1)
    hidden = block.mlp.fc1.out_features
    reused = _reused_blocks(model, plan)

    def attention(name: str, axis: int, length: int, share: int) -> Part:
        return Part(
            name, model.config.depth // share, reused // share, lambda: _attend(block, x, vectors, axis),
            8 * tokens * dim * dim + 4 * tokens * length * dim, 15 * values + _weights(block.attn),
        )  # fmt: skip

    if plan.is_video:
        both = [
            attention("spatial attention", -2, axes[-1], 2),
            attention("temporal attention", -3, axes[-2], 2),
        ]
    else:
        both = [attention("spatial attention", -2, axes[-1], 1)]
    return [
        *both,
        Part(
            "MLP", model.config.depth, reused, lambda: _feed(block, x, vectors), 4 * tokens * dim * hidden,
            7 * values + 2 * values * hidden // dim + _weights(block.mlp),
        ),
    ]  # fmt: skip


def _attend(block: Block, x: torch.Tensor, vectors: tuple[torch.Tensor, ...], axis: int) -> torch.Tensor:
    shift, scale, gate = vectors[:3]
    return gate_residual(x, gate, block.attn(norm_modulate(x, shift, scale, NORM_EPS), axis))


def _feed(block: Block, x: torch.Tensor, vectors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    shift, scale, gate = vectors[3:]
    return gate_residual(x, gate, block.mlp(norm_modulate(x, shift, scale, NORM_EPS)))


def _fusion(model: SkipBackbone, plan: BenchPlan) -> Part:
    _, tokens, values = _sizes(model, plan)
    x, skip, dim = _hidden(model, plan), _hidden(model, plan), model.config.hidden_size
    return Part(
        "skip fusion", model.num_units // 2, plan.shallow, lambda: model.fuse_skip(0, x, skip),
        4 * tokens * dim * dim, 7 * values + _weights(model.skip_norms[0], model.skip_linears[0]),
    )  # fmt: skip


def _final(model: SkipBackbone, plan: BenchPlan) -> Part:
    axes, tokens, values = _sizes(model, plan)
    x, layer, dim = _hidden(model, plan), model.final_layer, model.config.hidden_size
    conditioning = torch.randn(axes[0], *(1,) * (len(axes) - 1), dim, device=plan.device, dtype=x.dtype)
    out = layer.linear.out_features
    return Part(
        "final layer", 1, 1, lambda: layer(x, conditioning), 4 * axes[0] * dim * dim + 2 * tokens * dim * out,
        3 * values + tokens * out * x.element_size() + _weights(layer),
    )  # fmt: skip


def _sampler(pipeline: SkipPipeline, plan: BenchPlan) -> Part:
    """Guidance and the scheduler's step, in float32: a whole trajectory, for some schedulers keep what came before."""
    scheduler, channels = pipeline.scheduler, plan.input_shape[1]
    latents = torch.randn(plan.sample_shape, device=plan.device)
    outputs = channels * (2 if pipeline.transformer.config.learn_sigma else 1)
    prediction = torch.randn(plan.input_shape[0], outputs, *plan.input_shape[2:], device=plan.device)

    def run() -> None:
        scheduler.set_timesteps(plan.steps)
        x = latents
        for timestep in scheduler.timesteps:
            noise = guide(prediction, GUIDANCE_SCALE, channels) if plan.guided else prediction
            noise = noise if pipeline._takes_variance() else noise[:, :channels]
            x = scheduler.step(noise, timestep, x, return_dict=False)[0]

    moved = prediction.nbytes // outputs * channels + 2 * latents.nbytes
    return Part("sampler", 1, 1, run, 0, moved, times=len(plan.schedules[1]))


# ---------------------------------------------------------------------- the autoencoder


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that products and convolutions read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1].startswith(PRODUCTS):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
        return result


def _autoencoder(plan: BenchPlan) -> Part:
    """Decoding a few frames at a time."""
    dtype, shape = DTYPES[plan.dtype], plan.sample_shape
    frames = shape[0] * (shape[2] if plan.is_video else 1)
    at_once = min(FRAMES_AT_ONCE, frames)
    inputs = at_once, shape[1], *shape[-2:]
    with torch.device("meta"):
        like = torch.nn.Module.to(AutoencoderKL(**plan.vae), dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _Traffic() as traffic:
            like.decode(torch.empty(inputs, dtype=dtype), return_dict=False)
    vae = torch.nn.Module.to(AutoencoderKL(**plan.vae).eval().requires_grad_(False), plan.device, dtype)
    latents = torch.randn(inputs, device=plan.device, dtype=dtype)

    @torch.no_grad()
    def run() -> None:
        for _ in range(-(-frames // at_once)):
            vae.decode(latents, return_dict=False)

    many = -(-frames // at_once)
    return Part("VAE, all frames", 0, 0, run, many * counter.get_total_flops(), many * traffic.moved)
