"""From a user's words to the sides of a comparison: everything checked, no clip read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import load_config
from ..data import ClipDataset, ImageDataset
from ..data.decoding import IMAGE_SUFFIXES, open_source, read_image
from ..data.files import find_clips, find_images
from ..errors import UnreadableError, UserError
from ..sampling_config import SampleConfig
from .arrays import ARRAY_SUFFIXES
from .evaluate_config import EvaluateConfig, SideConfig
from .identity import describe_difference
from .sides import ArraySide, DigitsSide, FileSide, Side, settings_of

__all__ = ["PipelineSide", "open_side", "open_sides"]

DEFAULT_FRAMES = 16
DIGITS_SIZE = 32


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
    generated = open_side(config.generated, config, config.num_frames, size, stride)
    settings = generated.settings
    num_frames = settings["num_frames"] if config.num_frames is None else config.num_frames
    target = (settings["height"], settings["width"])
    real = open_side(config.real, config, num_frames, target, stride)
    found = describe_difference(real.settings, settings)
    native = getattr(generated, "native", target)
    if native != target:
        resized = f"generated clips of {native[0]}x{native[1]} resized to {target[0]}x{target[1]}"
        found = f"{found}; {resized}" if found else resized
    if not found:
        return real, generated, []
    if not config.force:
        raise UserError(
            f"The two sides differ: {found}. A distance between them would not measure the model; make them alike "
            "(generated.made_at= says the frame interval of the training data), or pass force=true."
        )
    return real, generated, [f"Forced although the two sides differ: {found}."]


def open_side(
    side: SideConfig,
    config: EvaluateConfig,
    num_frames: int | None,
    size: tuple[int, int] | None,
    stride: int = 1,
) -> Side:
    """One side.

    Args:
        side: What it is.
        config: The number of clips, the seed, their order and the folder for indices are read.
        num_frames: Of a clip; None: its own, 16 for videos.
        size: (height, width); None: its own.
        stride: As for `open_sides`.

    Raises:
        UserError: It is not there, or holds no clips of that kind.
    """
    if side.path == "digits":
        frames = num_frames or DEFAULT_FRAMES
        return DigitsSide(config.clips, frames, size or (DIGITS_SIZE, DIGITS_SIZE), config.seed, side.split or "train")
    path = Path(side.path)
    if not path.exists():
        raise UserError(f"{path} is not there: pass a folder or a file of clips.")
    if (path / "model_index.json").is_file():
        return PipelineSide(path, side, config)
    path = _samples_in(path)
    arrays = [path] if path.suffix in ARRAY_SUFFIXES else sorted(path.glob("*.npz")) if path.is_dir() else []
    interval, made_at = side.frame_interval * stride, side.made_at or 1
    if arrays:
        return ArraySide(arrays, config.clips, num_frames, interval, size, made_at)
    if path.is_file():
        raise UserError(f"{path} is no array of clips ({', '.join(sorted(ARRAY_SUFFIXES))}): pass its folder.")
    if side.pictures:
        return _pictures(path, side, config, size)
    data = ClipDataset(
        path,
        num_frames or DEFAULT_FRAMES,
        interval,
        size or _native_size(find_clips(path)[0]),
        flip=False,
        classes="none",
        split=side.split,
        max_bad_share=side.max_bad_share,
        cache_dir=config.cache_dir,
    )
    return FileSide(data, config.clips, config.seed, config.paired, made_at)


def _samples_in(path: Path) -> Path:
    """Where the samples of a set that `skipdit sample total=...` made are; another path as it is.

    Raises:
        UserError: The set is not complete.
    """
    about = path / "samples.json"
    if not about.is_file():
        return path
    try:
        complete = json.loads(about.read_text(encoding="utf-8")).get("complete")
    except ValueError as error:
        raise UserError(f"{about} cannot be read ({error}).") from error
    if not complete:
        raise UserError(f"{path} is not complete: run the same 'skipdit sample total=...' again, which goes on.")
    forms = (path / name for name in ("shards", "samples.npz", "frames", "pictures"))
    return next((form for form in forms if form.exists()), path)


def _pictures(path: Path, side: SideConfig, config: EvaluateConfig, size: tuple[int, int] | None) -> FileSide:
    if side.split is not None:
        raise UserError(f"split={side.split} is a list of clips: leave it out for pictures.")
    data = ImageDataset(path, size or _native_size(find_images(path)[0]), flip=False, classes="none")
    return FileSide(data, config.clips, config.seed, config.paired)


def _native_size(path: Path) -> tuple[int, int]:
    try:
        is_picture = path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
        frame = read_image(path) if is_picture else open_source(path).read([0])[0]
    except UnreadableError as error:
        raise UserError(f"{error}: its size is not known; pass size=<pixels of a side>.") from error
    return frame.shape[0], frame.shape[1]


class PipelineSide:
    """Clips that a pipeline samples while they are looked at; none touches the disk.

    Args:
        folder: That `save_pretrained` wrote.
        side: Its `sampling` holds settings of `skipdit sample`.
        config: The number of clips, the seed and the device are taken from here unless `sampling` has them.
    """

    def __init__(self, folder: Path, side: SideConfig, config: EvaluateConfig):
        from ..loading import find_model

        words = {"total": config.clips, "seed": config.seed, "device": config.device, **side.sampling}
        values = [f"{key}={json.dumps(value)}" for key, value in words.items()]
        self.config = load_config(SampleConfig, None, [f"model={json.dumps(str(folder))}", *values])
        *frames, height, width, _ = find_model(self.config).shape(self.config.image_size, self.config.num_frames)
        interval = side.made_at or json.loads((folder / "model_index.json").read_text()).get("frame_interval") or 1
        self.settings = settings_of(frames[0] if frames else 1, interval, (height, width))
        self.identity: dict[str, Any] | None = None
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.config.total

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        from ..streaming import iterate_samples

        for _, _, clips in iterate_samples(self.config):
            clips = clips[:, None] if clips.dim() == 4 else clips
            yield from clips.split(batch_size)
