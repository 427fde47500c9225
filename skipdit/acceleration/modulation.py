"""adaLN's vectors of all steps and classes, computed ahead of the loop: a block's are one product, not one a step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..models import SkipBackbone

__all__ = ["HeldModulation", "Modulations"]

MOST_BYTES = 2**30
"""Of a table; for more steps and classes than that holds, every step computes its own vectors."""


class HeldModulation(nn.Sequential):
    """An `adaLN_modulation` (same layers, same names) that hands out given vectors while it has some."""

    def __init__(self, layers: nn.Sequential):
        super().__init__(*layers)
        self.vectors: torch.Tensor | None = None

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return self.compute(conditioning) if self.vectors is None else self.vectors

    def compute(self, conditioning: torch.Tensor) -> torch.Tensor:
        """By the layers of now, whatever is given."""
        return super().forward(conditioning)


class Modulations:
    """Tables for the trajectories of a model.

    Args:
        model: Gets a `HeldModulation` in every block and the final layer, until `undo`.
    """

    def __init__(self, model: SkipBackbone):
        self.model = model
        self._owners = [*model.blocks, model.final_layer]
        self._originals = [owner.adaLN_modulation for owner in self._owners]
        self._held = [HeldModulation(layers) for layers in self._originals]
        for owner, held in zip(self._owners, self._held, strict=True):
            owner.adaLN_modulation = held
        self._current: dict[tuple, torch.Tensor] = {}  # one for a batch size: graphs remember where it lies

    def undo(self) -> None:
        for owner, held, layers in zip(self._owners, self._held, self._originals, strict=True):
            for index, layer in enumerate(held):  # an adapter may have wrapped one meanwhile
                layers[index] = layer
            owner.adaLN_modulation = layers

    @torch.no_grad()
    def trajectory(
        self, timesteps: torch.Tensor, labels: torch.Tensor | None, batch: int
    ) -> Callable[[int], AbstractContextManager]:
        """Compute the vectors of a trajectory.

        Args:
            timesteps: [steps], on the model's device.
            labels: [batch], as the network will see them; None for an unconditional model.
            batch: Samples as the network will see them.

        Returns:
            Step index -> a context in which the model uses that step's vectors.
        """
        labels, rows = (None, None) if labels is None else torch.unique(labels, return_inverse=True)
        if rows is None:
            rows = torch.zeros(batch, dtype=torch.long, device=timesteps.device)
        width = self.model.config.hidden_size
        widths = [6 * width] * len(self.model.blocks) + [2 * width]
        count = len(timesteps) * (1 if labels is None else len(labels))
        if count * sum(widths) * self.model.dtype.itemsize > MOST_BYTES:
            return nullcontext
        table = self._table(timesteps, labels)
        current = self._buffer(batch, table)
        axes = (1, 1) if self.model.blocks_per_unit == 2 else (1,)  # against [B, F, P, D] or [B, P, D]
        views = [part.unflatten(0, (batch, *axes)) for part in current.split(widths, dim=1)]

        @contextmanager
        def step(index: int) -> Iterator[None]:
            torch.index_select(table[index], 0, rows, out=current)
            self._give(views)
            try:
                yield
            finally:
                self._give([None] * len(views))

        return step

    def _table(self, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """[steps, classes, all vectors side by side]: one product for each layer."""
        conditioning = self.model.t_embedder(timesteps)[:, None]
        if labels is not None:
            conditioning = conditioning + self.model.y_embedder(labels)
        return torch.cat([held.compute(conditioning) for held in self._held], dim=-1)

    def _buffer(self, batch: int, table: torch.Tensor) -> torch.Tensor:
        key = batch, table.shape[-1], table.dtype, table.device, torch.is_inference_mode_enabled()
        if key not in self._current:
            self._current[key] = table.new_empty(batch, table.shape[-1])
        return self._current[key]

    def _give(self, vectors: list[torch.Tensor | None]) -> None:
        for held, own in zip(self._held, vectors, strict=True):
            held.vectors = own

    @property
    def key(self) -> int | None:
        """What a CUDA graph has to be recorded anew for: where the vectors lie, None if each step computes its own."""
        vectors = self._held[0].vectors
        return None if vectors is None else vectors.data_ptr()
