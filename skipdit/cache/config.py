"""What a user says about Skip-Cache."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .policy import IntervalPolicy, RefreshPolicy, StepListPolicy

_SPELLING = re.compile(r"N(\d+)(?:-(\d+)-(\d+))?(?:-F(\d+))?", re.IGNORECASE)
MOST_ORDER = 2  # a cubic was worse than a parabola by up to 10 dB where few steps run in full (docs/benchmarks.md)


@dataclass(frozen=True, repr=False)
class SkipCacheConfig:
    """Settings of Skip-Cache (Skip-DiT, arXiv 2411.17616, section 3.3).

    Args:
        interval: Every `interval`-th step runs in full; 1 means that all do.
        shallow: Units that still run at each end of the network on a reused step (pairs of Latte, blocks of DiT).
        start: Steps with timestep >= start run in full (0..1000; 1000: no such window).
        stop: After a step with timestep < stop everything is forgotten, so the steps below it run in full.
        full_steps: Instead of the interval rule, the indices of the sampler steps that run in full. `interval`,
            `start` and `stop` then have no say.
        forecast: Order of the polynomial in the step index that continues the remembered tensors to a reused step: 0
            holds the last as published, 1 is a line through two, 2 a parabola through three. While fewer are
            remembered the order is lower.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> SkipCacheConfig.parse("N2-700-50")
        SkipCacheConfig(N2-700-50, shallow=1)
    """

    interval: int = 2
    shallow: int = 1
    start: float = 900
    stop: float = 50
    full_steps: tuple[int, ...] | None = None
    forecast: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be 1 (all steps in full) or more.")
        if self.shallow < 1:
            raise ValueError(f"shallow={self.shallow} must be 1 or more: the first and last units always run.")
        if not 0 <= self.stop <= self.start <= 1000:
            raise ValueError(f"stop={self.stop} and start={self.start} must satisfy 0 <= stop <= start <= 1000.")
        if self.forecast not in range(MOST_ORDER + 1):
            raise ValueError(f"forecast={self.forecast} must be 0 (hold), 1 (a line) or {MOST_ORDER} (a parabola).")
        if self.full_steps is not None:
            object.__setattr__(self, "full_steps", tuple(sorted(set(self.full_steps))))

    @classmethod
    def parse(cls, text: str, shallow: int = 1, start: float = 900, stop: float = 50) -> "SkipCacheConfig":
        """Read "N<interval>-<start>-<stop>", such as "N2-700-50", or "N<interval>"; "-F<order>" may follow either.

        Args:
            text: The setting; "N3-900-50-F2" forecasts by a parabola.
            shallow: As above; the text does not say it.
            start, stop: The window if the text leaves it out.

        Raises:
            ValueError: The text is spelled otherwise, or a value is out of range.
        """
        match = _SPELLING.fullmatch(text.strip())
        if not match:
            raise ValueError(
                f"Cache setting {text!r} is not spelled N<interval>-<start>-<stop>, for example N2-900-50, or with a "
                "forecast N2-900-50-F2."
            )
        interval, *window, order = match.groups()
        if window[0] is not None:
            start, stop = map(int, window)
        return cls(int(interval), shallow, start, stop, forecast=int(order or 0))

    @classmethod
    def preset(cls, task: str, interval: int = 2) -> "SkipCacheConfig":
        """The published settings of a task: "class-to-video" or "class-to-image", for an interval of 2 to 6.

        Raises:
            ValueError: The task is not known.
        """
        if task not in PRESETS:
            raise ValueError(f"No Skip-Cache preset {task!r}: choose one of {', '.join(PRESETS)}.")
        return replace(PRESETS[task], interval=interval)

    @property
    def policy(self) -> RefreshPolicy:
        """The rule that these settings stand for."""
        if self.full_steps is not None:
            return StepListPolicy(self.full_steps)
        return IntervalPolicy(self.interval, self.start, self.stop)

    def schedule(self, timesteps: Iterable[float]) -> list[bool]:
        """Which steps of a trajectory run in full (True), computed ahead of it.

        Args:
            timesteps: The sampler's timesteps in the order of sampling.
        """
        policy, counter, remembered, full = self.policy, 0, False, []
        for index, timestep in enumerate(timesteps):
            full.append(not remembered or policy.is_full(counter, index, timestep))
            counter, remembered = (0, False) if policy.forgets(timestep) else (counter + 1, True)
        return full

    def __str__(self) -> str:
        order = f"-F{self.forecast}" if self.forecast else ""
        if self.full_steps is not None:
            return f"full steps {','.join(map(str, self.full_steps))}{order}"
        return f"N{self.interval}-{self.start:g}-{self.stop:g}{order}"

    def __repr__(self) -> str:
        return f"SkipCacheConfig({self}, shallow={self.shallow})"


PRESETS = {
    "class-to-video": SkipCacheConfig(shallow=1, start=900, stop=50),
    "class-to-image": SkipCacheConfig(shallow=4, start=1000, stop=21),
}
