"""From a batch as it is read to the losses of its items."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..diffusion import training_losses
from .config import TrainConfig
from .data import encode
from .noise import draw_noise

__all__ = ["BatchLosses", "Losses"]


class Losses(NamedTuple):
    """Of the B items of one pass.

    Attributes:
        items: "loss", "mse", "vb", each [B].
        valid: [B], 1, or 0 for an item that could not be read: its loss does not count.
        timestep: [B], in 0..999.
        latents: Clean, scaled [B, C, (F,) h, w].
        class_labels: [B], dropped ones as the null class; None for an unconditional model.
    """

    items: dict[str, torch.Tensor]
    valid: torch.Tensor
    timestep: torch.Tensor
    latents: torch.Tensor
    class_labels: torch.Tensor | None

    @property
    def objective(self) -> torch.Tensor:
        """What is minimised: the mean over the batch, unreadable items counting 0.

        Divided by B and not by the readable ones, so that the gradient is the same however the processes share a batch.
        """
        return (self.items["loss"] * self.valid).sum() / len(self.valid)


class BatchLosses:
    """Encodes, adds noise, drops labels and asks the network.

    Args:
        model: As accelerate wrapped it.
        network: The network itself.
        vae: The frozen autoencoder.
        images: Joint images behind each clip's own frames (0: none), each with a label of its own.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, model: nn.Module, network: nn.Module, vae, images: int
    ):
        self.config, self.accelerator = config, accelerator
        self.model, self.vae, self.images = model, vae, images
        self.null_class, self.dropout = network.null_class, network.config.class_dropout_prob

    def __call__(self, batch: dict[str, Any], step: int, positions: range) -> Losses:
        """The losses of a batch that stands at `positions` of a step's global batch."""
        device = self.accelerator.device
        mean, std = self._posterior(batch)
        drawn = draw_noise(self.config.seed, step, positions, mean.shape[1:], labels=1 + self.images)
        timestep, dropout, noise, posterior = (values.to(device) for values in drawn)
        latents = (mean + std * posterior) * self.vae.config.scaling_factor
        labels = self._labels(batch["class_label"].to(device), dropout)
        inputs = {}
        if self.images:
            inputs = {"num_images": self.images, "image_class_labels": None if labels is None else labels[:, 1:]}
        clip_labels = None if labels is None else labels[:, 0]
        with self.accelerator.autocast():
            items = training_losses(self.model, latents, timestep, noise, clip_labels, self.config.objective, **inputs)
        valid = torch.ones(len(latents), device=device)
        valid[list(batch["unreadable"])] = 0.0
        return Losses(items, valid, timestep, latents, clip_labels)

    def _posterior(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if "mean" in batch:
            return tuple(batch[name].to(self.accelerator.device, torch.float32) for name in ("mean", "std"))
        return encode(self.vae, batch["video"], self.config.data.encode_batch)

    def _labels(self, labels: torch.Tensor, dropout: torch.Tensor) -> torch.Tensor | None:
        """Labels [B, 1 + images] with the null class where guidance dropout strikes; each frame's of its own."""
        if self.null_class is None:
            return None
        return torch.where(dropout < self.dropout, self.null_class, labels.reshape(dropout.shape))
