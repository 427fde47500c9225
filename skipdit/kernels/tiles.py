"""Sizes of tiles and groups: a tile's sides are powers of two, what it covers need not be."""

import contextlib

import torch

__all__ = ["groups_of", "on_device", "power_of_two", "split"]

LEAST = 16  # the smallest side that a matrix product takes


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def split(size: int) -> tuple[int, int]:
    """Two tile sides that cover `size` with little waste; the second is 0 if one suffices.

    Example:
        >>> split(72), split(64), split(120), split(8)
        ((64, 16), (64, 0), (64, 64), (16, 0))
    """
    whole = power_of_two(size, LEAST)
    low = whole // 2
    if whole == size or low < LEAST:
        return whole, 0
    return low, power_of_two(size - low, LEAST)


def groups_of(shape: torch.Size, vectors: torch.Size) -> int | None:
    """How many groups of consecutive rows share a vector: the axes where both agree come first, then ones.

    Example:
        >>> groups_of((2, 16, 256, 1152), (2, 1, 1, 1152)), groups_of((2, 16, 256, 1152), (2, 16, 1, 1152))
        (2, 32)
    """
    groups, shared = 1, False
    for size, of_vectors in zip(shape[:-1], vectors[:-1], strict=True):
        if of_vectors != size and of_vectors != 1:
            return None
        if of_vectors != size:
            shared = True
        elif shared and size != 1:
            return None  # for example [1, F, 1, D]
        else:
            groups *= size
    return groups


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launch where the tensor lies, which need not be the current device."""
    return torch.cuda.device_of(tensor)
