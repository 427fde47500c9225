"""From a user's words to the sides of a comparison: everything checked, no clip read."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import load_config
from ..data import ClipDataset, ImageDataset, MovingDigits
from ..data.decoding import IMAGE_SUFFIXES, frame_files, open_source
from ..data.files import find_clips, find_images
from ..errors import UnreadableError, UserError
from ..sampling.config import SampleConfig
from ..sampling.loading import read_json
from .arrays import ARRAY_SUFFIXES
from .evaluate_config import EvaluateConfig, SideConfig
from .identity import describe_difference
from .sides import ArraySide, DigitsSide, FileSide, Frames, Side, fit_batch, settings_of

__all__ = ["PipelineSide", "open_side", "open_sides"]

DEFAULT_FRAMES = 16
DIGITS_SIZE = 32
NOT_KNOWN = (
    "The frame interval that the generated clips imitate is not recorded and taken as 1; generated.made_at= says it."
)


def open_sides(config: EvaluateConfig, stride: int = 1) -> tuple[Side, Side, list[str]]:
    """The real and the generated side.

    Args:
        config: Checked settings.
        stride: Of the protocol, on top of each side's own frame interval.

    Returns:
        Real side, generated side, and warnings.

    Raises:
        UserError: A side is not there, or both do not fit together and `force` is not set.
    """
    size = None if config.size is None else (config.size, config.size)
    recorded = _recorded_interval(Path(config.generated.path))
    unknown = config.generated.made_at is None and recorded is None and config.generated.path != "digits"
    side = replace(config.generated, made_at=config.generated.made_at or recorded or 1)
    generated = open_side(side, config, config.num_frames, size, stride, one_size=True)
    settings = generated.settings
    num_frames = settings["num_frames"] if config.num_frames is None else config.num_frames
    target = (settings["height"], settings["width"])
    real = open_side(config.real, config, num_frames, target, stride)
    found = describe_difference(real.settings, settings)
    native = generated.native or target
    if native != target:
        resized = f"generated clips of {native[0]}x{native[1]} resized to {target[0]}x{target[1]}"
        found = f"{found}; {resized}" if found else resized
    notes = [NOT_KNOWN] if unknown and num_frames > 1 else []
    if not found:
        return real, generated, notes
    if not config.force:
        raise UserError(
            f"The two sides differ: {found}. A distance between them would not measure the model; make them alike "
            "(generated.made_at= says the frame interval of the training data), or pass force=true."
        )
    return real, generated, [f"Forced although the two sides differ: {found}.", *notes]


def _recorded_interval(path: Path) -> int | None:
    """Frame interval of the training data, if the pipeline or the set of samples says it."""
    for name in ("model_index.json", "samples.json"):
        if (path / name).is_file():
            return read_json(path / name).get("frame_interval")
    return None


def open_side(
    side: SideConfig,
    config: EvaluateConfig,
    num_frames: int | None,
    size: tuple[int, int] | None,
    stride: int = 1,
    one_size: bool = False,
) -> Side:
    """One side.

    Args:
        side: What it is.
        config: The number of clips, the seed, their order and the folder for indices are read.
        num_frames: Of a clip; None: its own, 16 for videos.
        size: (height, width); None: its own.
        stride: As for `open_sides`.
        one_size: See that all frames of its files have one size, and set `native`.

    Raises:
        UserError: It is not there, or holds no clips of that kind.
    """
    frames = Frames(num_frames, side.frame_interval, stride, side.made_at or 1)
    if side.path == "digits":
        _takes_no_interval(side, "digits have none")
        return DigitsSide(_make_digits(side, config, num_frames or DEFAULT_FRAMES, size or (DIGITS_SIZE, DIGITS_SIZE)))
    path = Path(side.path)
    if not path.exists():
        raise UserError(f"{path} is not there: pass a folder or a file of clips.")
    if (path / "model_index.json").is_file():
        _takes_no_interval(side, "a pipeline's clips have that of its training (made_at)")
        return PipelineSide(path, side, config, frames, size)
    found = _samples_in(path)
    arrays = [found] if found.suffix in ARRAY_SUFFIXES else sorted(found.glob("*.npz")) if found.is_dir() else []
    if arrays:
        return ArraySide(arrays, config.clips, frames, size, config.seed, config.paired)
    if found.is_file():
        raise UserError(f"{found} is no array of clips ({', '.join(sorted(ARRAY_SUFFIXES))}): pass its folder.")
    data = _read_data(found, side, config, replace(frames, count=num_frames or DEFAULT_FRAMES), size)
    if found != path:
        data.entries.sort(key=lambda entry: entry.path.name)  # by number: the order of the samples, not of the classes
    frames = replace(frames, count=1 if isinstance(data, ImageDataset) else num_frames or DEFAULT_FRAMES)
    opened = FileSide(data, config.clips, frames, config.seed, config.paired)
    if one_size:
        opened.native = _one_size([data.entries[index].path for index, _ in opened.draws])
    return opened


def _make_digits(side: SideConfig, config: EvaluateConfig, num_frames: int, size: tuple[int, int]) -> MovingDigits:
    try:
        return MovingDigits(num_frames, size, config.clips, config.seed, side.split or "train")
    except ValueError as error:
        raise UserError(f"digits: {error}") from error


def _takes_no_interval(side: SideConfig, why: str) -> None:
    if side.frame_interval != 1:
        raise UserError(f"frame_interval={side.frame_interval} has no effect on {side.path}: {why}; leave it out.")


def _read_data(
    path: Path, side: SideConfig, config: EvaluateConfig, frames: Frames, size: tuple[int, int] | None
) -> ClipDataset | ImageDataset:
    if side.pictures or path.name == "pictures" and path != Path(side.path):
        if side.split is not None:
            raise UserError(f"split={side.split} is a list of clips: leave it out for pictures.")
        return ImageDataset(path, size or frame_size(find_images(path)[0]), flip=False, classes="none")
    return ClipDataset(
        path,
        frames.count * frames.stride,
        frames.interval,
        size or frame_size(find_clips(path)[0]),
        flip=False,
        classes="none",
        split=side.split,
        max_bad_share=side.max_bad_share,
        cache_dir=config.cache_dir,
    )


def _samples_in(path: Path) -> Path:
    """Where the samples of a set that `skipdit sample total=...` made are; another path as it is.

    Raises:
        UserError: The set is not complete, or what it says of itself is damaged.
    """
    about = path / "samples.json"
    if not about.is_file():
        return path
    if not read_json(about).get("complete"):
        raise UserError(f"{path} is not complete: run the same 'skipdit sample total=...' again, which goes on.")
    forms = (path / name for name in ("shards", "samples.npz", "frames", "pictures"))
    return next((form for form in forms if form.exists()), path)


def frame_size(path: Path) -> tuple[int, int]:
    """(height, width) of a video, a folder of frames or a picture.

    Raises:
        UserError: It cannot be read.
    """
    try:
        if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(frame_files(path)[0] if path.is_dir() else path) as picture:
                return picture.height, picture.width
        return open_source(path).read([0]).shape[1:3]
    except (UnreadableError, OSError, IndexError) as error:
        raise UserError(f"{path}: its size is not known ({error}); pass size=<pixels of a side>.") from error


def _one_size(paths: Sequence[Path]) -> tuple[int, int]:
    first = frame_size(paths[0])
    for path in paths[1:]:
        if (other := frame_size(path)) != first:
            sizes = f"{first[0]}x{first[1]} ({paths[0]}) and {other[0]}x{other[1]} ({path})"
            raise UserError(f"The generated clips have several sizes, {sizes}: evaluate them apart.")
    return first


class PipelineSide:
    """Clips that a pipeline samples while they are looked at; none touches the disk.

    Args:
        folder: That `save_pretrained` wrote.
        side: Its `sampling` holds settings of `skipdit sample`.
        config: The number of clips, the seed and the device are taken from here unless `sampling` has them.
        frames: Which of the frames that it makes.
        size: (height, width) to resize to; None: its own.

    Raises:
        UserError: It cannot be sampled with these settings, or its weights are damaged.
    """

    def __init__(
        self, folder: Path, side: SideConfig, config: EvaluateConfig, frames: Frames, size: tuple[int, int] | None
    ):
        from ..sampling.planning import plan_samples

        words = {"total": config.clips, "seed": config.seed, "device": config.device, **side.sampling}
        values = [f"{key}={json.dumps(value)}" for key, value in words.items()]
        self.config = load_config(SampleConfig, None, [f"model={json.dumps(str(folder))}", *values])
        plan = plan_samples(self.config)
        *made, height, width, _ = plan.source.shape(self.config.image_size, self.config.num_frames)
        made = made[0] if made else 1
        count = frames.most(made) if frames.count is None else frames.count
        if not 0 < count <= frames.most(made):
            raise UserError(f"{folder} makes clips of {made} frames: too few for {max(1, count)} at {frames.stride}.")
        self.picks = frames.pick(0, count)
        self.native = (height, width)
        self.size = self.native if size is None else size
        self.settings = settings_of(count, frames.total_interval, self.size)
        self.plan, self.pipeline = plan, plan.load()  # now, for the real side may take hours
        self.identity: dict[str, Any] | None = None
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.config.total

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        from ..sampling.streaming import sample_indices

        for _, clips in sample_indices(self.pipeline, range(self.plan.count), self.plan.label_of, self.config):
            clips = clips[:, None] if clips.dim() == 4 else clips
            yield from fit_batch(clips[:, self.picks], self.size).split(batch_size)
