"""Where the Triton kernels run: one rule for all of them, and one log line where they do not."""

import importlib.util
import logging
import os
import shutil
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

__all__ = ["DTYPES", "available", "usable"]

log = logging.getLogger("skipdit.kernels")

MIN_CAPABILITY = (8, 0)  # bf16 matrix units; older cards lack them
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the kernels run on a device.

    Args:
        device: For example "cuda", "cuda:1" or "cpu".

    Returns:
        Whether they do, and what runs them or why they do not, as a part of a sentence.

    Example:
        >>> available("cpu")
        (False, 'cpu is not a CUDA device')
    """
    return _available(str(device))


@lru_cache
def _available(name: str) -> tuple[bool, str]:
    device = torch.device(name)
    if device.type != "cuda":
        return False, f"{name} is not a CUDA device"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    if torch.version.hip:
        return False, "they have not been tried on ROCm"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang", "cc") if name):
        return False, "Triton needs a C compiler, such as gcc"
    capability, card = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < MIN_CAPABILITY:
        return False, f"{card} has compute capability {_dotted(capability)}, and {_dotted(MIN_CAPABILITY)} is needed"
    return True, f"Triton {_triton_version()} on {card} (compute capability {_dotted(capability)})"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:  # some distributions of PyTorch rename the package
        return "of unknown version"


def usable(name: str, *tensors: torch.Tensor, obstacle: str = "") -> bool:
    """Whether a kernel takes these tensors; tells once for each reason why one does not.

    Decided from devices, types and shapes alone, so a compiled graph holds the answer as a constant.

    Args:
        name: Of the kernel, for the log.
        tensors: Everything that it reads.
        obstacle: A reason that the caller has found, such as a sequence that is too long.
    """
    device = tensors[0].device
    for tensor in tensors:
        if type(tensor) not in PLAIN_TENSORS:
            obstacle = obstacle or "they are no plain tensors"
        elif tensor.dtype not in DTYPES:
            obstacle = obstacle or f"they are of {tensor.dtype}"
        elif tensor.device != device:
            obstacle = obstacle or "they lie on several devices"
    return _decide(name, device.type, device.index, obstacle)


@torch.compiler.assume_constant_result
def _decide(name: str, device: str, index: int | None, obstacle: str) -> bool:
    can_run, reason = available(device if index is None else f"{device}:{index}")
    if not can_run:
        _tell(logging.WARNING, f"The {name} kernel is not used, because {reason}; PyTorch's own operations are.")
    elif obstacle:
        _tell(logging.INFO, f"The {name} kernel is not used for some inputs, because {obstacle}.")
    return can_run and not obstacle


@lru_cache
def _tell(level: int, line: str) -> None:
    log.log(level, line)
