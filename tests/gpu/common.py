"""What the sections share: the setting, models with random weights, clocks, and a record that survives a crash."""

import copy
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipdit import create_model
from skipdit.acceleration.graphs import record_on_cuda
from skipdit.files import written_whole
from skipdit.models import SkipBackbone
from skipdit.models.layers import use_float8, use_kernels
from skipdit.timing import timed


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: Preset of the backbone, with `overrides` of its sizes.
        clips: Clips at once; guidance doubles what the network sees.
        training_batch: Clips of a training step.
        steps: Of the DDIM sampler.
        shallow: Units that run at each end of a reused step.
        repeats: Timed calls of a thing; the median counts.
        matrix_side, copied_bytes: Of the products and copies that give the hardware's rates.
    """

    model: str = "Latte-XL/2-skip"
    overrides: tuple[tuple[str, int], ...] = (("sample_size", 32), ("num_frames", 16), ("num_classes", 101))
    clips: tuple[int, ...] = (1, 4)
    training_batch: int = 4
    steps: int = 50
    shallow: int = 1
    repeats: int = 20
    matrix_side: int = 8192
    copied_bytes: int = 2**31

    @property
    def sizes(self) -> dict[str, int]:
        """Frames, patches, width, heads and MLP width of the model."""
        cfg = meta_model(self).config
        patches = (cfg.sample_size // cfg.patch_size) ** 2
        hidden = int(cfg.hidden_size * cfg.mlp_ratio)
        sizes = {"frames": cfg.num_frames, "patches": patches, "width": cfg.hidden_size, "heads": cfg.num_heads}
        return {**sizes, "hidden": hidden, "depth": cfg.depth}


PRESETS = {
    "xl": Setting(),
    "tiny": Setting(
        model="Latte-S/2-skip",
        overrides=tuple({"depth": 8, "hidden_size": 48, "num_heads": 2, "sample_size": 4, "num_frames": 3,
                         "num_classes": 5}.items()),
        clips=(1, 2), training_batch=2, steps=8, repeats=2, matrix_side=64, copied_bytes=2**16,
    ),
}  # fmt: skip


def meta_model(setting: Setting) -> SkipBackbone:
    """Sizes only."""
    with torch.device("meta"):
        return create_model(setting.model, **dict(setting.overrides))


def build(setting: Setting, device: torch.device) -> SkipBackbone:
    """Random weights in float32, none of them zero: products of zeros take less power and run faster."""
    torch.manual_seed(0)
    with device:
        model = create_model(setting.model, **dict(setting.overrides)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def variant(
    base: SkipBackbone,
    dtype: torch.dtype,
    kernels: Sequence[str] = (),
    compiled: str | None = None,
    float8: Sequence[str] = (),
) -> SkipBackbone:
    """A copy of a model that computes in another way.

    Args:
        base: Stays as it is.
        dtype: Of the copy's weights.
        kernels: Names for `use_kernels`.
        compiled: None; "blocks" (every block by itself, so that compilation is short); "whole".
        float8: Names for `use_float8`.
    """
    torch._dynamo.reset()
    model = torch.nn.Module.to(copy.deepcopy(base), dtype=dtype)
    use_kernels(model, kernels)
    if float8:
        use_float8(model, float8)
    if compiled == "blocks":
        model.compile_repeated_blocks(fullgraph=True)
    elif compiled == "whole":
        model.compile(fullgraph=True)
    return model


# ---------------------------------------------------------------------- clocks


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of a call as it is made, the host's part included where the device waits for it; two calls warm up."""
    for _ in range(2):
        call()
    return statistics.median(timed(call, device) for _ in range(repeats))


def device_seconds(
    call: Callable[..., object], inputs: Sequence[tuple], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Seconds of a call without the host's part: on CUDA devices calls are recorded into a graph and replayed.

    Args:
        call: Takes one of `inputs`.
        inputs: Copies of the arguments, gone through in turn so that the cache does not hold them all.

    Returns:
        "seconds" and "graph", whether they come from a graph.
    """

    def all_inputs() -> None:
        for arguments in inputs:
            call(*arguments)

    play, graph = all_inputs, False
    if device.type == "cuda":
        try:
            play, graph = record_on_cuda(all_inputs), True
        except RuntimeError:  # something in it cannot be recorded
            torch.cuda.synchronize()
    return {"seconds": median_seconds(play, device, repeats) / len(inputs), "graph": graph}


# ---------------------------------------------------------------------- errors


@contextmanager
def exact_float32() -> Iterator[None]:
    """For references: convolutions in float32 too, which cuDNN would round to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in the Euclidean norm, computed in float64."""
    reference = reference.detach().double()
    return float((found.detach().double() - reference).norm() / reference.norm())


# ---------------------------------------------------------------------- records


class Record:
    """Results of one section, on the disk after every item, so that a crash or a kill loses one item at most."""

    def __init__(self, path: Path, seconds: float, device: torch.device):
        self.path, self.device = path, device
        self.deadline = time.monotonic() + seconds
        self.results: dict[str, Any] = {"items": {}, "errors": {}, "skipped": []}

    def prepare(self, name: str, make: Callable[[], Any]) -> Any:
        """What other items use, such as a reference, or None; only that it failed is recorded."""
        return self.attempt(name, make, keep=False)

    def attempt(self, name: str, measure: Callable[[], Any], seconds: float = 0, keep: bool = True) -> Any:
        """Run `measure` and record what it returns, or why it failed; leave it out if `seconds` are not left.

        Returns:
            The result, or None.
        """
        result = None
        if time.monotonic() + seconds > self.deadline:
            self.results["skipped"].append(name)
        else:
            try:
                began = time.monotonic()
                result = measure()
                if keep:
                    self.results["items"][name] = result
                print(f"  {name}: {time.monotonic() - began:.1f} s", flush=True)
            except Exception as problem:  # the other items count too
                self.results["errors"][name] = {
                    "message": f"{type(problem).__name__}: {problem}"[:2000],
                    "trace": traceback.format_exc()[-3000:],
                }
                print(f"  {name} FAILED: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
                del problem
        self.write()
        if self.device.type == "cuda" and result is None:
            try:
                torch.cuda.empty_cache()
            except RuntimeError:
                pass  # the device is lost; the next section starts afresh
        return result

    def write(self) -> None:
        with written_whole(self.path) as temporary:
            temporary.write_text(json.dumps(finite(self.results), indent=1) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Plain JSON: what is not finite becomes a word."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
