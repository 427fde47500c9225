"""Frames of a clip by number: of a video file (decord, else PyAV) or of a folder of pictures."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UnreadableError

if TYPE_CHECKING:
    import av

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "FrameSource", "frame_files", "open_source", "read_image"]

VIDEO_SUFFIXES = frozenset(".avi .mp4 .mov .mkv .webm .m4v .mpg .mpeg .wmv .flv".split())
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .webp".split())

Frames = NDArray[np.uint8]


class FrameSource(Protocol):
    """A clip that is open for reading."""

    def __len__(self) -> int:
        """Frames of the clip."""

    def read(self, indices: Sequence[int]) -> Frames:
        """Decode these frames, in the order given: [n, H, W, 3].

        Raises:
            UnreadableError: They cannot be decoded.
        """


def open_source(path: str | Path) -> FrameSource:
    """Open a video file, or a folder of pictures.

    A video is read by decord, which seeks to the keyframe before each frame and decodes no more than is needed. Where
    decord is not installed, or fails on the file, PyAV does the same.

    Raises:
        UnreadableError: The file is empty, damaged, or no video.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    return VideoFile(path)


class VideoFile:
    """A video file; its frames are counted by reading the packets' headers, without decoding."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UnreadableError(path, "it is not there")
        if not path.stat().st_size:
            raise UnreadableError(path, "it is empty")
        self._times: list[int] | None = None

    def __len__(self) -> int:
        return len(self._packet_times())

    def read(self, indices: Sequence[int]) -> Frames:
        """As `FrameSource.read`."""
        reader = _decord()
        if reader is not None:
            try:
                return reader.read(self.path, indices)
            except UnreadableError:
                pass  # PyAV forgives more
        return self._read_by_pyav(indices)

    def _packet_times(self) -> list[int]:
        """Presentation times of all frames in order, in the stream's unit."""
        if self._times is None:
            import av

            try:
                with av.open(str(self.path)) as container:
                    stream = container.streams.video[0]
                    packets = [packet for packet in container.demux(stream) if packet.size]
            except (av.FFmpegError, IndexError, OSError, ValueError) as error:
                raise UnreadableError(self.path, _reason(error)) from error
            times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
            if not times:
                raise UnreadableError(self.path, "it has no frames")
            self._times = [] if None in times else sorted(times)
            if not self._times:
                raise UnreadableError(self.path, "its packets carry no times")
        return self._times

    def _read_by_pyav(self, indices: Sequence[int]) -> Frames:
        import av

        times = self._packet_times()
        _check_range(indices, len(times), self.path)
        found: dict[int, Frames] = {}
        wanted = set(indices)
        try:
            with av.open(str(self.path)) as container:
                for index, frame in self._numbered(container, times, min(wanted)):
                    if index in wanted:
                        found[index] = frame.to_ndarray(format="rgb24")
                        if len(found) == len(wanted):
                            break
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UnreadableError(self.path, _reason(error)) from error
        if missing := wanted - set(found):
            raise UnreadableError(self.path, f"frame {min(missing)} of {len(times)} cannot be decoded")
        return np.stack([found[index] for index in indices])

    @staticmethod
    def _numbered(container: "av.container.InputContainer", times: list[int], first: int) -> Iterator[tuple]:
        """(number, frame) from the keyframe before the first on."""
        stream = container.streams.video[0]
        if container.format.name == "avi":  # its times are guesses, wrong by a frame around B-frames: count instead
            yield from enumerate(container.decode(stream))
            return
        container.seek(times[first], stream=stream, backward=True, any_frame=False)
        numbers = {time: number for number, time in enumerate(times)}
        for frame in container.decode(stream):
            yield numbers.get(frame.dts if frame.pts is None else frame.pts, -1), frame


class FrameFolder:
    """A folder of pictures, in the order of the number that their names end with."""

    def __init__(self, path: Path):
        self.path = path
        self.files = frame_files(path)
        if not self.files:
            raise UnreadableError(path, "it holds no pictures")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> Frames:
        """As `FrameSource.read`."""
        _check_range(indices, len(self.files), self.path)
        frames = [read_image(self.files[index]) for index in indices]
        if len({frame.shape for frame in frames}) > 1:
            raise UnreadableError(self.path, "its pictures differ in size")
        return np.stack(frames)


def frame_files(folder: Path) -> list[Path]:
    """Pictures of a folder by the trailing number of their names ("x_00000012.jpg"), then by name."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files, key=lambda path: (_trailing_number(path.stem), path.name))


def read_image(path: Path) -> Frames:
    """One picture [H, W, 3].

    Raises:
        UnreadableError: It is damaged or no picture.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableError(path, _reason(error)) from error


def _trailing_number(stem: str) -> int:
    match = re.search(r"(\d+)\D*$", stem)
    return int(match[1]) if match else -1


def _check_range(indices: Sequence[int], length: int, path: Path) -> None:
    if not indices or min(indices) < 0 or max(indices) >= length:
        raise UnreadableError(path, f"it has {length} frames, and number {max(indices, default=0)} was asked for")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0][:160].rstrip(".") or "damaged"


class _DecordReader:
    """Reads by decord; a reader is opened anew for each clip, for it must not be shared with forked workers."""

    def __init__(self, module):
        self.module = module
        module.logging.set_level(module.logging.FATAL)  # what fails is told by us, once

    def read(self, path: Path, indices: Sequence[int]) -> Frames:
        try:
            reader = self.module.VideoReader(str(path), ctx=self.module.cpu(0), num_threads=1)
            _check_range(indices, len(reader), path)
            return reader.get_batch(list(indices)).asnumpy()
        except (self.module.DECORDError, RuntimeError, IndexError) as error:
            raise UnreadableError(path, _reason(error)) from error


_DECORD: list[_DecordReader | None] = []


def _decord() -> _DecordReader | None:
    """decord, imported when the first video is read; None where it is not installed."""
    if not _DECORD:
        try:
            import decord
        except (ImportError, OSError):
            _DECORD.append(None)
        else:
            _DECORD.append(_DecordReader(decord))
    return _DECORD[0]
