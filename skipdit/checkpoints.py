"""Reading weights: any published or own file -> state dict. Pickles are read weights-only."""

import argparse
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import UserError

PREFIXES = ("module.", "_orig_mod.")
PREFERRED = ("ema", "model", "state_dict")


def load_state_dict(path: str | Path, prefer: str = "ema") -> dict[str, torch.Tensor]:
    """Read the weights of one model.

    Args:
        path: `.safetensors`, or a torch pickle: a bare state dict, `{"ema": ...}`, or a training checkpoint
            `{"model", "ema", "opt", "args"}` (whose argparse.Namespace is the one class admitted by name).
        prefer: Which weights of a training checkpoint: "ema" or "model".

    Returns:
        Names without the prefixes of DataParallel and torch.compile -> tensors on the CPU.

    Raises:
        UserError: The file is missing, is no weights file, holds something else than weights, or lacks those asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: pass the path of a .pt or .safetensors file.")
    content = _read(path)
    present = [key for key in PREFERRED if isinstance(content.get(key), dict)]
    if prefer != PREFERRED[0] and present and prefer not in present:
        raise UserError(f"{path} has no weights {prefer!r}, only {', '.join(present)}.")
    for key in (prefer, *PREFERRED):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {strip_prefixes(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise UserError(f"{path} holds no tensors under any of {', '.join(PREFERRED)} or at its top level.")
    return weights


def strip_prefixes(name: str) -> str:
    """Parameter name without `module.` and `_orig_mod.`, however often they occur in front."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _read(path: Path) -> dict:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as weights ({_first_line(error)}): {_guess(path)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


def _guess(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        return "it is a web page; the link pointed to a page about the file, download it again."
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the file itself with 'git lfs pull' or download it again."
    return "it is damaged, or holds objects other than tensors, which are not loaded because they could run code."
