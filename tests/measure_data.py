"""Clips per second that training can read: from videos by decord and PyAV, against decoding whole files; from latents.

Run it on a quiet machine: python tests/measure_data.py data/UCF101 --vae pretrained/Latte/vae
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from skipdit.config import load_config
from skipdit.data import ClipDataset, LatentDataset, decoding
from skipdit.data.clips import draw_clip, generator
from skipdit.training.build import load_vae
from skipdit.training.data import encode
from skipdit.training.encoding import EncodeConfig, encode_data


def rate(read: Callable[[int, int], object], clips: int, seconds: float) -> float:
    """Items per second over some seconds of epochs, after one warm pass."""
    for index in range(clips):
        read(index, 0)
    done, epoch, began = 0, 1, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        read(done % clips, epoch + done // clips)
        done += 1
    return done / passed


def whole_file(data: ClipDataset, index: int, epoch: int) -> np.ndarray:
    """What a loader without seeking does."""
    entry = data.entries[index]
    drawn = draw_clip(generator(0, epoch, index), entry.frames, data.num_frames, data.frame_interval, True)
    with av.open(str(entry.path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[number] for number in drawn.indices])


def latent_rates(args: argparse.Namespace, data: ClipDataset) -> dict[str, float]:
    """Encoding while training, and latents written ahead (on all cores; they are read by one)."""
    vae = load_vae(args.vae)
    encoding = rate(lambda i, e: encode(vae, data.item(i, e)["video"][None], 16), min(3, len(data)), args.seconds)
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        arguments = (
            f"{{root: {args.root}, num_frames: 1, size: {args.size}, classes: {args.classes}, max_bad_share: 1.0}}"
        )
        words = [f"data.arguments={arguments}", f"vae={args.vae}", f"output={folder}/latents", "data.num_workers=0"]
        written = encode_data(load_config(EncodeConfig, None, [*words, "flip=false"]))
        torch.set_num_threads(1)
        latents = LatentDataset(written, frame_interval=args.interval, flip=False)
        reading = rate(latents.item, len(latents), args.seconds)
    return {"... and encode": encoding, "read latents (skipdit encode)": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--vae", help="folder of an autoencoder; without it, latents are not measured")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--interval", type=int, default=3)
    parser.add_argument("--classes", default="folders")
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"frame_interval": args.interval, "size": args.size, "classes": args.classes, "max_bad_share": 1.0}
    data = ClipDataset(args.root, **settings)
    names = {entry.path.suffix or "frames" for entry in data.entries}
    print(
        f"{len(data)} clips ({', '.join(sorted(names))}), 16 frames of {args.size}, interval {args.interval}, 1 thread"
    )

    def picks(index: int, epoch: int) -> np.ndarray:
        entry = data.entries[index]
        drawn = draw_clip(generator(0, epoch, index), entry.frames, data.num_frames, data.frame_interval, True)
        return decoding.open_source(entry.path).read(drawn.indices)

    table = {}
    if all(entry.path.is_file() for entry in data.entries):
        table["decode the whole file, pick"] = rate(lambda i, e: whole_file(data, i, e), len(data), args.seconds)
        trusted = sum(decoding.open_source(entry.path).packets.decord_is_exact for entry in data.entries)
        table[f"decode the picks (decord for {trusted} of {len(data)} files, else PyAV)"] = rate(
            picks, len(data), args.seconds
        )
        reader, decoding._DECORD[:] = decoding._DECORD[:], [None]
        table["decode the picks (PyAV alone)"] = rate(picks, len(data), args.seconds)
        decoding._DECORD[:] = reader
    else:
        table["read the picks"] = rate(picks, len(data), args.seconds)
    table["... and resize, crop, flip"] = rate(data.item, len(data), args.seconds)
    if args.vae:
        table |= latent_rates(args, data)
    print("\n| from | clips per second |\n|---|--:|")
    for name, value in table.items():
        print(f"| {name} | {value:.1f} |")


if __name__ == "__main__":
    main()
