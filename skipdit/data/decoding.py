"""Frames of a clip by number: of a video file (decord, else PyAV) or of a folder of pictures."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UnreadableError

if TYPE_CHECKING:
    pass

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "FrameSource", "frame_files", "open_source", "read_image"]

VIDEO_SUFFIXES = frozenset(".avi .mp4 .mov .mkv .webm .m4v .mpg .mpeg .wmv .flv".split())
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .webp".split())

DECORD_FORMATS = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"))

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
    decord is not installed, fails on the file, or would give other frames than asked for, PyAV does the same.

    Raises:
        UnreadableError: The file is empty, damaged, or no video.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    return VideoFile(path)


class Packets(NamedTuple):
    """What the packets' headers of a video say, without decoding.

    Attributes:
        times: Presentation times of the frames in order [n], in the stream's unit.
        keyframes: (presentation time, time to seek to) of each keyframe.
        decord_is_exact: decord finds frames of this file by number; of others it silently gives neighbours.
    """

    times: NDArray[np.int64]
    keyframes: list[tuple[int, int]]
    decord_is_exact: bool


class VideoFile:
    """A video file; its frames are counted by reading the packets' headers."""

    def __init__(self, path: Path):
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise UnreadableError(path, "it is not there" if not path.exists() else _reason(error)) from error
        if not status.st_size:
            raise UnreadableError(path, "it is empty")
        self.packets = _read_packets(path, status.st_size, status.st_mtime_ns)

    def __len__(self) -> int:
        return len(self.packets.times)

    def read(self, indices: Sequence[int]) -> Frames:
        """As `FrameSource.read`."""
        _check_range(indices, len(self), self.path)
        reader = _decord() if self.packets.decord_is_exact else None
        if reader is not None:
            try:
                return reader.read(self.path, indices, len(self))
            except UnreadableError:
                pass  # PyAV forgives more
        return self._read_by_pyav(indices)

    def _read_by_pyav(self, indices: Sequence[int]) -> Frames:
        wanted = set(indices)
        before = [seek for time, seek in self.packets.keyframes if time <= self.packets.times[min(wanted)]]
        found = self._decode(wanted, before[-1]) if len(before) > 1 else {}
        if len(found) < len(wanted):  # a seek that did not land where it should
            found = self._decode(wanted, None)
        if missing := wanted - set(found):
            raise UnreadableError(self.path, f"frame {min(missing)} of {len(self)} cannot be decoded")
        return np.stack([found[index] for index in indices])

    def _decode(self, wanted: set[int], seek: int | None) -> dict[int, Frames]:
        """The wanted frames, decoding from the keyframe at a time on (None: from the start, counting)."""
        import av

        found: dict[int, Frames] = {}
        try:
            with av.open(str(self.path), metadata_errors="replace") as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # loaders run a process a core
                decoded: Iterator[tuple[int, av.VideoFrame]] = enumerate(container.decode(stream))
                if seek is not None:
                    container.seek(seek, stream=stream, backward=True, any_frame=False)
                    numbers = {time: number for number, time in enumerate(self.packets.times.tolist())}
                    decoded = ((numbers.get(frame.pts, -1), frame) for frame in container.decode(stream))
                for number, frame in decoded:
                    if number in wanted:
                        found[number] = frame.to_ndarray(format="rgb24")
                        if len(found) == len(wanted):
                            break
        except (av.FFmpegError, OSError, ValueError) as error:
            if seek is None:
                raise UnreadableError(self.path, _reason(error)) from error
        return found


@lru_cache(maxsize=1 << 13)
def _read_packets(path: Path, size: int, changed_ns: int) -> Packets:
    """Read the headers; kept for as long as the file stays the same."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            name, reorders = container.format.name, stream.codec_context.has_b_frames
            if any(packet.is_corrupt for packet in packets):
                raise UnreadableError(path, f"it is cut off after {len(packets) - 1} frames")
    except UnreadableError:
        raise
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise UnreadableError(path, "it has no video" if isinstance(error, IndexError) else _reason(error)) from error
    if not packets:
        raise UnreadableError(path, "it has no frames")
    stamps = [(packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
    times = sorted(dts if pts is None else pts for pts, dts, _ in stamps if (pts, dts) != (None, None))
    # AVI keeps no times, and those guessed for reordered frames are wrong: such files are read from the start.
    if len(set(times)) < len(packets) or (name == "avi" and reorders):
        return Packets(np.arange(len(packets)), [], False)
    keyframes = [(pts, pts if dts is None else dts) for pts, dts, is_key in stamps if is_key and pts is not None]
    return Packets(np.array(times), keyframes, name in DECORD_FORMATS and not _has_leading_frames(stamps))


def _has_leading_frames(stamps: Sequence[tuple[int | None, int | None, bool]]) -> bool:
    """Whether frames are shown before the keyframe that is stored before them, as in open groups of pictures."""
    key = None
    for pts, _, is_key in stamps:
        key = pts if is_key else key
        if pts is None or key is None or pts < key:
            return True
    return False


class FrameFolder:
    """A folder of pictures, in the order of the number that their names end with."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.files = frame_files(path)
        except OSError as error:
            raise UnreadableError(path, _reason(error)) from error
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

    def read(self, path: Path, indices: Sequence[int], length: int) -> Frames:
        """Frames of a file that has so many of them.

        Raises:
            UnreadableError: decord refuses it, or counts otherwise.
        """
        try:
            reader = self.module.VideoReader(str(path), ctx=self.module.cpu(0), num_threads=1)
            if len(reader) != length:
                raise UnreadableError(path, f"decord counts {len(reader)} frames of {length}")
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
