"""Checkpoints of a run: written whole, pruned, found again, compared with the config that resumes them."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UserError
from .config import TrainConfig

__all__ = [
    "changed_settings",
    "check_same_inputs",
    "check_same_run",
    "checkpoint_folder",
    "find_checkpoint",
    "flat",
    "hash_names",
    "list_checkpoints",
    "prune",
    "read_trainer_state",
    "remove_leftovers",
    "write_checkpoint",
]

STATE_FILE = "trainer.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{7,})")

# With another value of these the resumed run would be another run; other settings may change on the way.
FIXED = ("model", "objective", "data.name", "data.arguments", "batch_size", "seed")
# ... but for these: where the data lie may change, what they are may not (`check_same_inputs`).
MAY_MOVE = [
    f"data.arguments.{name}"
    for name in ("root", "image_root", "split", "image_list", "index", "cache_dir", "max_bad_share")
]
# These neither change what is learnt nor need a word about it.
FREE = (
    "resume output log_every save_every keep_last export_dtype tracker preview max_dropped_steps "
    "init.from_ init.weights data.num_workers data.encode_batch data.precompute_latents "
    "compile kernels gradient_checkpointing micro_batch_size keep_every diagnostics fvd ema.on_cpu tf32 vae "
    "data.arguments.root data.arguments.image_root data.arguments.index data.arguments.cache_dir"
).split()


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return output / "checkpoints" / f"step-{step:07d}"


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first; what an interrupted write left is none."""
    found = []
    for folder in (output / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / STATE_FILE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def find_checkpoint(resume: str | None, output: Path) -> Path | None:
    """The checkpoint to start from, None for a new run.

    Args:
        resume: "latest" (a new run where there is none yet), a path, or None.

    Raises:
        UserError: The path is no checkpoint, or the run would mix with other checkpoints in its output.
    """
    if resume is None:
        if existing := list_checkpoints(output):
            raise UserError(
                f"{output} already holds checkpoints up to step {existing[-1][0]}: continue them with "
                "resume=latest, or choose another output."
            )
        return None
    if resume == "latest":
        existing = list_checkpoints(output)
        return existing[-1][1] if existing else None
    folder = Path(resume)
    if not (folder / STATE_FILE).is_file():
        example = checkpoint_folder(output, 500)
        raise UserError(f"resume={resume} is no complete checkpoint: give a folder such as {example}.")
    start = read_trainer_state(folder)["step"]
    newer = [step for step, _ in list_checkpoints(output) if step > start]
    if newer:
        raise UserError(
            f"{output} holds newer checkpoints than {folder.name} (up to step {newer[-1]}): remove those, "
            "or choose another output."
        )
    return folder


def write_checkpoint(
    folder: Path,
    state: dict[str, Any],
    write: Callable[[Path], None],
    is_main: bool,
    wait: Callable[[], None],
) -> None:
    """Write beside, flush to the disk, rename: a reader finds the whole checkpoint or none.

    Args:
        folder: Its final place.
        state: What `read_trainer_state` returns; written last.
        write: Called on every process with the temporary folder.
        is_main: Whether this process does what only one may do.
        wait: Returns when every process has called it.

    Raises:
        UserError: The disk is full or refuses; older checkpoints are untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait()
        write(partial)
        wait()
        if is_main:
            (partial / STATE_FILE).write_text(json.dumps({"format": FORMAT, **state}, indent=1), encoding="utf-8")
            _flush(partial)
            if folder.exists():  # saved at this step before
                folder.rename(folder.with_name(f".{folder.name}.replaced.partial"))
            partial.rename(folder)
            _flush_entry(folder.parent)
            remove_leftovers(folder.parent.parent)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"The checkpoint {folder} could not be written ({reason}): older ones are intact; make room, "
            "then start again with resume=latest."
        ) from error


def remove_leftovers(output: Path) -> None:
    """Delete what interrupted writes left; a checkpoint that was to be replaced, and was not, gets its name back."""
    for aside in (output / "checkpoints").glob(".step-*.replaced.partial"):
        whole = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced.partial"))
        if not whole.exists():
            aside.rename(whole)
    for folder in (output / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(output: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest checkpoints (0 keeps all) and those of every `keep_every`-th step."""
    for step, folder in list_checkpoints(output)[:-keep_last] if keep_last else []:
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first, so that an interrupted deletion leaves no half checkpoint under a good name.
        doomed = folder.with_name(f".{folder.name}.partial")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Step, counters and config of a checkpoint.

    Raises:
        UserError: Written in a format that this version does not know.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / STATE_FILE} is damaged: remove {folder}, and resume from an older one.") from error
    if state.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {state.get('format')}; this version reads format {FORMAT}.")
    return state


def check_same_run(saved: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Refuse to resume what the config no longer describes.

    Raises:
        UserError: Names each setting that differs.
    """
    changes = [change for change in _changes(saved, config) if _fixed(change[0])]
    if changes:
        words = "; ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in changes)
        raise UserError(f"{folder} belongs to another run ({words}): restore these settings or choose another output.")


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """Settings that alter the numbers from here on, as lines for the log."""
    return [
        f"{key} was {old!r}, is {new!r}"
        for key, old, new in _changes(saved, config)
        if not _fixed(key) and not _covered(key, FREE)
    ]


def hash_names(dataset: Any) -> str | None:
    """sha256 of the names of a data set's files, in order; None of one without files."""
    if not getattr(dataset, "entries", None):
        return None
    root = getattr(dataset, "root", None)
    names = (entry.path if root is None else entry.path.relative_to(root) for entry in dataset.entries)
    return hashlib.sha256("\n".join(name.as_posix() for name in names).encode()).hexdigest()


def check_same_inputs(saved: dict[str, Any], inputs: dict[str, str | None], folder: Path) -> None:
    """Refuse to resume on other files, whose order would be another, or with another autoencoder.

    Args:
        saved: State of the checkpoint.
        inputs: "files" and "vae", hashes of the run that resumes.

    Raises:
        UserError: They differ.
    """
    before = saved.get("inputs", inputs)
    if before["vae"] != inputs["vae"]:
        raise UserError(f"{folder} was trained with another autoencoder: set vae to that one, or start another output.")
    if before["files"] != inputs["files"]:
        raise UserError(
            f"{folder} was trained on other files (added, removed, damaged or mended since): restore them, or "
            "start another output with init.from=<the run's pipeline>."
        )


def _fixed(key: str) -> bool:
    return _covered(key, FIXED) and not _covered(key, MAY_MOVE)


def _covered(key: str, names: list[str] | tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _changes(saved: dict[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    old = flat(saved)
    new = flat(json.loads(json.dumps(dataclasses.asdict(config))))
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    settings = {}
    for name, value in values.items():
        settings |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return settings


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    """Make renames in a folder last (POSIX: a folder is flushed like a file)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
