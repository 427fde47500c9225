"""The files of a sampling run, in the formats asked for."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ..media import (
    Pixels,
    make_grid,
    make_sheet,
    npz_array,
    viewing_factor,
    write_frames,
    write_gif,
    write_mp4,
    write_png,
)

__all__ = ["Gallery", "open_gallery"]

MOST_IN_GRID = 36
MOST_IN_SHEET, FRAMES_IN_SHEET = 12, 8


class Gallery:
    """Takes samples as they come and writes them; a run of any length needs little memory.

    Clips: "mp4" and "gif" are a file for each and a labelled grid of the first 36, "png" is a picture of the
    first 12 frame by frame, "frames" a folder of PNG files for each. Pictures: "png" is a file for each and a
    labelled grid. "npz" is `samples.npz` with all, `arr_0` uint8 NTHWC or NHWC.

    Attributes:
        files: Names of the files so far, in the folder.
    """

    def __init__(
        self, folder: Path, captions: Sequence[str], formats: Sequence[str], fps: float, is_video: bool
    ) -> None:
        """As `open_gallery`, which also finishes what it began."""
        self.folder, self.captions, self.fps, self.is_video = folder, captions, fps, is_video
        self.formats = tuple(dict.fromkeys(formats)) or (("mp4",) if is_video else ("png",))
        self.files: list[str] = []
        self._kept: list[Pixels] = []
        self._written = 0
        self._npz: Pixels | None = None
        self.stack = ExitStack()

    def add(self, samples: Pixels) -> None:
        """Write the next samples, [n, T, H, W, 3] or [n, H, W, 3]."""
        if "npz" in self.formats and self._npz is None:
            shape = (len(self.captions), *samples.shape[1:])
            self._npz = self.stack.enter_context(npz_array(self._file("samples.npz"), shape))
        for sample in samples:
            if self._npz is not None:
                self._npz[self._written] = sample
            if len(self._kept) < MOST_IN_GRID:
                self._kept.append(sample)
            self._write_one(sample)
            self._written += 1

    def _write_one(self, sample: Pixels) -> None:
        name = f"{self._written:05d}{_slug(self.captions[self._written])}"
        if "mp4" in self.formats:
            write_mp4(self._file(f"{name}.mp4"), sample, self.fps)
        if "gif" in self.formats:
            write_gif(self._file(f"{name}.gif"), sample, self.fps)
        if "frames" in self.formats:
            write_frames(self._file(name), sample)
        if "png" in self.formats and not self.is_video:
            write_png(self._file(f"{name}.png"), sample)

    def write_overview(self) -> None:
        """Grids with captions; one sample alone needs none, except as a picture of its frames."""
        captions = self.captions[: len(self._kept)]
        if "png" in self.formats and self.is_video:
            write_png(self._file("grid.png"), frame_sheet(self._kept[:MOST_IN_SHEET], captions))
        if len(self._kept) < 2 or not {"mp4", "gif", "png"} & set(self.formats):
            return
        clips = np.stack(self._kept)
        grid = make_grid(clips if self.is_video else clips[:, None], captions if any(captions) else None)
        if not self.is_video:
            write_png(self._file("grid.png"), grid[0])
        elif "mp4" in self.formats:
            write_mp4(self._file("grid.mp4"), grid, self.fps)
        if "gif" in self.formats:
            write_gif(self._file("grid.gif"), grid, self.fps)

    def _file(self, name: str) -> Path:
        self.files.append(name)
        return self.folder / name


@contextmanager
def open_gallery(
    folder: Path, captions: Sequence[str], formats: Sequence[str], fps: float, is_video: bool
) -> Iterator[Gallery]:
    """A gallery to `add` to; grids are written at the end, and an error leaves no half-written file.

    Args:
        folder: Where the files go.
        captions: One a sample, its class; "" for none.
        formats: Of mp4, gif, png, frames, npz; empty: mp4 for clips, png for pictures.
        fps: Frames per second.
        is_video: Whether samples are [T, H, W, 3] or [H, W, 3].
    """
    gallery = Gallery(folder, captions, formats, fps, is_video)
    with gallery.stack:
        yield gallery
        gallery.write_overview()


def frame_sheet(clips: Sequence[Pixels], captions: Sequence[str]) -> Pixels:
    """One row a clip with up to 8 of its frames, evenly spaced."""
    length, height, width = clips[0].shape[:3]
    picks = np.unique(np.linspace(0, length - 1, FRAMES_IN_SHEET).round().astype(int))
    rows = [(caption, clip[picks]) for caption, clip in zip(captions, clips, strict=False)]
    words = [f"frame {pick + 1}" for pick in picks]
    return make_sheet(rows, columns=words, scale=viewing_factor(height, width, least=64))


def _slug(caption: str) -> str:
    """A caption as the end of a file name."""
    word = re.sub(r"[^A-Za-z0-9]+", "-", caption).strip("-")
    return f"_{word}" if word else ""
