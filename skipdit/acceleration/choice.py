"""Which parts of an acceleration suit a device, and why: decided from the device alone, nothing changed yet."""

import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..kernels import available

__all__ = ["CHOICES", "Choice", "choose", "compiler_for", "compiles_decoder", "has_bf16"]

CHOICES = ("kernels", "blocks", "graphs", "modulation", "decoder")
"""Parts that `pipe.compile` can be told to leave out (False) or to insist on (True)."""


@dataclass(frozen=True)
class Choice:
    """One part.

    Attributes:
        name: Of `CHOICES`, or "dtype" or "float8".
        on: Whether it is turned on.
        reason: Why, or why not, as a part of a sentence.
    """

    name: str
    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'+' if self.on else '-'} {self.name}: {self.reason}"


def choose(device: torch.device, wanted: dict[str, bool | None]) -> list[Choice]:
    """Settle every part of `CHOICES`.

    Args:
        device: Of the pipeline.
        wanted: Part -> True (insisted on), False (left out) or None (as suits the device).

    Raises:
        ValueError: A part is not known, or one that is insisted on cannot be had; the message says why.
    """
    if unknown := set(wanted) - set(CHOICES):
        raise ValueError(f"No part {sorted(unknown)[0]!r} to compile: choose from {', '.join(CHOICES)}.")
    choices = []
    for name in CHOICES:
        want = wanted.get(name)
        if want is False:
            choices.append(Choice(name, False, "left out as asked"))
            continue
        can, pays, reason = _JUDGES[name](device)
        if want and not can:
            raise ValueError(f"compile({name}=True) is not possible: {reason}.")
        elif want and not pays:
            choices.append(Choice(name, True, f"as asked, though {reason}"))
        else:
            choices.append(Choice(name, can and pays, reason))
    return choices


# Device -> whether a part can be had, whether it pays, and why (not). What pays on CPUs was measured
# (docs/speed.md); other devices than CPUs and CUDA's have not been tried and keep the plain path.
Judgement = tuple[bool, bool, str]


def _kernels(device: torch.device) -> Judgement:
    can, reason = available(device)
    return can, can, reason


def _blocks(device: torch.device) -> Judgement:
    compiler, reason = compiler_for(device)
    if not compiler:
        return False, False, reason
    decoder = " and the autoencoder's decoder" if compiles_decoder(device) else ""
    return True, True, f"compiled with the joins of skips and the final layer{decoder}, by {reason}"


def _graphs(device: torch.device) -> Judgement:
    if device.type != "cuda":
        return False, False, f"{device} is not a CUDA device"
    if torch.version.hip:
        return True, False, "they have not been tried on ROCm"
    return True, True, "a full and a reused step are launched as a whole"


def _modulation(device: torch.device) -> Judgement:
    if device.type not in ("cpu", "cuda"):
        return True, False, f"it has not been tried on {device.type}"
    return True, True, "adaLN's vectors of all steps come from one product a block, ahead of the loop"


def _decoder(device: torch.device) -> Judgement:
    if device.type not in ("cpu", "cuda"):
        return True, False, f"it has not been tried on {device.type}"
    return True, True, "the autoencoder's convolutions run channels last"


_JUDGES = {
    "kernels": _kernels,
    "blocks": _blocks,
    "graphs": _graphs,
    "modulation": _modulation,
    "decoder": _decoder,
}


@lru_cache
def compiler_for(device: torch.device) -> tuple[str, str]:
    """What torch.compile uses on a device, found by compiling a line.

    Returns:
        Its name ("" if it does not work), and the same or why not as a part of a sentence.
    """
    if device.type not in ("cuda", "cpu") or torch.version.hip or os.name != "posix":
        return "", f"torch.compile has not been tried on {device.type} under {platform.system()}"
    name = "Triton" if device.type == "cuda" else "a C++ compiler"
    try:
        torch.compile(_line, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, a broken one, no Triton, a card that is too old
        told = str(error).strip().splitlines() or [type(error).__name__]
        return "", f"torch.compile, which needs {name} here, fails ({told[0][:200]})"
    return name, f"torch.compile with {name}"


def _line(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def compiles_decoder(device: torch.device) -> bool:
    """Whether `blocks` compiles the autoencoder's decoder too: on CPUs decoding is a small share of sampling."""
    return device.type == "cuda"


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32; of processors, whether they say so."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
