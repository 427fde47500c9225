"""Reading the weights of feature networks: known by their hash, and without running what a file says.

A figure computed with other weights is another metric, so a file that is not the known one is refused.
"""

import hashlib
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError

__all__ = ["I3D_WEIGHTS", "INCEPTION_WEIGHTS", "WeightFile", "i3d_state_dict", "read_arrays", "read_script"]


@dataclass(frozen=True)
class Known:
    """Weights that the download command fetches: their id in its registry, file name and SHA-256."""

    registry_id: str
    file_name: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where the download command puts them, from the root of the checkout."""
        return Path("pretrained/metrics") / self.file_name

    @property
    def command(self) -> str:
        """What fetches them."""
        return f"'python pretrained/download_ckpts.py {self.registry_id}'"


I3D_WEIGHTS = Known(
    "metrics/i3d-kinetics-400",
    "i3d-kinetics-400.ckpt",
    "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
)
INCEPTION_WEIGHTS = Known(
    "metrics/inception-v3",
    "inception-v3.pt",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)


class WeightFile:
    """The content of a file of weights, read once, so that what was hashed is what is used.

    Args:
        known: The weights that are expected.
        path: The file; None: where the download command puts them.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """

    def __init__(self, known: Known, path: str | Path | None = None):
        self.known, self.path = known, Path(path or known.path)
        try:
            self.content = self.path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"No weights at {self.path}: fetch them with {known.command}.") from None
        except OSError as error:
            raise UserError(f"Cannot read the weights {self.path} ({error.strerror}).") from error
        self.sha256 = hashlib.sha256(self.content).hexdigest()

    @property
    def is_script(self) -> bool:
        """Whether this is a TorchScript archive, by its content."""
        if not zipfile.is_zipfile(io.BytesIO(self.content)):
            return False
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            return any("/code/" in name for name in archive.namelist())

    def verify(self) -> None:
        """Raise UserError unless this is the known file."""
        if self.sha256 != self.known.sha256:
            raise UserError(
                f"{self.path} is not {self.known.registry_id} (its SHA-256 starts with {self.sha256[:12]}, not "
                f"{self.known.sha256[:12]}): remove it and fetch it with {self.known.command}."
            )


def read_script(file: WeightFile, device: str | torch.device) -> torch.jit.ScriptModule:
    """The TorchScript module of a file, in evaluation mode.

    Raises:
        UserError: It cannot be loaded.
    """
    try:
        return torch.jit.load(io.BytesIO(file.content), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{file.path} cannot be loaded as TorchScript: fetch it again.") from error


# What numpy's arrays are made of when they are pickled, under the module names of numpy 1 and 2.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays, and containers, strings and numbers, which need no global; calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """A pickle of nested dicts of float32 arrays as one dict; the keys of a path are joined by '/'.

    Nothing but numpy's arrays is made, whatever the pickle asks for.

    Raises:
        ValueError: It is no such pickle.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"not a pickle of arrays ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"not a dict of arrays but {type(tree).__name__}")
    return _flatten(tree, "")


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, np.ndarray]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found = _flatten(value, f"{name}/")
        elif isinstance(value, np.ndarray) and value.dtype == np.float32:
            found = {name: value}
        else:
            raise ValueError(f"{name} is no float32 array")
        if twice := flat.keys() & found.keys():  # a key may itself hold a '/'
            raise ValueError(f"{min(twice)} is there twice")
        flat |= found
    return flat


BATCH_NORM_EPS = 1e-3


def i3d_state_dict(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The published arrays as weights of `I3D`: transposed, batch norm folded, every array used once.

    A kernel [T, H, W, in, out] becomes [out, in, T, H, W] times 1 / sqrt(var + 0.001) of the batch norm behind it,
    which has no scale; its shift becomes the bias: shift - mean / sqrt(var + 0.001). Computed in float64.

    Args:
        arrays: Name -> array, as `read_arrays` gives them.

    Raises:
        ValueError: An array is missing or left over.
    """
    left = dict(arrays)
    state = {}
    for name in [name for name in arrays if name.endswith("/kernel")]:
        layer = name.removeprefix("params/").removesuffix("/Conv_0/kernel")
        kernel = left.pop(name).astype(np.float64).transpose(4, 3, 0, 1, 2)
        if layer.startswith("Logits/"):
            module, bias = layer, _take(left, f"params/{layer}/Conv_0/bias")
        else:
            module = f"trunk/{layer}"
            mean, variance = (_take(left, f"batch_stats/{layer}/BatchNorm_0/{part}") for part in ("mean", "var"))
            scale = 1 / np.sqrt(variance + BATCH_NORM_EPS)
            kernel = kernel * scale[:, None, None, None, None]
            bias = _take(left, f"params/{layer}/BatchNorm_0/bias") - mean * scale
        module = module.replace("/", ".")
        state[f"{module}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel)).float()
        state[f"{module}.bias"] = torch.from_numpy(bias).float()
    if left:
        raise ValueError(f"{len(left)} arrays left over, the first is {min(left)}")
    return state


def _take(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"no array {name}")
    return arrays.pop(name).astype(np.float64).reshape(-1)
