"""A recorder that does on the CPU what a CUDA graph does: kernels run again on the same memory, Python does not."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def _alias(leaf: object) -> object:
    """The same memory, whatever becomes of the tensor that pointed there."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        seen = tree_map(_alias, args), tree_map(_alias, kwargs)
        result = function(*args, **kwargs)
        self.calls.append((function, *seen, tree_map(_alias, result)))
        return result


def replaying(call: Callable[[], None]) -> Callable[[], None]:
    """Record a call, as `skipdit.acceleration.graphs.record_on_cuda` does; returns what replays it."""
    call()
    with _Log() as log:
        call()

    def replay() -> None:
        with torch.no_grad():
            for function, args, kwargs, result in log.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    return replay
