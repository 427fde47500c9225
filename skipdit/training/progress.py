"""What a run tells: a bar, lines of text, one JSON object a line, and accelerate's trackers."""

import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from ..files import written_whole

__all__ = ["Progress"]

MEANS = ("loss", "mse", "vb", "grad_norm")


class Progress:
    """Averages over the steps since the last line; its clock leaves out saving and sampling.

    Args:
        folder: Of the run; log.jsonl is there.
        start, stop: First step, and the one after the last.
        batch_size: Clips of a step.
        is_main: Whether this process writes.
        say: Prints a line past the bar.
        track: Takes values and a step: accelerate's trackers.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        stop: int,
        batch_size: int,
        is_main: bool,
        say: Callable[[str], None],
        track: Callable[..., None],
    ):
        self.path, self.start, self.stop, self.batch_size = folder / "log.jsonl", start, stop, batch_size
        self.is_main, self.say, self.track = is_main, say, track
        self.bar = tqdm(total=stop, initial=start, desc="train", unit="step", disable=None if is_main else True)
        self.last_lr = 0.0
        self._reset()

    def __enter__(self) -> "Progress":
        if self.is_main:
            self._forget_after(self.start)
        self.clock = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _reset(self) -> None:
        self.steps, self.seconds, self.window = 0, 0.0, []

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be trained again, as after a kill."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        with written_whole(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")

    def add(self, values: dict[str, float]) -> None:
        """Count one step."""
        self.seconds += time.perf_counter() - self.clock
        self.steps += 1
        if values["applied"]:
            self.window.append(values)
        self.last_lr = values["lr"]
        self.bar.update()
        self.clock = time.perf_counter()

    @property
    def clips_per_second(self) -> float:
        """Of the steps since the last line."""
        return self.steps * self.batch_size / self.seconds

    def log(self, step: int, more: dict[str, float | dict[str, float]]) -> None:
        """Write a line about the steps since the last one.

        Args:
            step: Steps done.
            more: Further values; of a mapping each value is a curve of its own for the trackers.
        """
        left = (self.stop - step) * self.seconds / self.steps
        means = {
            name: sum(values[name] for values in self.window) / len(self.window) if self.window else math.nan
            for name in MEANS
        }
        entry = {**means, "lr": self.last_lr, "clips_per_second": self.clips_per_second, **more}
        self.say(
            f"step {step}/{self.stop}  loss {means['loss']:.4f}  mse {means['mse']:.4f}  "
            f"vb {means['vb']:.4f}  grad {means['grad_norm']:.3f}  lr {self.last_lr:.2e}  "
            f"{self.clips_per_second:.1f} clips/s  {timedelta(seconds=round(left))} left"
        )
        self.note(step, entry)
        self._reset()
        self.resume_clock()

    def note(self, step: int, entry: dict[str, float | dict[str, float]]) -> None:
        """Write values to the log and the trackers alone."""
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")
        self.track(dict(_flat(entry)), step=step)

    def resume_clock(self) -> None:
        """Start counting again after work that is no training."""
        self.clock = time.perf_counter()


def _flat(entry: dict[str, float | dict[str, float]]):
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", inner_value) for inner, inner_value in value.items())
        else:
            yield name, value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # cut off in the middle of a line
        return math.inf
