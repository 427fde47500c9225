"""The folder that a set of samples is collected in: what belongs there, what is still missing, what it is of."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.latents import hash_file
from ..errors import UserError
from ..files import remove_unfinished, written_whole
from ..media import Pixels, join_npz, npz_array, npz_shape, write_frames, write_png
from .planning import SamplePlan

__all__ = ["MANIFEST", "Collection"]

MANIFEST, WHOLE, SHARDS, FRAMES, PICTURES = "samples.json", "samples.npz", "shards", "frames", "pictures"
FREE = (
    *("num_samples", "output", "format", "device", "fps"),
    *("model", "checkpoint", "vae", "class_names", "classes", "labels"),
)
"""Settings that do not alter a sample, or that another entry of the manifest stands for."""
FORMAT = 1


class Collection:
    """Samples 0 to count - 1 in a folder.

    shards/00000.npz, ...: `arr_0` uint8 [n, T, H, W, 3] or [n, H, W, 3], and `labels` int64 [n] (format "shards");
    samples.npz: all of them in one such file ("npz"); frames/<class>/000000/00000.png: a folder of frames for each
    clip ("frames"); pictures/<class>/000000.png ("png"); samples.json: what they are, with "complete": true at last.
    Without classes that folder is left out. Every file is written beside and renamed, so what is there is whole.

    Args:
        folder: It exists.
        plan: The samples.
    """

    def __init__(self, folder: Path, plan: SamplePlan):
        self.folder, self.plan = folder, plan
        self.formats = set(plan.config.format) or ({"shards"} if plan.source.is_video else {"npz"})
        self.kept = self.formats  # and those of earlier calls, once these are known to be of the same samples
        self.shape = plan.source.shape(plan.config.image_size, plan.config.num_frames)
        size = plan.config.samples_per_shard if self.formats & {"npz", "shards"} else 1
        self.parts = [range(first, min(first + size, plan.count)) for first in range(0, plan.count, size)]

    # ------------------------------------------------------------------ what is there

    def missing_parts(self) -> list[list[int]]:
        """Indices still to be sampled, part by part; a part that becomes a shard is missing as a whole."""
        missing = []
        for part in self.parts:
            if self._lacks_shard(part):
                missing.append(list(part))
            else:
                missing.append([index for index in part if not self._has_files(index)])
        return [part for part in missing if part]

    def _lacks_shard(self, part: Sequence[int]) -> bool:
        for_whole = "npz" in self.formats and not self._has_whole
        wanted = "shards" in self.formats or for_whole
        return wanted and npz_shape(self._shard(part)) != (len(part), *self.shape)

    @cached_property
    def _has_whole(self) -> bool:
        """Whether the one file with all was there at the start."""
        return npz_shape(self.folder / WHOLE) == (self.plan.count, *self.shape)

    def _has_files(self, index: int) -> bool:
        return all(path.exists() for path in self._files_of(index))

    def _files_of(self, index: int) -> list[Path]:
        """Its folder of frames or its picture, where asked for."""
        inner = self.plan.caption(index).replace("/", "_").strip(". ")
        paths = {"frames": Path(FRAMES, inner, f"{index:06d}"), "png": Path(PICTURES, inner, f"{index:06d}.png")}
        return [self.folder / path for name, path in paths.items() if name in self.formats]

    def _shard(self, part: Sequence[int]) -> Path:
        return self.folder / SHARDS / f"{self._number(part):05d}.npz"

    def _number(self, part: Sequence[int]) -> int:
        return part[0] // len(self.parts[0])

    # ------------------------------------------------------------------ what it is of

    @cached_property
    def about(self) -> dict[str, Any]:
        """What makes the samples what they are; two folders of equal fingerprints hold equal samples."""
        plan = self.plan
        settings = {name: value for name, value in asdict(plan.config).items() if name not in FREE}
        about = {
            "format": FORMAT,
            "kind": plan.kind,
            "shape": self.shape,
            **settings,
            "cache": "off" if plan.cache is None else str(plan.cache),
            "cache_shallow": plan.cache and plan.cache.shallow,
            "device": plan.device.type,
            "model": _hash_model(plan),
            "class_names": plan.source.class_names,
            "labels": plan.labels,
        }
        if plan.device.type == "cpu":
            del about["batch_size"]  # has no effect there
        about = json.loads(json.dumps(about))  # as it is read again, without tuples
        known = {"frame_interval": plan.source.frame_interval}  # for an evaluation; the samples do not depend on it
        return known | about | {"fingerprint": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}

    def check(self) -> None:
        """See that the folder is free or holds samples of these settings, and that there is room for the rest.

        Raises:
            UserError: It does not, or there is not.
        """
        found = [name for name in (WHOLE, SHARDS, FRAMES, PICTURES) if (self.folder / name).exists()]
        if found:
            self._check_same(found[0])
        needed, free = self._bytes_needed(), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"The samples still to be written take up to {needed / 1e9:.3g} GB, and {self.folder} has "
                f"{free / 1e9:.3g} GB free: choose an output with more room."
            )

    def _check_same(self, found: str) -> None:
        try:
            before = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder} holds {found}, but {MANIFEST}, which says of what settings, cannot be read: choose "
                "another output, or remove that folder."
            ) from error
        changed = [name for name in self.about if name != "fingerprint" and before.get(name) != self.about[name]]
        if changed:
            raise UserError(
                f"{self.folder} holds samples of other settings ({', '.join(map(self._shown(before), changed))}): "
                "choose another output, or remove that folder."
            )
        self.kept = self.formats | set(before.get("formats", ()))

    def _shown(self, before: dict[str, Any]):
        def show(name: str) -> str:
            old, new = before.get(name), self.about[name]
            short = all(len(str(value)) < 20 for value in (old, new))
            return f"{name}={old}, not {new}" if short else f"another {name}"

        return show

    def _bytes_needed(self) -> int:
        """At most; frames and pictures are compressed."""
        sample = 1
        for side in self.shape:
            sample *= side
        copies = len(self.formats & {"frames", "png"}) + bool(self.formats & {"npz", "shards"})
        needed = sum(map(len, self.missing_parts())) * sample * copies
        if "npz" in self.formats and not self._has_whole:
            needed += self.plan.count * sample
        return needed

    # ------------------------------------------------------------------ writing

    def begin(self, incomplete: bool) -> None:
        """Remove what killed calls left half-written, and note what the samples are, and if some are missing."""
        for name in (SHARDS, FRAMES, PICTURES):  # nothing else in that folder is ours to remove
            remove_unfinished(self.folder / name)
        for holder in self.folder.glob(f".{Path(WHOLE).stem}.*"):
            shutil.rmtree(holder, ignore_errors=True)
        if incomplete:
            self._write_manifest(complete=False)

    def open_shard(self, part: Sequence[int], stack: ExitStack) -> Pixels | None:
        """The array of a missing shard, to be filled; None if only other files of the part are missing."""
        if not self.formats & {"npz", "shards"} or not self._lacks_shard(self.parts[self._number(part)]):
            return None
        shape = (len(part), *self.shape)
        return stack.enter_context(npz_array(self._shard(part), shape, self._labels(part)))

    def write_files(self, index: int, sample: Pixels) -> None:
        """Its frames or its picture, where asked for and missing."""
        for path in self._files_of(index):
            if not path.exists():
                (write_png if path.suffix else write_frames)(path, sample)

    def finish(self) -> None:
        """Join the shards into one file if asked for, and say that all is there."""
        if "npz" in self.formats and not self._has_whole:
            shards = [self._shard(part) for part in self.parts]
            join_npz(self.folder / WHOLE, shards, (self.plan.count, *self.shape), self._labels(range(self.plan.count)))
        self._write_manifest(complete=True)
        if "shards" not in self.kept and "npz" in self.kept:
            shutil.rmtree(self.folder / SHARDS, ignore_errors=True)

    def files(self) -> list[str]:
        """Names of what is in the folder."""
        names = {"npz": WHOLE, "shards": SHARDS, "frames": FRAMES, "png": PICTURES}
        folders = [name if name == WHOLE else f"{name}/" for word, name in names.items() if word in self.formats]
        return [*folders, MANIFEST]

    def _labels(self, part: Sequence[int]) -> list[int] | None:
        labels = self.plan.labels
        return None if labels is None else [labels[index] for index in part]

    def _write_manifest(self, complete: bool) -> None:
        with written_whole(self.folder / MANIFEST) as temporary:
            about = self.about | {"formats": sorted(self.kept), "complete": complete}
            temporary.write_text(json.dumps(about), encoding="utf-8")


def _hash_model(plan: SamplePlan) -> str:
    """SHA-256 of all that the model is read from; an autoencoder of a hub stands by its name."""
    source = plan.source
    if source.folder is not None:
        files = [path for part in ("transformer", "vae", "scheduler") for path in (source.folder / part).glob("*")]
        digest = hashlib.sha256()
    else:
        files = [source.checkpoint, *Path(source.vae).glob("*")]
        digest = hashlib.sha256(json.dumps([plan.config.model, source.vae]).encode())
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.name} {_hash_settings(path) if path.suffix == '.json' else hash_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_settings(path: Path) -> str:
    """SHA-256 of a configuration without what diffusers notes of versions and places."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if not name.startswith("_") or name == "_class_name"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
