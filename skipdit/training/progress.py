"""What a run tells: a bar, lines of text, one JSON object a line, and accelerate's trackers."""

import json
import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..files import written_whole

if TYPE_CHECKING:
    from .loop import Trainer

__all__ = ["Progress"]


class Progress:
    """Averages over the steps since the last line; its clock leaves out saving and sampling."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        self.path = trainer.output / "log.jsonl"
        self.is_main = trainer.accelerator.is_main_process
        self.bar = tqdm(
            total=trainer.config.max_steps,
            initial=trainer.step,
            desc="train",
            unit="step",
            disable=None if self.is_main else True,
        )
        self._reset()

    def __enter__(self) -> "Progress":
        if self.is_main:
            self._forget_after(self.trainer.step)
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

    def log(self) -> None:
        """Write a line about the steps since the last one."""
        trainer = self.trainer
        clips_per_second = self.steps * trainer.config.batch_size / self.seconds
        left = (trainer.config.max_steps - trainer.step) * self.seconds / self.steps
        means = {
            name: sum(values[name] for values in self.window) / len(self.window) if self.window else math.nan
            for name in ("loss", "mse", "vb", "grad_norm")
        }
        entry = {
            "step": trainer.step,
            **means,
            "lr": self.last_lr,
            "clips_per_second": clips_per_second,
            "dropped_steps": trainer.dropped,
        }
        trainer.say(
            f"step {trainer.step}/{trainer.config.max_steps}  "
            f"loss {means['loss']:.4f}  mse {means['mse']:.4f}  "
            f"vb {means['vb']:.4f}  grad {means['grad_norm']:.3f}  lr {self.last_lr:.2e}  "
            f"{clips_per_second:.1f} clips/s  {timedelta(seconds=round(left))} left"
        )
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        trainer.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=trainer.step)
        self._reset()
        self.clock = time.perf_counter()

    def resume_clock(self) -> None:
        """Start counting again after work that is no training."""
        self.clock = time.perf_counter()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # cut off in the middle of a line
        return math.inf
