"""What is remembered between the steps of one trajectory."""

from dataclasses import dataclass, field

import torch
from diffusers.hooks.hooks import BaseState


@dataclass
class CacheStats:
    """Forward passes of the last trajectory.

    Attributes:
        full: Passes that ran every unit.
        reused: Passes that took the remembered features.
    """

    full: int = 0
    reused: int = 0

    @property
    def full_share(self) -> float:
        """Share of passes that ran in full, 0..1 (1 before the first)."""
        return self.full / max(self.full + self.reused, 1) if self.full + self.reused else 1.0


@dataclass
class SkipCacheState(BaseState):
    """State of one cache context (one per branch, if guidance runs its branches apart).

    Attributes:
        remembered: Step index and tensor of the last full steps, the newest last; as many as a forecast needs.
        signature: Shape, dtype and device of the model input that it belongs to.
        counter: Steps since the trajectory began or the tensors were last forgotten.
        step_index, timestep: Of the last step; None before the first.
        full: The decision of the last step, for samplers that call the model more than once a step.
    """

    remembered: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    signature: tuple | None = None
    counter: int = 0
    step_index: int | None = None
    timestep: float | None = None
    full: bool = field(default=True)

    def reset(self) -> None:
        self.__init__()
