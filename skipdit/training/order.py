"""Which items make up each step, and reading them: the same for any number of processes, passes and workers."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UnreadableError
from .noise import generator_for

__all__ = ["Draw", "GlobalOrder", "read_batches", "read_item"]


class Draw(NamedTuple):
    """One item of one epoch; random crops and flips depend on both and the seed, and on nothing else."""

    index: int
    epoch: int


class GlobalOrder:
    """Batch sampler of one process: which items make up each forward pass, from step `start` on.

    The global stream runs through a new permutation of the set in each epoch, a function of (seed, epoch).
    Step s takes the places from s * batch_size on, each process in each pass a run of consecutive ones.

    Args:
        length: Items of the set.
        batch_size: Global batch.
        passes: Accumulated passes of a step.
        rank, processes: This process among all.
        start, stop: First step, and the one after the last.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        passes: int,
        rank: int,
        processes: int,
        seed: int,
        start: int,
        stop: int,
    ):
        self.length, self.batch_size, self.passes = length, batch_size, passes
        self.rank, self.processes, self.seed = rank, processes, seed
        self.start, self.stop = start, stop
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.length, generator=generator_for("order", self.seed, epoch))

    def positions(self, accumulated: int) -> range:
        """Places in the global batch that this process takes in one pass of a step."""
        size = self.batch_size // (self.passes * self.processes)
        first = (accumulated * self.processes + self.rank) * size
        return range(first, first + size)

    def draw(self, step: int, position: int) -> Draw:
        """What stands at a place of the global batch of a step."""
        epoch, offset = divmod(step * self.batch_size + position, self.length)
        return Draw(int(self._permutation(epoch)[offset]), epoch)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.passes

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.stop):
            for accumulated in range(self.passes):
                yield [self.draw(step, position) for position in self.positions(accumulated)]


def read_item(dataset: Dataset, draw: Draw) -> dict[str, Any]:
    """An item as the epoch has it; a set without random choices has the same in each."""
    return dataset.item(*draw) if hasattr(dataset, "item") else dataset[draw.index]


def read_batches(dataset: Dataset, batches: Iterable[Sequence[Draw]], num_workers: int) -> DataLoader:
    """Batches of items: dicts of tensors [B, ...] and "unreadable".

    An item that cannot be read (`UnreadableError`) is zero in every tensor and keeps its place, so that nothing else
    moves; "unreadable" maps its row in the batch to (path, reason) of the file, which joint images may share.
    """
    return DataLoader(
        _Reader(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_stopping_to_the_trainer,
        generator=torch.Generator().manual_seed(0),  # or it would draw from the process's random state
        pin_memory=torch.cuda.is_available(),
    )


class _Reader(Dataset):
    """Takes a `Draw`, gives an item or (zeros, path, reason)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._zeros: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any] | tuple[dict[str, Any], str, str]:
        try:
            return read_item(self.dataset, draw)
        except UnreadableError as error:
            return self._zero_item(), str(error.path), str(error)

    def _zero_item(self) -> dict[str, Any]:
        """An item of zeros, shaped as the first one that can be read."""
        index = 0
        while self._zeros is None:
            try:
                item = read_item(self.dataset, Draw(index, 0))
                self._zeros = {
                    name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0
                    for name, value in item.items()
                }
            except UnreadableError:
                index += 1
        return self._zeros


def _collate(items: list[Any]) -> dict[str, Any]:
    unreadable = {}
    for row, item in enumerate(items):
        if isinstance(item, tuple):
            items[row], *unreadable[row] = item
    return {**default_collate(items), "unreadable": unreadable}


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A stop reaches the whole process group; a worker that obeyed it would fail the trainer's last step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
