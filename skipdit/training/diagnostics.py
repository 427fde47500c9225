"""What a run tells of itself beside its loss: error by timestep, share of the hardware's rate, what the skips do."""

import resource
import sys
import time

import torch
from accelerate import Accelerator
from torch import nn

from ..diffusion import Objective, add_noise
from ..models import SkipBackbone, SkipLatteTransformer3DModel
from ..operations import count_operations

__all__ = [
    "BINS",
    "Speed",
    "TimestepBins",
    "feature_similarity",
    "matrix_rate",
    "memory_gib",
    "skip_norms",
    "training_operations",
]

BINS = 10


class TimestepBins:
    """Mean squared error by tenth of the timesteps, over all steps and processes since the last reading."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(2, BINS, device=device)  # sum of errors, count

    def add(self, timestep: torch.Tensor, errors: torch.Tensor, valid: torch.Tensor) -> None:
        """Take in the items of a pass, each [B]; timesteps in 0..999."""
        bins = timestep * BINS // 1000
        self.totals[0].index_add_(0, bins, errors.detach().float() * valid)
        self.totals[1].index_add_(0, bins, valid)

    def read(self, totals: torch.Tensor) -> dict[str, float]:
        """Means by "t<first>-<last>" of totals summed over the processes; empty bins are left out."""
        self.totals.zero_()
        sums, counts = totals.tolist()
        width = 1000 // BINS
        return {
            f"t{i * width:03d}-{(i + 1) * width - 1:03d}": sums[i] / counts[i] for i in range(BINS) if counts[i] > 0
        }


def training_operations(model: SkipBackbone) -> float:
    """Floating-point operations of a forward and a backward pass of one clip.

    The backward pass takes twice the forward's; what gradient checkpointing computes again is not counted.
    """
    return 3.0 * count_operations(model, (1, *_latent_shape(model))).total


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of a few: what utilisation is measured against."""
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        float((one @ other)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


class Speed:
    """How fast a run trains, and which share of what the hardware could that is.

    Attributes:
        matrix_rate: What the device reaches in a large matrix product, in operations a second.
        clip_operations: Of a forward and a backward pass of one clip.
    """

    def __init__(self, accelerator: Accelerator, model: SkipBackbone):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        with torch.random.fork_rng(devices=[]):
            self.matrix_rate = matrix_rate(accelerator.device, dtype)
        self.clip_operations = training_operations(model)
        self.processes = accelerator.num_processes

    def rates(self, clips_per_second: float) -> dict[str, float]:
        """ "tflops" and "mfu" of each process, from the clips of all of them."""
        rate = self.clip_operations * clips_per_second / self.processes
        return {"tflops": rate / 1e12, "mfu": rate / self.matrix_rate}


def memory_gib(device: torch.device) -> float:
    """Most memory used so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@torch.no_grad()
def skip_norms(model: SkipBackbone) -> list[float]:
    """Spectral norm of each long skip's linear layer, innermost first: how much it can stretch what it joins."""
    return [
        float(torch.linalg.matrix_norm(layer.weight.float(), ord=2))
        for layer in model.skip_linears.modules()
        if isinstance(layer, nn.Linear)
    ]


@torch.no_grad()
def feature_similarity(
    model: SkipBackbone,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    objective: Objective,
    steps: int = 50,
    seed: int = 0,
) -> list[float]:
    """How little deep features change between neighbouring sampling steps, the property that Skip-Cache lives on.

    Deep features are the output of the last unit but one, which a reused step with shallow=1 replaces by that of an
    earlier step; vanilla models have them too. The inputs are the same latents under the same noise at the timesteps
    of a sampler of so many steps.

    Args:
        latents: Clean, scaled [B, C, (F,) h, w].
        class_labels: [B], or None.

    Returns:
        Cosine similarities, mean over tokens and samples, from the noisiest step on: steps - 1 of them.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    last = model.blocks[(model.num_units - 1) * model.blocks_per_unit - 1]
    seen: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    was_training = model.training
    model.eval()
    similarities = []
    try:
        for timestep in torch.linspace(999, 0, steps).round().long().tolist():
            at = torch.full((len(latents),), timestep, device=latents.device)
            model(add_noise(latents, noise, at, objective.zero_terminal_snr), at, class_labels)
            if len(seen) == 2:
                similarities.append(float(nn.functional.cosine_similarity(*seen, dim=-1).mean()))
                seen.pop(0)
    finally:
        handle.remove()
        model.train(was_training)
    return similarities


def _latent_shape(model: SkipBackbone) -> tuple[int, ...]:
    """[C, (F,) h, w] of one sample of the configured size."""
    cfg = model.config
    sides = (cfg.sample_size,) * 2 if isinstance(cfg.sample_size, int) else tuple(cfg.sample_size)
    frames = (cfg.num_frames,) if isinstance(model, SkipLatteTransformer3DModel) else ()
    return (cfg.in_channels, *frames, *sides)
