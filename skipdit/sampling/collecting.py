"""Samples in a number exactly as asked, on disk: by any number of processes, continued after any interruption."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..config import save_config
from ..errors import UserError
from ..files import LONGEST_WAIT, check_writable, only_call
from ..media import Pixels
from ..pipelines import SkipPipeline
from .collection import Collection
from .overlap import overlapped
from .planning import SamplePlan
from .report import SampleReport, report
from .streaming import sample_indices

__all__ = ["collect", "device_of", "split_evenly"]

Item = TypeVar("Item")


def collect(plan: SamplePlan) -> SampleReport:
    """Make what is still missing of the samples, and finish their files.

    Under `accelerate launch` every process takes an equal part of what is missing. The files are the same bytes
    whatever the number of processes, and whether they were written at once or after a kill.

    Raises:
        UserError: The folder holds samples of other settings, is full, or is being written by another call.
    """
    state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    plan = replace(plan, device=device_of(plan, state))
    folder = check_writable(plan.config.output)
    with only_call("sample", folder) if state.is_main_process else nullcontext():
        collection = Collection(folder, plan)
        if state.is_main_process:
            collection.check()
        left = collection.missing_parts()
        state.wait_for_everyone()  # so that all see the same parts missing
        mine = split_evenly(left, state.process_index, state.num_processes)
        pipeline = plan.load() if mine else None
        with _failing_clearly(folder):
            if state.is_main_process:
                collection.begin(incomplete=bool(left))
            state.wait_for_everyone()
            began = time.perf_counter()
            if pipeline is not None:
                _write(collection, pipeline, mine, shows=state.is_main_process)
            state.wait_for_everyone()
            seconds = time.perf_counter() - began
            if state.is_main_process:
                collection.finish()
                save_config(plan.config, folder / "settings.yaml")
            state.wait_for_everyone()
    made = sum(map(len, left))
    return report(plan, pipeline, folder, collection.files(), seconds, made)


def device_of(plan: SamplePlan, state: Accelerator) -> torch.device:
    """Where this process samples: as planned if it is alone, else what the launcher gave it.

    Raises:
        UserError: The settings name another device, or the processes do not know of each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise UserError(
            f"accelerate launch started {started} processes on a machine without their devices: on CPUs, put "
            "ACCELERATE_USE_CPU=true in front of the command."
        )
    if state.num_processes == 1:
        return plan.device
    if plan.config.device not in ("auto", state.device.type):
        raise UserError(
            f"device={plan.config.device}: of several processes each takes a device of its own; pass device=auto."
        )
    return state.device


def split_evenly(items: Sequence[Item], part: int, parts: int) -> Sequence[Item]:
    """The part-th of `parts` neighbouring pieces whose lengths differ by one at most, the longer first."""
    length, longer = divmod(len(items), parts)
    first = part * length + min(part, longer)
    return items[first : first + length + (part < longer)]


def _write(collection: Collection, pipeline: SkipPipeline, parts: Sequence[Sequence[int]], shows: bool) -> None:
    """Sample the missing indices of some parts and write them, while the next ones are being sampled."""
    plan = collection.plan
    wanted = [index for part in parts for index in part]
    with ExitStack() as stack:
        writer = _Writer(collection, parts, stack)
        samples = sample_indices(pipeline, wanted, plan.label_of, plan.config, shows)
        for _ in overlapped(writer.add, samples):
            pass


class _Writer:
    """Takes samples in the order of their parts; a part that becomes a shard is written whole or not at all.

    Args:
        collection: Where to.
        parts: Indices, part by part.
        stack: Closes the shard that is open when something goes wrong.
    """

    def __init__(self, collection: Collection, parts: Sequence[Sequence[int]], stack: ExitStack):
        self.collection, self.stack = collection, stack
        self._places = ((part, place) for part in parts for place in range(len(part)))
        self._shard: Pixels | None = None

    def add(self, batch: tuple[list[int], torch.Tensor]) -> None:
        """Write a batch as `sample_indices` yields it."""
        for index, sample in zip(batch[0], batch[1].numpy(), strict=True):
            part, place = next(self._places)
            if place == 0:
                self._shard = self.collection.open_shard(part, self.stack)
            if self._shard is not None:
                self._shard[place] = sample
            self.collection.write_files(index, sample)
            if place == len(part) - 1:
                self._shard = None
                self.stack.close()


@contextmanager
def _failing_clearly(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} takes no more files ({error.strerror or error}): finished ones are kept; make room, then run "
            "the same command again."
        ) from error
