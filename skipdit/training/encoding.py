"""`skipdit encode`: the latents of a data set, written once, so that training reads neither pictures nor videos."""

import argparse
import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderKL, AutoencoderTiny

from ..config import load_config
from ..data import ClipDataset, ImageDataset
from ..data.latents import FORMAT, INDEX, hash_weights, read_index, verify
from ..errors import UserError
from ..files import LONGEST_WAIT, check_writable, only_call, remove_unfinished, written_whole
from .build import load_vae
from .config import DataConfig
from .data import build_data
from .shards import Encoder, ShardError, check_share, is_done, name_of, plan_shards, read_about

__all__ = ["EncodeConfig", "add_arguments", "encode_data", "run"]

SETTINGS = "encode.json"
MEANING = {"vae_hash": "autoencoder", "vae_config": "configuration of the autoencoder", "files": "list of files"}
OF_TRAINING = ("images", "image_list", "image_root", "seed")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class EncodeConfig:
    """What is encoded, by which autoencoder, to where."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="clips"))
    vae: str = "pretrained/Latte/vae"
    output: str = "outputs/latents"
    flip: bool = True  # write mirrored frames too: latents of a mirrored frame are not mirrored latents
    dtype: str = "float16"  # of the files: float16, bfloat16 or float32
    frames_per_shard: int = 8192  # at most, unless one clip has more
    verify: bool = False  # compare what is there with its checksums, and do nothing else

    def check(self) -> None:
        """Raise UserError for values that cannot work."""
        if self.data.name not in ("clips", "images"):
            raise UserError(f"data.name={self.data.name!r} cannot be encoded: choose clips or images.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.data.latents is not None or self.data.precompute_latents:
            raise UserError("data.latents and data.precompute_latents are for training: leave them out here.")
        if "flip" in self.data.arguments:
            raise UserError(
                "data.arguments.flip is drawn in training: set flip= for whether mirrored frames are written."
            )
        for name in self.data.arguments:
            if name in OF_TRAINING:
                raise UserError(f"data.arguments.{name} is for training: leave it out here.")
        for name, value in (("frames_per_shard", self.frames_per_shard), ("encode_batch", self.data.encode_batch)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")


def encode_data(config: EncodeConfig) -> Path:
    """Write all latents; what an interrupted call finished is kept, and the files come out the same.

    Under `accelerate launch` the processes share the shards; their number does not alter the files.

    Returns:
        The output folder: shards of safetensors with "mean" and "std" [frames of all its clips, C, h, w], mirrored ones
        as "flip.mean" and "flip.std"; beside each a list of its clips; encode.json; index.json, written last.

    Raises:
        UserError: A setting that cannot work, a folder of other latents, a full disk, too many unreadable clips.
    """
    config.check()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    output = check_writable(Path(config.output))
    vae = load_vae(config.vae).to(accelerator.device)
    with only_call("encode", output) if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            dataset, class_names = build_data(config.data, output)
        data, dtype = config.data, DTYPES[config.dtype]
        encoder = Encoder(dataset, vae, output, dtype, config.flip, data.encode_batch, data.num_workers)
        shards = plan_shards(dataset, config.frames_per_shard)
        about = _about(config, dataset, class_names, vae)
        left = [shard for shard in shards if not is_done(output / shard[0])]
        if accelerator.is_main_process:
            _check_same(output, about)
            _check_room(output, encoder, left)
            _begin(output, about, bool(left))
        accelerator.wait_for_everyone()
        numbers = range(accelerator.process_index, len(left), accelerator.num_processes)
        encoder.write([left[number] for number in numbers], accelerator.is_main_process)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _finish(output, about, [name for name, _ in shards], dataset)
        accelerator.wait_for_everyone()
    return output


def _about(
    config: EncodeConfig,
    dataset: ClipDataset | ImageDataset,
    class_names: list[str] | None,
    vae: AutoencoderKL | AutoencoderTiny,
) -> dict[str, Any]:
    """What makes the latents what they are."""
    entries = [[name_of(dataset, clip), entry.frames] for clip, entry in enumerate(dataset.entries)]
    about = {
        "format": FORMAT,
        "is_video": isinstance(dataset, ClipDataset),
        "size": dataset.size,
        "class_names": class_names,
        "vae": config.vae,
        "vae_config": {name: value for name, value in vae.config.items() if not name.startswith("_")},
        "vae_hash": hash_weights(vae.state_dict()),
        "scaling_factor": vae.config.scaling_factor,
        "flip": config.flip,
        "dtype": config.dtype,
        "frames_per_shard": config.frames_per_shard,
        "files": hashlib.sha256(json.dumps(entries).encode()).hexdigest(),
    }
    return json.loads(json.dumps(about))  # as it is read again, without tuples


def _check_same(output: Path, about: dict[str, Any]) -> None:
    """See that the folder holds no shard, or shards of the same latents."""
    if not any(output.glob("latents-*.safetensors")):
        return
    try:
        before = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{output} holds latents, but {SETTINGS}, which says of what, cannot be read: choose another output, "
            "or remove that folder."
        ) from error
    changed = [MEANING.get(name, name) for name in about if name != "vae" and before.get(name) != about[name]]
    if changed:
        raise UserError(
            f"{output} holds latents of another {', '.join(changed)}: choose another output, or remove that folder."
        )


def _check_room(output: Path, encoder: Encoder, shards: list[tuple[str, list[int]]]) -> None:
    frames = sum(encoder.dataset.entries[clip].frames for _, clips in shards for clip in clips)
    needed, free = frames * encoder.bytes_of_frame(), shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"The latents still to be written take {needed / 1e9:.3g} GB, and {output} has {free / 1e9:.3g} GB free: "
            "choose an output with more room, or flip=false, which halves them."
        )


def _begin(output: Path, about: dict[str, Any], incomplete: bool) -> None:
    """Remove what a killed call was writing, and note what the latents are; an index would promise too much."""
    remove_unfinished(output)
    if incomplete:
        (output / INDEX).unlink(missing_ok=True)
    with written_whole(output / SETTINGS) as temporary:
        temporary.write_text(json.dumps(about), encoding="utf-8")


def _finish(output: Path, about: dict[str, Any], names: list[str], dataset: ClipDataset | ImageDataset) -> None:
    parts = {name: read_about(output / name) for name in names}
    unreadable = [entry for part in parts.values() for entry in part["unreadable"]]
    check_share([entry["reason"] for entry in unreadable], dataset)
    index = dict(about)
    index["clips"] = [clip for part in parts.values() for clip in part["clips"]]
    index["unreadable"] = unreadable
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


def run(args: argparse.Namespace) -> None:
    """Encode, or verify what is there; a mistake that all processes make is told by the main one."""
    config = load_config(EncodeConfig, args.config, args.settings)
    if config.verify:
        return _verify(Path(config.output))
    try:
        output = encode_data(config)
    except UserError as error:
        if PartialState().is_main_process or isinstance(error, ShardError):
            raise
        raise SystemExit(2) from None
    if PartialState().is_main_process:
        index = read_index(output)
        size = sum(shard["bytes"] for shard in index["shards"].values())
        print(f"{len(index['clips'])} clips in {len(index['shards'])} shard(s), {size / 1e9:.3g} GB: {output}")
        if index["unreadable"]:
            print(f"{len(index['unreadable'])} clips could not be read and are left out (listed in {output / INDEX}).")
        print(f"Train from them: data.latents={output}")


def _verify(output: Path) -> None:
    if damaged := verify(output):
        raise UserError(f"{output}: {', '.join(damaged)} differ from their checksums: remove them and encode again.")
    print(f"All shards of {output} are as they were written.")
