"""Videos and folders of frames that show their own frame numbers, in a way that codecs and mirrors leave be."""

from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

SIDE, BITS = 48, 6


def painted(number: int) -> np.ndarray:
    """A frame whose six bars, from top to bottom, are the bits of its number: codecs and mirrors leave them be."""
    bars = [255 * (number >> bit & 1) for bit in range(BITS)]
    column = np.repeat(np.array(bars, np.uint8), SIDE // BITS)
    return np.broadcast_to(column[:, None, None], (SIDE, SIDE, 3)).copy()


def numbers(video: torch.Tensor) -> list[int]:
    """Frame numbers of painted frames [n, 3, H, W] in [-1, 1]."""
    rows = [int((bit + 0.5) * video.shape[-2] / BITS) for bit in range(BITS)]
    bits = (video.mean((1, 3))[:, rows] > 0).long()
    return (bits << torch.arange(BITS)).sum(1).tolist()


def write_video(path: Path, frames: int, codec: str = "mpeg4", container: dict | None = None, **options: str) -> Path:
    """A video of painted frames in groups of 8; `options` are the codec's, `container` the file format's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 8
        for number in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(painted(number), format="rgb24")))
        output.mux(stream.encode(None))
    return path


def write_frames(folder: Path, frames: int) -> Path:
    """A folder of painted frames; their numbers are unpadded, so that names sort otherwise than numbers do."""
    folder.mkdir(parents=True)
    for number in range(frames):
        Image.fromarray(painted(number)).save(folder / f"x_frames_{number}.png")
    return folder
