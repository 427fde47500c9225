"""When to refresh: rules that decide, on the host, which sampler steps run in full."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


class RefreshPolicy(Protocol):
    """Decides which steps run every unit. Pure: what it needs to know is handed to it.

    A step runs in full as well whenever nothing (of the right shape) is remembered; that is not the policy's matter.
    """

    def is_full(self, counter: int, step_index: int, timestep: float) -> bool:
        """Whether this step must run in full.

        Args:
            counter: Steps since the trajectory began or the features were last forgotten.
            step_index: Index of the sampler step, from 0.
            timestep: Diffusion time of the step, 0..999.
        """

    def forgets(self, timestep: float) -> bool:
        """Whether the features are dropped, and the counter set to 0, after the step at this timestep."""


@dataclass(frozen=True)
class IntervalPolicy:
    """The published rule: every `interval`-th step in full, and all steps outside [stop, start)."""

    interval: int
    start: float
    stop: float

    def is_full(self, counter: int, step_index: int, timestep: float) -> bool:
        return counter % self.interval == 0 or timestep >= self.start

    def forgets(self, timestep: float) -> bool:
        return timestep < self.stop


@dataclass(frozen=True)
class StepListPolicy:
    """A given list of full steps, for schedules that were searched offline."""

    full_steps: Collection[int]

    def is_full(self, counter: int, step_index: int, timestep: float) -> bool:
        return step_index in self.full_steps

    def forgets(self, timestep: float) -> bool:
        return False
