"""Clips in array files, read a few at a time: .npz (`arr_0`), .npy, .pt."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError

__all__ = ["ARRAY_SUFFIXES", "array_shape", "read_clips"]

ARRAY_SUFFIXES = {".npz", ".npy", ".pt"}
MEMBER = "arr_0.npy"


def array_shape(path: Path) -> tuple[int, ...]:
    """Shape of the clips in a file; they are not read.

    Raises:
        UserError: It cannot be read, or holds no uint8 clips [N, T, H, W, 3] nor pictures [N, H, W, 3].
    """
    try:
        shape, dtype = _header(path)
    except Exception as error:  # each format's reader has its own errors
        raise UserError(f"{path} cannot be read as an array of clips ({_first_sentence(error)}).") from error
    if dtype != "uint8" or len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
        raise UserError(f"{path} holds {dtype} {list(shape)}: uint8 [N, T, H, W, 3] or [N, H, W, 3] is needed.")
    return shape


def read_clips(path: Path, batch_size: int) -> Iterator[torch.Tensor]:
    """The clips of a file, uint8 [n, T, H, W, 3] or [n, H, W, 3]; memory holds a batch, not the file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        yield from _read_npz(path, batch_size) if path.suffix == ".npz" else _read_mapped(path, batch_size)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({_first_sentence(error)}).") from error


def _header(path: Path) -> tuple[tuple[int, ...], str]:
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as stream:
            shape, _, dtype = _npy_header(stream)
            return shape, str(dtype)
    array = _map(path)
    return tuple(array.shape), str(array.dtype).removeprefix("torch.")


def _map(path: Path) -> np.ndarray | torch.Tensor:
    if path.suffix == ".npy":
        return np.lib.format.open_memmap(path, mode="r")  # np.load takes what is no array for a pickle
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_mapped(path: Path, batch_size: int) -> Iterator[torch.Tensor]:
    array = _map(path)
    for first in range(0, len(array), batch_size):
        part = array[first : first + batch_size]
        yield part.clone() if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part))


def _read_npz(path: Path, batch_size: int) -> Iterator[torch.Tensor]:
    with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as stream:
        shape, in_fortran_order, _ = _npy_header(stream)
        if in_fortran_order:
            raise ValueError("the array is stored column by column")
        size = int(np.prod(shape[1:]))
        for first in range(0, shape[0], batch_size):
            many = min(batch_size, shape[0] - first)
            data = stream.read(many * size)
            if len(data) != many * size:
                raise EOFError("it ends too early")
            yield torch.from_numpy(np.frombuffer(bytearray(data), np.uint8).reshape(many, *shape[1:]))


def _npy_header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")[:200] or type(error).__name__
