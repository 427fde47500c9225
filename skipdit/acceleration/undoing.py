"""Changes to a module that can be taken back bit for bit: each returns the call that does so."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..kernels import KERNELS
from ..models.layers import FLOAT8_LAYERS, FinalLayer, join_skip, use_float8, use_kernels

__all__ = ["recast", "turn_on_blocks", "turn_on_compiled", "turn_on_float8", "turn_on_kernels"]

Undo = Callable[[], None]
VARIANTS = 64  # compiled forms of one function


def recast(module: nn.Module, dtype: torch.dtype | None = None, channels_last: bool = False) -> Undo:
    """Give a module's floating-point tensors another dtype or the channels-last order; the old ones are kept.

    Undoing puts back the very tensors, unless they were moved or changed meanwhile: those keep what they hold and get
    their former dtype and order.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.dtype]] = []

    def undo() -> None:
        for tensor, old, given in kept:
            now = tensor.data
            if now.device == old.device and now.dtype == given and torch.equal(old.to(given), now):
                tensor.data = old
            else:
                order = torch.contiguous_format if channels_last and now.ndim == 4 else torch.preserve_format
                tensor.data = now.to(dtype=old.dtype if now.dtype == given else now.dtype, memory_format=order)

    try:
        for tensor in chain(module.parameters(), module.buffers()):
            old = tensor.data
            if old.is_floating_point():
                order = torch.channels_last if channels_last and old.ndim == 4 else torch.preserve_format
                tensor.data = old.to(dtype=dtype or old.dtype, memory_format=order)
                kept.append((tensor, old, tensor.dtype))
    except BaseException:  # out of memory, for example
        undo()
        raise
    return undo


def turn_on_kernels(model: nn.Module) -> Undo:
    """`use_kernels`, remembering what was on before."""
    before = [(module, module.kernels) for module in model.modules() if hasattr(module, "kernels")]
    use_kernels(model, KERNELS)

    def undo() -> None:
        for module, names in before:
            module.kernels = names

    return undo


def turn_on_float8(model: nn.Module, names: Sequence[str]) -> Undo:
    """`use_float8`, keeping the layers that it replaces.

    Raises:
        ValueError: It cannot be used.
    """
    layers = dict(FLOAT8_LAYERS.values())
    kept = [
        (module, name, getattr(module, name)) for module in model.modules() for name in layers.get(type(module), ())
    ]

    def undo() -> None:
        for module, name, layer in kept:
            setattr(module, name, layer)

    try:
        use_float8(model, names)
    except BaseException:
        undo()
        raise
    return undo


def turn_on_blocks(model: nn.Module, **options: Any) -> Undo:
    """Compile the repeated block, the joining of skips and the final layer, each by itself (regional compilation).

    Blocks share their compiled code, so the time to start does not grow with the depth. The hidden states enter the
    first block in the order of all others, or that block would need code of its own.

    Args:
        model: A backbone.
        **options: For `torch.compile`.
    """
    _allow_variants()
    handle = model.x_embedder.register_forward_hook(_in_order)
    blocks = [m for m in model.modules() if type(m).__name__ in model._repeated_blocks or isinstance(m, FinalLayer)]
    undo_blocks = turn_on_compiled(blocks, **options)
    model.join_skip = torch.compile(join_skip, **options)

    def undo() -> None:
        handle.remove()
        del model.join_skip
        undo_blocks()

    return undo


def _in_order(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous()


def turn_on_compiled(modules: Sequence[nn.Module], **options: Any) -> Undo:
    """Compile modules in place, each by itself."""
    before = [(module, module._compiled_call_impl) for module in modules]
    for module in modules:
        module.compile(**options)

    def undo() -> None:
        for module, call in before:
            module._compiled_call_impl = call

    return undo


def _allow_variants() -> None:
    """A block has code for attention over patches, over frames, and over frames with positions, each for one size and
    then for any; beyond torch's limit of 8 it would silently run uncompiled. A limit alters no result, so it stays."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), VARIANTS))
