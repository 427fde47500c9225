"""What a training run reads: the data set by name, and latents encoded ahead."""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import nearest
from ..data import ClipDataset, ImageDataset, LatentDataset, MovingDigits
from ..data.transforms import sides
from ..errors import UserError
from .config import DataConfig
from .order import Draw, read_batches

__all__ = ["DATA_SETS", "LatentClips", "build_data", "encode", "precompute_latents"]

DATA_SETS: dict[str, Callable[..., Dataset]] = {
    "digits": MovingDigits,
    "clips": ClipDataset,
    "images": ImageDataset,
}
"""By `data.name`: takes `data.arguments`; items are {"video", "class_label"}, the video [T, 3, H, W] (a picture:
[3, H, W]) in [-1, 1]; `class_names` in order, None without classes."""

ENCODED = ("root", "size", "classes", "index", "cache_dir")
"""Arguments that latents written ahead have already been through."""


def build_data(config: DataConfig, output: Path) -> tuple[Dataset, list[str] | None]:
    """The data set and its class names.

    Args:
        config: Its name and arguments.
        output: Of the run; the index of a set of files is kept there.

    Raises:
        UserError: Its name or an argument is not known or out of range, or there are no files.
    """
    if config.name not in DATA_SETS:
        raise UserError(f"data.name={config.name!r} is not known: {nearest(config.name, list(DATA_SETS))}")
    kind = DATA_SETS[config.name]
    parameters = inspect.signature(kind).parameters
    for name in config.arguments:
        if name not in parameters:
            raise UserError(f"No setting 'data.arguments.{name}' of {config.name}: {nearest(name, list(parameters))}")
    if config.latents is not None:
        return _build_latents(config)
    if "root" in parameters and "root" not in config.arguments:
        raise UserError("data.arguments.root is not set: give the folder of the data.")
    arguments = {"cache_dir": output, **config.arguments} if "cache_dir" in parameters else config.arguments
    try:
        dataset = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.arguments: {error}") from error
    if not len(dataset):
        raise UserError(f"The data set {config.name!r} is empty: check data.arguments.")
    return dataset, list(dataset.class_names) if dataset.class_names else None


def _build_latents(config: DataConfig) -> tuple[Dataset, list[str] | None]:
    known = inspect.signature(LatentDataset).parameters
    arguments = {name: value for name, value in config.arguments.items() if name not in ENCODED}
    for name in arguments:
        if name not in known:
            raise UserError(
                f"data.arguments.{name} cannot be applied to latents: set it when they are written (skipdit encode), "
                "and leave it out here."
            )
    try:
        dataset = LatentDataset(config.latents, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.arguments: {error}") from error
    if (size := config.arguments.get("size")) is not None and sides(size) != dataset.size:
        raise UserError(f"{config.latents} holds latents of {dataset.size}, not of data.arguments.size={size}.")
    return dataset, list(dataset.class_names) if dataset.class_names else None


class LatentClips(Dataset):
    """Latents in memory: unscaled mean and standard deviation [N, C, (F,) h, w], and labels [N]."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, class_labels: torch.Tensor):
        self.mean, self.std, self.class_labels = mean, std, class_labels

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"mean": self.mean[index], "std": self.std[index], "class_label": self.class_labels[index]}


@torch.no_grad()
def encode(
    vae: AutoencoderKL | AutoencoderTiny, video: torch.Tensor, frames_at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior of clips [B, T, 3, H, W] or pictures [B, 3, H, W] in [-1, 1], some frames at a time.

    Returns:
        Mean and standard deviation, unscaled, float32, each [B, C, T, h, w] or [B, C, h, w]; AutoencoderTiny gives one
        latent, so its standard deviation is 0.
    """
    frames = video.flatten(0, 1) if video.ndim == 5 else video
    parts = [_posterior(vae, chunk.to(vae.device, vae.dtype)) for chunk in frames.split(frames_at_once)]
    both = [torch.cat(values).float() for values in zip(*parts, strict=True)]
    if video.ndim == 5:
        both = [values.unflatten(0, video.shape[:2]).transpose(1, 2).contiguous() for values in both]
    return tuple(both)


def _posterior(vae: AutoencoderKL | AutoencoderTiny, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = vae.encode(frames)
    if isinstance(vae, AutoencoderTiny):
        return encoded.latents, torch.zeros_like(encoded.latents)
    return encoded.latent_dist.mean, encoded.latent_dist.std


def precompute_latents(
    accelerator: Accelerator, vae: AutoencoderKL | AutoencoderTiny, dataset: Dataset, config: DataConfig
) -> LatentClips:
    """Encode the whole set; the processes share the work, their number does not alter the latents."""
    video = dataset[0]["video"]
    clips = max(1, config.encode_batch // (len(video) if video.ndim == 4 else 1))
    chunks = [range(first, min(first + clips, len(dataset))) for first in range(0, len(dataset), clips)]
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    loader = read_batches(dataset, [[Draw(index, 0) for index in chunk] for chunk in mine], config.num_workers)
    shape = encode(vae, video[None], config.encode_batch)[0].shape[1:]
    mean, std = torch.zeros(len(dataset), *shape), torch.zeros(len(dataset), *shape)
    class_labels = torch.zeros(len(dataset), dtype=torch.long)
    quiet = None if accelerator.is_main_process else True  # None: no bar where nobody watches a terminal
    with tqdm(total=sum(map(len, mine)), desc="encoding", unit="clip", disable=quiet) as bar:
        for chunk, batch in zip(mine, loader, strict=True):
            rows = slice(chunk.start, chunk.stop)
            mean[rows], std[rows] = (values.cpu() for values in encode(vae, batch["video"], config.encode_batch))
            class_labels[rows] = batch["class_label"]
            bar.update(len(chunk))
    stores = [mean, std, class_labels]
    if accelerator.num_processes > 1:  # every clip is zero on all processes but one
        stores = [accelerator.reduce(store.to(accelerator.device), "sum").cpu() for store in stores]
    return LatentClips(*stores)
