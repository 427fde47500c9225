"""Floating-point operations of a forward, counted from the sizes alone, and the speed-up that they allow.

Counted is what matrix units do: linear layers, the two products of attention and the patch convolution, a
multiply and an add as two operations (as `torch.utils.flop_counter` does). Norms, activations, softmax,
modulation, gates and residual sums are not counted: they are memory traffic, and one reason why a step takes
longer than its count says.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import SkipBackbone

__all__ = ["Operations", "count_operations", "speedup_bound"]

TIMESTEP_FREQUENCIES = 256  # sinusoids that the timestep embedder starts from


@dataclass(frozen=True)
class Operations:
    """Operations of one forward by kind.

    Attributes:
        embedding: Patch convolution and timestep MLP.
        modulation: Linear layers of adaLN in the blocks.
        linears: qkv, projection and MLP of the blocks.
        attention: Products of queries with keys and of weights with values.
        skips: Linear layers that join the long skips.
        final: Final layer with its adaLN.
    """

    embedding: int
    modulation: int
    linears: int
    attention: int
    skips: int
    final: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def count_operations(
    model: "SkipBackbone", shape: Sequence[int], shallow: int | None = None, reused: bool = False
) -> Operations:
    """Count a forward without running it.

    Args:
        model: Its config is read; it may be on the meta device.
        shape: Of the model's input: [B, C, F, h, w] for clips, [B, C, h, w] for pictures; B as the network
            sees it, doubled by guidance.
        shallow: Units that run at each end on a reused step.
        reused: Count the reuse path instead of the full one.

    Raises:
        ValueError: A reused step of a model without long skips, or `shallow` out of range.
    """
    if reused:
        if shallow is None:
            raise ValueError("A reused step needs shallow, the number of units that run at each end.")
        model.check_paths(shallow, None)
    cfg = model.config
    batch, height, width = shape[0], shape[-2], shape[-1]
    frames = shape[2] if len(shape) == 5 else 1
    dim, patch = cfg.hidden_size, cfg.patch_size
    patches = (height // patch) * (width // patch)
    tokens = batch * frames * patches
    units = 2 * shallow if reused else model.num_units
    blocks = units * model.blocks_per_unit
    joined = (shallow if reused else model.num_units // 2) if cfg.skip else 0
    # A unit of Latte is a block over the patches of a frame and one over the frames of a patch.
    attended = patches + frames if model.blocks_per_unit == 2 else patches

    hidden = int(dim * cfg.mlp_ratio)
    values_per_patch = patch * patch * cfg.in_channels
    return Operations(
        embedding=2 * tokens * values_per_patch * dim + 2 * batch * (TIMESTEP_FREQUENCIES + dim) * dim,
        modulation=blocks * 2 * batch * dim * 6 * dim,
        linears=blocks * 2 * tokens * (3 * dim * dim + dim * dim + 2 * dim * hidden),
        attention=units * 2 * (2 * tokens * attended * dim),
        skips=joined * 2 * tokens * 2 * dim * dim,
        final=2 * batch * dim * 2 * dim + 2 * tokens * dim * values_per_patch * (2 if cfg.learn_sigma else 1),
    )


def speedup_bound(schedule: Sequence[bool], share: float) -> float:
    """Speed-up of a trajectory if a reused step cost exactly its share of a full one.

    Args:
        schedule: One entry a sampler step, True for a full one, as `SkipCacheConfig.schedule` gives it.
        share: Cost of a reused step / cost of a full step, 0..1.
    """
    full = sum(schedule)
    return len(schedule) / (full + share * (len(schedule) - full))
