"""`skipdit encode`: the latents of a data set, written once, so that training reads neither pictures nor videos."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import load_config
from ..data import ClipDataset, ImageDataset
from ..data.latents import FORMAT, INDEX, hash_file, hash_weights, verify
from ..errors import UnreadableError, UserError
from ..files import check_writable, written_whole
from .build import load_vae
from .config import DataConfig
from .data import build_data, encode

__all__ = ["EncodeConfig", "add_arguments", "encode_data", "run"]

SETTINGS = "encode.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class EncodeConfig:
    """What is encoded, by which autoencoder, to where."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="clips"))
    vae: str = "pretrained/Latte/vae"
    output: str = "outputs/latents"
    flip: bool = True  # write mirrored frames too: latents of a mirrored frame are not mirrored latents
    dtype: str = "float16"  # of the files: float16, bfloat16 or float32
    frames_per_shard: int = 8192  # a shard ends with the clip that reaches them
    verify: bool = False  # compare what is there with its checksums, and do nothing else

    def check(self) -> None:
        """Raise UserError for values that cannot work."""
        if self.data.name not in ("clips", "images"):
            raise UserError(f"data.name={self.data.name!r} cannot be encoded: choose clips or images.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.data.latents is not None or self.data.precompute_latents:
            raise UserError("data.latents and data.precompute_latents are for training: leave them out here.")
        for name, value in (("frames_per_shard", self.frames_per_shard), ("encode_batch", self.data.encode_batch)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")


def encode_data(config: EncodeConfig) -> Path:
    """Write all latents; what an interrupted call finished is kept, and the files come out the same.

    Under `accelerate launch` the processes share the shards; their number does not alter the files.

    Returns:
        The output folder: index.json (last), encode.json, and shards of safetensors with, for each clip, "mean" and
        "std" [frames, C, h, w], mirrored ones as "flip.mean" and "flip.std".

    Raises:
        UserError: A setting that cannot work, a folder of other latents, a full disk, too many unreadable clips.
    """
    config.check()
    accelerator = Accelerator()
    output = check_writable(Path(config.output))
    with accelerator.main_process_first():
        dataset, class_names = build_data(config.data, output)
    vae = load_vae(config.vae).to(accelerator.device)
    about = _about(config, dataset, class_names, vae)
    if accelerator.is_main_process:
        _check_same(output, about)
    accelerator.wait_for_everyone()
    shards = _plan(dataset, config.frames_per_shard)
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    _encode_shards(config, dataset, vae, output, mine, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(output, about, [name for name, _ in shards], dataset.max_bad_share)
    accelerator.wait_for_everyone()
    return output


def _about(config: EncodeConfig, dataset: Dataset, class_names: list[str] | None, vae) -> dict[str, Any]:
    """What makes the latents what they are."""
    return {
        "format": FORMAT,
        "is_video": isinstance(dataset, ClipDataset),
        "size": list(dataset.size),
        "class_names": class_names,
        "vae": config.vae,
        "vae_hash": hash_weights(vae.state_dict()),
        "scaling_factor": vae.config.scaling_factor,
        "flip": config.flip,
        "dtype": config.dtype,
        "frames_per_shard": config.frames_per_shard,
        "entries": [[_name(dataset, entry), entry.frames] for entry in dataset.entries],
    }


def _name(dataset: ClipDataset | ImageDataset, entry) -> str:
    return entry.path.relative_to(dataset.root).as_posix()


def _check_same(output: Path, about: dict[str, Any]) -> None:
    """See that the folder is empty or holds a part of the same latents."""
    file = output / SETTINGS
    if not file.is_file():
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in about if name != "vae" and before.get(name) != about[name]]
    if changed:
        raise UserError(
            f"{output} holds latents of another {', '.join(changed)}: choose another output, or remove that folder."
        )


def _plan(dataset: ClipDataset | ImageDataset, frames_per_shard: int) -> list[tuple[str, list[int]]]:
    """Shards in order: name and the indices of their clips, whatever the number of processes."""
    shards: list[list[int]] = [[]]
    frames = 0
    for index, entry in enumerate(dataset.entries):
        if frames >= frames_per_shard:
            shards.append([])
            frames = 0
        shards[-1].append(index)
        frames += entry.frames
    return [(f"latents-{number:05d}.safetensors", indices) for number, indices in enumerate(shards)]


def _encode_shards(
    config: EncodeConfig,
    dataset: ClipDataset | ImageDataset,
    vae: AutoencoderKL | AutoencoderTiny,
    output: Path,
    shards: list[tuple[str, list[int]]],
    shows: bool,
) -> None:
    left = [(name, indices) for name, indices in shards if not _is_done(output / name)]
    chunks = [chunk for _, indices in left for chunk in _chunks(dataset, indices, config.data.encode_batch)]
    loader = DataLoader(_Chunks(dataset), batch_size=None, sampler=chunks, num_workers=config.data.num_workers)
    frames = iter(loader)
    total = sum(dataset.entries[index].frames for _, indices in left for index in indices)
    with tqdm(total=total, desc="Encoding", unit="frame", disable=None if shows else True) as bar:
        for name, indices in left:
            tensors: dict[str, torch.Tensor] = {}
            clips, bad = [], []
            for index in indices:
                entry = dataset.entries[index]
                parts, reason = _encode_clip(config, vae, frames, entry.frames, bar)
                if reason is not None:
                    bad.append({"path": _name(dataset, entry), "reason": reason})
                    tqdm.write(f"{reason}; it is left out.")
                    continue
                tensors |= {f"{index}.{part}": value for part, value in parts.items()}
                clips.append(
                    {
                        "name": str(index),
                        "path": _name(dataset, entry),
                        "frames": entry.frames,
                        "class_label": entry.class_label,
                        "shard": name,
                    }
                )
            _write(output / name, tensors, {"clips": clips, "unreadable": bad})


def _chunks(dataset: ClipDataset | ImageDataset, indices: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """(clip, first frame, the one after the last) of all that is encoded at once."""
    for index in indices:
        frames = dataset.entries[index].frames
        yield from ((index, first, min(first + most, frames)) for first in range(0, frames, most))


class _Chunks(Dataset):
    """Reads chunks, in workers; what cannot be read becomes its reason."""

    def __init__(self, dataset: ClipDataset | ImageDataset):
        self.dataset = dataset

    def __getitem__(self, chunk: tuple[int, int, int]) -> torch.Tensor | str:
        index, first, stop = chunk
        try:
            return self.dataset.frames(index, list(range(first, stop)))
        except UnreadableError as error:
            return str(error)


@torch.no_grad()
def _encode_clip(
    config: EncodeConfig, vae, frames: Iterator[torch.Tensor | str], length: int, bar: tqdm
) -> tuple[dict[str, torch.Tensor], str | None]:
    """Latents of the next clip, or why there are none."""
    parts: dict[str, list[torch.Tensor]] = {}
    reason, done = None, 0
    while done < length:
        chunk = next(frames)
        size = min(config.data.encode_batch, length - done)
        done += size
        bar.update(size)
        if isinstance(chunk, str):
            reason = chunk
            continue
        for prefix in ("", "flip.") if config.flip else ("",):
            both = encode(vae, chunk.flip(-1) if prefix else chunk, config.data.encode_batch)
            for part, value in zip(("mean", "std"), both, strict=True):
                parts.setdefault(prefix + part, []).append(value.to("cpu", DTYPES[config.dtype]))
    return {part: torch.cat(values) for part, values in parts.items()}, reason


def _is_done(shard: Path) -> bool:
    return shard.is_file() and shard.with_suffix(".json").is_file()


def _write(shard: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """A shard and then its list, each whole or not at all."""
    try:
        with written_whole(shard) as temporary:
            save_file(tensors, temporary)
            about |= {"sha256": hash_file(temporary), "bytes": temporary.stat().st_size}
        with written_whole(shard.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
    except Exception as error:  # safetensors has errors of its own for a full disk
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise UserError(
                f"{shard} could not be written ({str(error).splitlines()[0]}): finished shards are kept; make room, "
                "then run the same command again."
            ) from error
        raise


def _finish(output: Path, about: dict[str, Any], names: list[str], max_bad_share: float) -> None:
    parts = {name: json.loads((output / name).with_suffix(".json").read_text(encoding="utf-8")) for name in names}
    bad = [entry for part in parts.values() for entry in part["unreadable"]]
    if len(bad) > max_bad_share * len(about["entries"]):
        listed = "; ".join(entry["reason"] for entry in bad[:10])
        raise UserError(
            f"{len(bad)} of {len(about['entries'])} clips cannot be read, more than data.arguments.max_bad_share="
            f"{max_bad_share:g} allows ({listed}): repair them, remove {output}, and run this again."
        )
    index = {name: value for name, value in about.items() if name != "entries"}
    index["clips"] = [clip for part in parts.values() for clip in part["clips"]]
    index["unreadable"] = bad
    index["shards"] = {name: {key: part[key] for key in ("sha256", "bytes")} for name, part in parts.items()}
    with written_whole(output / INDEX) as temporary:
        temporary.write_text(json.dumps(index), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `skipdit encode`."""
    parser.add_argument("--config", help="YAML file, such as configs/ucf101/encode.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.epilog = (
        "settings: data.name (clips, images), data.arguments (root, size, ...), data.encode_batch, data.num_workers, "
        "vae, output, flip=true, dtype=float16, frames_per_shard=8192, verify=false"
    )


def run(args: argparse.Namespace) -> int:
    """Encode, or verify what is there."""
    config = load_config(EncodeConfig, args.config, args.settings)
    output = Path(config.output)
    if config.verify:
        damaged = verify(output)
        if damaged:
            raise UserError(
                f"{output}: {', '.join(damaged)} differ from their checksums: remove them and encode again."
            )
        print(f"All shards of {output} are as they were written.")
        return 0
    encode_data(config)
    if not PartialState().is_main_process:
        return 0
    index = json.loads((output / INDEX).read_text(encoding="utf-8"))
    size = sum(shard["bytes"] for shard in index["shards"].values())
    print(f"{len(index['clips'])} clips in {len(index['shards'])} shard(s), {size / 1e9:.3g} GB: {output}")
    print(f"Train from them: data.latents={output}")
    return 0
