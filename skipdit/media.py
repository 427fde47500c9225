"""Clips and pictures as files: mp4, GIF, PNG, frame folders, npz, and labelled grids of them.

Axes: N samples, T frames, H height, W width, 3 channels (RGB). Everything here is uint8. Every file is
written beside its place and renamed, so that a reader never sees half of one.
"""

import math
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .files import written_whole

__all__ = [
    "add_captions",
    "join_npz",
    "make_grid",
    "make_sheet",
    "npz_array",
    "npz_shape",
    "to_uint8",
    "upscale",
    "write_frames",
    "write_gif",
    "write_mp4",
    "write_png",
]

Pixels = NDArray[np.uint8]
BACKGROUND, INK, FAINT_INK = (255, 255, 255), (32, 32, 32), (128, 128, 128)
PADDING = 10


def to_uint8(values: NDArray[np.floating]) -> Pixels:
    """Pixels in [0, 1] -> 0..255, rounded to the nearest; what lies outside is clipped."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def write_mp4(path: str | Path, frames: Pixels, fps: float, crf: int = 12) -> None:
    """Write H.264 that any player opens (yuv420p).

    Args:
        path: Ends in .mp4.
        frames: [T, H, W, 3]; an odd side is padded to even by repeating the edge, as 4:2:0 needs.
        fps: Frames per second.
        crf: Quality of libx264, 0 (lossless) to 51; 12 is hard to tell from the original.
    """
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with written_whole(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_gif(path: str | Path, frames: Pixels, fps: float) -> None:
    """Write an endless GIF of frames [T, H, W, 3]; the format holds durations in hundredths of a second."""
    pictures = [Image.fromarray(frame) for frame in frames]
    duration = max(20, 10 * round(100 / fps))
    with written_whole(path) as temporary:
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def write_png(path: str | Path, picture: Pixels) -> None:
    """Write one picture [H, W, 3]."""
    with written_whole(path) as temporary:
        Image.fromarray(picture).save(temporary)


def write_frames(folder: str | Path, frames: Pixels) -> None:
    """Write frames [T, H, W, 3] as 00000.png, 00001.png, ... into a folder, which replaces an older one."""
    with written_whole(folder) as temporary:
        temporary.mkdir()
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(temporary / f"{index:05d}.png")


@contextmanager
def npz_array(path: str | Path, shape: Sequence[int], labels: Sequence[int] | None = None) -> Iterator[Pixels]:
    """Give an array to fill; it becomes `arr_0` of an .npz, the form that the ADM evaluator reads.

    The array lies on disk, so that 50 000 samples need no memory.

    Args:
        path: Ends in .npz.
        shape: [N, H, W, 3] for pictures, [N, T, H, W, 3] for clips.
        labels: Class of each sample, the array `labels` beside it; None: no such array.
    """
    with written_whole(path) as temporary:
        samples = np.lib.format.open_memmap(temporary.with_suffix(".npy"), "w+", np.uint8, tuple(shape))
        yield samples
        np.savez(temporary, samples, **({} if labels is None else {"labels": np.asarray(labels, np.int64)}))


def npz_shape(path: str | Path) -> tuple[int, ...] | None:
    """Shape of `arr_0` without reading it; None if there is no whole .npz of that name."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            return _read_shape(file)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def join_npz(
    path: str | Path, parts: Sequence[Path], shape: Sequence[int], labels: Sequence[int] | None = None
) -> None:
    """Write the samples of several .npz files one after the other into one, a megabyte at a time.

    Args:
        path: Ends in .npz.
        parts: Files that `npz_array` wrote.
        shape: Of all together.
        labels: Of all together.
    """
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as whole:
        with whole.open("arr_0.npy", "w", force_zip64=True) as target:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
            np.lib.format.write_array_header_1_0(target, header)
            for part in parts:
                with zipfile.ZipFile(part) as archive, archive.open("arr_0.npy") as source:
                    _read_shape(source)  # now at the first sample
                    shutil.copyfileobj(source, target, 2**20)
        if labels is not None:
            with whole.open("labels.npy", "w") as target:
                np.lib.format.write_array(target, np.asarray(labels, np.int64))


def _read_shape(file: IO[bytes]) -> tuple[int, ...]:
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)[0]


def upscale(frames: Pixels, factor: int) -> Pixels:
    """Repeat every pixel of [..., H, W, 3] `factor` times in both directions."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def viewing_factor(height: int, width: int, least: int = 128) -> int:
    """Whole factor that brings the longer side to at least `least` pixels."""
    return max(1, math.ceil(least / max(height, width)))


def make_grid(clips: Pixels, captions: Sequence[str] | None = None, columns: int | None = None, gap: int = 4) -> Pixels:
    """Lay clips out in rows, each under its caption; small ones (32 pixels, say) are enlarged to be seen.

    Args:
        clips: [N, T, H, W, 3]; for pictures T = 1.
        captions: One per clip, cut to the width of a cell.
        columns: Clips per row; None: as square as it gets.
        gap: Pixels between cells.

    Returns:
        Frames [T, H', W', 3].
    """
    count, length = clips.shape[:2]
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    cells = upscale(clips, viewing_factor(*clips.shape[2:4]))
    if captions is not None:
        cells = add_captions(cells, captions)
    height, width = cells.shape[2:4]
    rows = math.ceil(count / columns)
    canvas = np.full((length, rows * (height + gap) + gap, columns * (width + gap) + gap, 3), BACKGROUND, np.uint8)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        canvas[:, top : top + height, left : left + width] = cell
    return canvas


def add_captions(cells: Pixels, captions: Sequence[str], font_size: int = 14) -> Pixels:
    """Put a line of text above each cell [N, T, H, W, 3] -> [N, T, H + line, W, 3]."""
    width = cells.shape[3]
    strips = np.stack([_text_strip(caption, width, font_size) for caption in captions])
    strips = np.broadcast_to(strips[:, None], (*cells.shape[:2], *strips.shape[1:]))
    return np.concatenate([strips, cells], axis=2)


def make_sheet(
    rows: Sequence[tuple[str, Pixels]],
    title: str = "",
    columns: Sequence[str] = (),
    scale: int = 2,
    gap: int = 2,
) -> Pixels:
    """Show clips frame by frame: one row a clip, with its label on the left, one column a frame.

    Args:
        rows: (label, frames [T, H, W, 3]) with the same shape each.
        title: A line above them.
        columns: A word above each frame.
        scale: Enlargement of the frames.
        gap: Pixels between frames.

    Returns:
        One picture [H', W', 3].
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left = PADDING + 10 + math.ceil(max(font.getlength(label) for label, _ in rows))
    strips = [_film_strip(upscale(frames, scale), gap) for _, frames in rows]
    height, width = strips[0].shape[:2]
    title_line, column_line = (26 if title else 0), (18 if columns else 0)
    top = PADDING + title_line + column_line
    canvas = Image.new("RGB", (left + width + PADDING, top + len(rows) * height + PADDING), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, PADDING + title_line / 2), title, INK, font, anchor="lm")
    for index, word in enumerate(columns):
        cell = width / len(columns)
        place = (left + (index + 0.5) * cell - gap / 2, top - column_line / 2)
        draw.text(place, word, FAINT_INK, small, anchor="mm")
    for index, ((label, _), strip) in enumerate(zip(rows, strips, strict=True)):
        canvas.paste(Image.fromarray(strip), (left, top + index * height))
        draw.text((left - 10, top + (index + 0.5) * height), label, INK, font, anchor="rm")
    return np.asarray(canvas)


def _film_strip(frames: Pixels, gap: int) -> Pixels:
    """Frames [T, H, W, 3] side by side -> [H + gap, T * (W + gap), 3]."""
    padded = np.pad(frames, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=BACKGROUND[0])
    return np.concatenate(list(padded), axis=1)


def _text_strip(text: str, width: int, font_size: int) -> Pixels:
    """A line of text, centred and cut to `width` -> [font_size + 8, width, 3]."""
    font = ImageFont.load_default(font_size)
    kept = text
    while kept and font.getlength(kept) > width:
        text = text[:-1]
        kept = f"{text}…" if text else ""
    strip = Image.new("RGB", (width, font_size + 8), BACKGROUND)
    ImageDraw.Draw(strip).text((width / 2, strip.height / 2), kept, INK, font, anchor="mm")
    return np.asarray(strip)
