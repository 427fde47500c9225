"""Randomness of a training step: a function of (seed, step, place in the global batch) and nothing else.

So it is the same for any number of processes, workers and accumulated passes, and after a resume; and
whatever else draws random numbers (a preview, say) cannot disturb it.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["StepNoise", "draw_noise", "generator_for"]


class StepNoise(NamedTuple):
    """What the samples of one pass draw; B of them.

    Attributes:
        timestep: [B], integers 0..999, uniform.
        dropout: [B, labels], uniform in [0, 1): below the model's `class_dropout_prob`, the null class is the label.
        noise: Standard normal [B, ...], of the latents' shape: what the diffusion adds.
        posterior: Likewise: picks the latents from the autoencoder's posterior.
    """

    timestep: torch.Tensor
    dropout: torch.Tensor
    noise: torch.Tensor
    posterior: torch.Tensor


def generator_for(purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator seeded by a mixing hash, so that neighbouring counters give unrelated streams."""
    words = purpose.encode() + struct.pack(f"<{len(counters)}q", *counters)
    digest = hashlib.blake2b(words, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(
    seed: int, step: int, positions: Sequence[int], shape: Sequence[int], num_timesteps: int = 1000, labels: int = 1
) -> StepNoise:
    """Draw for the samples at these places of the global batch, each of the given shape and with so many labels."""
    samples = []
    for position in positions:
        generator = generator_for("step", seed, step, position)
        samples.append(
            StepNoise(
                torch.randint(num_timesteps, (), generator=generator),
                torch.rand(labels, generator=generator),
                torch.randn(*shape, generator=generator),
                torch.randn(*shape, generator=generator),
            )
        )
    return StepNoise(*(torch.stack(drawn) for drawn in zip(*samples, strict=True)))
