"""Samples as a stream of batches, each sample a function of the seed and its index."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import UserError
from ..media import Pixels, to_uint8
from ..pipelines import SkipLattePipeline, SkipPipeline
from .config import SampleConfig
from .overlap import overlapped
from .planning import plan_samples

__all__ = ["iterate_samples", "plan_batches", "sample_generators", "sample_indices"]

Labels = Callable[[int], int | None]
OVERLAPS = ("cuda", "cpu")  # others have not been tried with two threads


def iterate_samples(
    config: SampleConfig, indices: Sequence[int] | None = None
) -> Iterator[tuple[list[int], list[int] | None, torch.Tensor]]:
    """Samples for a consumer, without a file.

    Args:
        config: As for `skipdit sample`; `format` and `output` are not read.
        indices: Which of them; None: all.

    Yields:
        Indices; their class labels, None for an unconditional model; pixels as from `sample_indices`.

    Raises:
        UserError: As `generate`, before any work.

    Example:
        >>> config = SampleConfig(model="pretrained/digits", total=2048)
        >>> for indices, labels, clips in iterate_samples(config):  # clips: uint8 [B, T, H, W, 3]
        ...     features.append(detector.features(clips))
    """
    plan = plan_samples(config)
    wanted = range(plan.count) if indices is None else indices
    for some, pixels in sample_indices(plan.load(), wanted, plan.label_of, config):
        yield some, None if plan.labels is None else [plan.labels[index] for index in some], pixels


def sample_indices(
    pipeline: SkipPipeline,
    indices: Sequence[int],
    labels: Labels,
    config: SampleConfig,
    shows: bool = True,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Sample what is asked for; a sample is the same bytes whatever else is asked for, and in how many processes.

    The last bit of a float depends on the shape of the batch and on a sample's place in it. So with `total` sample i
    is always at place i % batch_size of a batch of batch_size, places that are not wanted being filled. On the CPU,
    where batches gain little, it is alone, and so does not depend on the batch size either. Without `total` the batches
    are as they come, and a value may round to either side.

    A batch is decoded while the steps of the next one are taken, on CUDA devices on a stream of its own.

    Args:
        pipeline: On its device, cache enabled or not.
        indices: In rising order, as neighbours share a batch.
        labels: Class of a sample by its index; None for an unconditional model.
        config: `seed`, `steps`, `batch_size`, the guidance and the size are read.
        shows: With a progress bar, if the terminal is one.

    Yields:
        Indices, at most batch_size at once; their pixels, uint8 [B, T, H, W, 3] for clips, [B, H, W, 3] for pictures,
        on the CPU.

    Raises:
        UserError: The autoencoder does not fit the network, too little memory on the device, or samples that are not
            finite.
    """
    try:
        pipeline.check_decoding("np")
    except ValueError as error:
        raise UserError(str(error)) from error
    in_turn = overlapped if pipeline.device.type in OVERLAPS else map
    pipeline.set_progress_bar_config(disable=True)
    bar_format = "{desc} {percentage:3.0f}% |{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]"
    with tqdm(total=len(indices), desc="Sampling", bar_format=bar_format, disable=None if shows else True) as bar:
        drawn = _draw(pipeline, indices, labels, config, bar)
        yield from in_turn(_Decoder(pipeline, config), drawn)


def computes_alone(pipeline: SkipPipeline, config: SampleConfig) -> bool:
    """Whether each sample is a batch of its own."""
    return config.total is not None and pipeline.device.type == "cpu"


def plan_batches(
    indices: Sequence[int], config: SampleConfig, alone: bool
) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """What is computed at once.

    Yields:
        Wanted indices that share batch_size places; the batches that hold them; where they are in these batches
        together.
    """
    size = config.batch_size
    for _, group in groupby(indices, lambda index: index // size):
        some = list(group)
        if alone:
            yield some, [[index] for index in some], list(range(len(some)))
        elif config.total is None:
            yield some, [some], list(range(len(some)))
        else:
            filled = dict.fromkeys(range(size), some[0]) | {index % size: index for index in some}
            yield some, [list(filled.values())], [index % size for index in some]


@dataclass(frozen=True)
class _Drawn:
    """Samples before they are decoded.

    Attributes:
        indices: Those that are wanted.
        latents: Of the batches that hold them.
        places: Where they are in these batches together.
        ready: What the device has to reach first, on CUDA.
    """

    indices: list[int]
    latents: list[torch.Tensor]
    places: list[int]
    ready: torch.cuda.Event | None


def _draw(
    pipeline: SkipPipeline, indices: Sequence[int], labels: Labels, config: SampleConfig, bar: tqdm
) -> Iterator[_Drawn]:
    """Take the steps, batch after batch."""
    device = pipeline.device
    for some, batches, places in plan_batches(indices, config, computes_alone(pipeline, config)):
        worth = len(some) / len(batches)
        latents = [_sample_latents(pipeline, batch, labels, config, bar, worth) for batch in batches]
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        yield _Drawn(some, latents, places, ready)


def _sample_latents(
    pipeline: SkipPipeline, batch: list[int], labels: Labels, config: SampleConfig, bar: tqdm, worth: float
) -> torch.Tensor:
    """Samples that are computed at once; `worth` is how far they bring the bar."""

    def advance(_pipeline, _step, _timestep, tensors):
        bar.update(worth / config.steps)
        return tensors

    classes = [labels(index) for index in batch]
    unconditional = classes[0] is None
    with _enough_memory(pipeline, config):
        return pipeline(
            class_labels=None if unconditional else classes,
            num_samples=len(batch) if unconditional else None,
            num_inference_steps=config.steps,
            generator=sample_generators(config.seed, batch),
            output_type="latent",
            callback_on_step_end=advance,
            return_dict=False,
            **_wishes(pipeline, config),
        )[0]


class _Decoder:
    """Drawn samples -> their indices and pixels, as `sample_indices` yields them."""

    def __init__(self, pipeline: SkipPipeline, config: SampleConfig):
        self.pipeline, self.config = pipeline, config
        self.stream = torch.cuda.Stream(pipeline.device) if pipeline.device.type == "cuda" else None

    def __call__(self, drawn: _Drawn) -> tuple[list[int], torch.Tensor]:
        with _enough_memory(self.pipeline, self.config), torch.cuda.stream(self.stream):
            if self.stream is not None:
                self.stream.wait_event(drawn.ready)
            pixels = [_to_pixels(self.pipeline.decode(latents, "np")) for latents in drawn.latents]
        return drawn.indices, torch.from_numpy(np.concatenate(pixels)[drawn.places])


def _to_pixels(values: NDArray[np.floating]) -> Pixels:
    if not np.isfinite(values).all():
        raise UserError("The samples are not finite numbers: lower guidance_scale, or pass dtype=fp32 or bf16.")
    return to_uint8(values)


@contextmanager
def _enough_memory(pipeline: SkipPipeline, config: SampleConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{pipeline.device} has too little memory: lower batch_size={config.batch_size} or pass dtype=bf16."
        ) from error


def _wishes(pipeline: SkipPipeline, config: SampleConfig) -> dict[str, Any]:
    """Arguments of the pipeline that the settings do not leave to it."""
    wishes = {"guidance_scale": config.guidance_scale, "guidance_channels": config.guidance_channels}
    wishes |= {"height": config.image_size, "width": config.image_size}
    if isinstance(pipeline, SkipLattePipeline):
        wishes["num_frames"] = config.num_frames
    return {name: value for name, value in wishes.items() if value is not None}


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample, on the CPU: a sample depends on (seed, index) only, on any device.

    torch seeds its CPU generator with 32 bits, so the seed is hashed to a start from which indices count on:
    no two samples of a run share their noise.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + index) % 2**32) for index in indices]
