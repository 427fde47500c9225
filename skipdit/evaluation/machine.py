"""What figures were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__

__all__ = ["describe_machine", "hardware", "software"]


def describe_machine(device: torch.device) -> str:
    """Device and versions, in a line."""
    machine, versions = hardware(device), software()
    cuda = f", CUDA {versions['cuda']}" if versions["cuda"] else ""
    return (
        f"{machine['device']}, {machine['threads']} of {machine['cores']} cores; torch {versions['torch']}{cuda}, "
        f"diffusers {versions['diffusers']}, Python {versions['python']}, skipdit {versions['skipdit']}"
    )


def hardware(device: torch.device) -> dict[str, Any]:
    """Name of the device, cores, threads, and the load of the last minute."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"device": name, "cores": usable, "threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        found["load"] = os.getloadavg()[0]  # of the last minute, this run included
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def software() -> dict[str, str | None]:
    """Versions of what figures depend on."""
    return {
        "skipdit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": version("diffusers"),
    }
