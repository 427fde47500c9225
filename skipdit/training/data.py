"""What a training run reads: the data set by name, its order, and latents encoded ahead."""

import inspect
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import nearest
from ..data import DIGIT_NAMES, MovingDigits
from ..errors import UserError
from .config import DataConfig
from .noise import generator_for

__all__ = ["DATA_SETS", "DataSet", "GlobalOrder", "LatentClips", "build_data", "encode", "precompute_latents"]


@dataclass(frozen=True)
class DataSet:
    """A kind of data set.

    Attributes:
        build: Takes `data.arguments`; items are {"video", "class_label"}, the video [T, 3, H, W]
            (a picture: [3, H, W]) in [-1, 1].
        class_names: In order; None for a set without classes.
    """

    build: Callable[..., Dataset]
    class_names: Sequence[str] | None


DATA_SETS = {"digits": DataSet(MovingDigits, tuple(DIGIT_NAMES))}


def build_data(config: DataConfig) -> tuple[Dataset, list[str] | None]:
    """The data set and its class names.

    Raises:
        UserError: Its name or an argument is not known or out of range.
    """
    if config.name not in DATA_SETS:
        raise UserError(f"data.name={config.name!r} is not known: {nearest(config.name, list(DATA_SETS))}")
    kind = DATA_SETS[config.name]
    known = list(inspect.signature(kind.build).parameters)
    for name in config.arguments:
        if name not in known:
            raise UserError(f"No setting 'data.arguments.{name}' of {config.name}: {nearest(name, known)}")
    try:
        dataset = kind.build(**config.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.arguments: {error}") from error
    if not len(dataset):
        raise UserError(f"The data set {config.name!r} is empty: check data.arguments.")
    return dataset, list(kind.class_names) if kind.class_names else None


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

    def item(self, step: int, position: int) -> int:
        """Index of the item at a place of the global batch of a step."""
        epoch, offset = divmod(step * self.batch_size + position, self.length)
        return int(self._permutation(epoch)[offset])

    def __len__(self) -> int:
        return (self.stop - self.start) * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for accumulated in range(self.passes):
                yield [self.item(step, position) for position in self.positions(accumulated)]

    def loader(self, dataset: Dataset, num_workers: int) -> DataLoader:
        """Batches of this order."""
        return _loader(dataset, self, num_workers)


class LatentClips(Dataset):
    """Latents in memory: unscaled mean and standard deviation [N, C, (F,) h, w], and labels [N]."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, class_labels: torch.Tensor):
        self.mean, self.std, self.class_labels = mean, std, class_labels

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"mean": self.mean[index], "std": self.std[index], "class_label": self.class_labels[index]}


@torch.no_grad()
def encode(vae: AutoencoderKL, video: torch.Tensor, frames_at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior of clips [B, T, 3, H, W] or pictures [B, 3, H, W] in [-1, 1], some frames at a time.

    Returns:
        Mean and standard deviation, unscaled, float32, each [B, C, T, h, w] or [B, C, h, w].
    """
    frames = video.flatten(0, 1) if video.ndim == 5 else video
    parts = [vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist for chunk in frames.split(frames_at_once)]
    both = [torch.cat([getattr(part, name) for part in parts]).float() for name in ("mean", "std")]
    if video.ndim == 5:
        both = [values.unflatten(0, video.shape[:2]).transpose(1, 2).contiguous() for values in both]
    return tuple(both)


def precompute_latents(
    accelerator: Accelerator, vae: AutoencoderKL, dataset: Dataset, config: DataConfig
) -> LatentClips:
    """Encode the whole set; the processes share the work, their number does not alter the latents."""
    video = dataset[0]["video"]
    clips = max(1, config.encode_batch // (len(video) if video.ndim == 4 else 1))
    chunks = [range(first, min(first + clips, len(dataset))) for first in range(0, len(dataset), clips)]
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    loader = _loader(dataset, mine, config.num_workers)
    shape = encode(vae, video[None], config.encode_batch)[0].shape[1:]
    mean, std = torch.zeros(len(dataset), *shape), torch.zeros(len(dataset), *shape)
    class_labels = torch.zeros(len(dataset), dtype=torch.long)
    with tqdm(total=sum(map(len, mine)), desc="encoding", unit="clip", disable=_quiet(accelerator)) as bar:
        for chunk, batch in zip(mine, loader, strict=True):
            rows = slice(chunk.start, chunk.stop)
            mean[rows], std[rows] = (values.cpu() for values in encode(vae, batch["video"], config.encode_batch))
            class_labels[rows] = batch["class_label"]
            bar.update(len(chunk))
    stores = [mean, std, class_labels]
    if accelerator.num_processes > 1:  # every clip is zero on all processes but one
        stores = [accelerator.reduce(store.to(accelerator.device), "sum").cpu() for store in stores]
    return LatentClips(*stores)


def _loader(dataset: Dataset, batches: Iterable[Sequence[int]], num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        worker_init_fn=_leave_stopping_to_the_trainer,
        generator=torch.Generator().manual_seed(0),  # or it would draw from the process's random state
    )


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A stop reaches the whole process group; a worker that obeyed it would fail the trainer's last step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _quiet(accelerator: Accelerator) -> bool | None:
    """For tqdm: no bar on other processes than the main one, nor (None) where nobody watches a terminal."""
    return None if accelerator.is_main_process else True
