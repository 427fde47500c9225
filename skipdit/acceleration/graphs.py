"""CUDA graphs around a model's two paths: the host launches a step as a whole instead of some hundred kernels.

All that is special to CUDA is in `record_on_cuda`; it has not been run yet, for no GPU was at hand. The rest is tested
on CPUs with a recorder that calls again.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["GraphedForward", "fingerprint", "record_on_cuda"]

log = logging.getLogger("skipdit.acceleration")

MOST_GRAPHS = 8  # of different shapes; each holds the memory of a forward
WARM_UPS = 3
PLAIN = (bool, int, float, str, type(None))
Record = Callable[[Callable[[], None]], Callable[[], None]]


def record_on_cuda(call: Callable[[], None]) -> Callable[[], None]:
    """Record a call into a CUDA graph, after a few to warm up on a stream of their own; returns what replays it.

    Only what this thread does is recorded and watched: another one may be decoding samples meanwhile.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


@dataclass
class _Recorded:
    """A path of the network at one shape: tensors that it reads and writes, and what runs it; None: not recordable."""

    inputs: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]
    replay: Callable[[], None] | None


class GraphedForward:
    """Stands in for a backbone's forward: records each path at each shape once, then replays it.

    Inputs are copied to where the graph reads, outputs out of where it writes, so results are the caller's own. It
    replays only inside `recordings_of`, for a graph remembers where weights lay; outside, and for calls that a
    pipeline does not make (with gradients, autocast or joint images, for an output object), the forward itself runs.
    So it does for shapes that cannot be recorded.

    Args:
        forward: The model's own.
        key: What a recording further depends on, for example where tensors lie that are no arguments.
        suits: Whether the forward is the same at every call; a cache within the network would not be.
        record: Takes a call, runs it at least once, and returns what runs it again.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        key: Callable[[], Any] = lambda: None,
        suits: Callable[[], bool] = lambda: True,
        record: Record = record_on_cuda,
    ):
        self.forward, self.key, self.suits, self.record = forward, key, suits, record
        self._recorded: OrderedDict[tuple, _Recorded] = OrderedDict()
        self._weights: Hashable = None
        self._open = False

    def __deepcopy__(self, memo: dict) -> Callable[..., Any]:
        """A copied model has its own forward: recordings are of the weights of the first."""
        return copy.deepcopy(self.forward, memo)

    @contextmanager
    def recordings_of(self, weights: Hashable) -> Iterator[None]:
        """Within it, calls are recorded and replayed; `weights` is the model's `fingerprint`, taken just before."""
        if weights != self._weights:  # what is recorded reads memory that may be another's by now
            self._recorded.clear()
            self._weights = weights
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """The forward's arguments and results."""
        foreign = set(options) - {"shallow", "deep_features"}
        changing = torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type)
        if not self._open or return_dict or foreign or changing or not self.suits():
            return self.forward(hidden_states, timestep, class_labels, return_dict, **options)
        shallow, features = options.get("shallow"), options.get("deep_features")
        given = {"hidden_states": hidden_states, "timestep": timestep}
        given |= {} if class_labels is None else {"class_labels": class_labels}
        given |= {} if features is None else {"deep_features": features}
        key = (shallow, torch.is_inference_mode_enabled(), self.key())
        key += tuple((name, t.shape, t.dtype, t.device) for name, t in given.items())
        with torch.cuda.device_of(hidden_states):
            path = self._recorded.get(key) or self._make(key, given, shallow)
            self._recorded.move_to_end(key)
            if path.replay is None:
                return self.forward(hidden_states, timestep, class_labels, return_dict, **options)
            for name, tensor in given.items():
                path.inputs[name].copy_(tensor)
            path.replay()
            if features is not None:  # handed through
                return path.outputs[0].clone(), features
            return tuple(output.clone() for output in path.outputs)

    def _make(self, key: tuple, given: dict[str, torch.Tensor], shallow: int | None) -> _Recorded:
        inputs = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in given.items()}
        written: list[tuple[torch.Tensor, ...]] = []

        def call() -> None:
            outputs = self.forward(**inputs, return_dict=False, shallow=shallow)
            if not written:
                written.append(outputs)
            elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                written[0] = outputs  # where the graph writes, not the calls that warmed up
            else:
                for kept, output in zip(written[0], outputs, strict=True):
                    kept.copy_(output)

        try:
            path = _Recorded(inputs, (), self.record(call))
            path.outputs = written[0]
        except RuntimeError as error:
            shape = list(given["hidden_states"].shape)
            log.warning("Steps of %s are not recorded as a CUDA graph: %s", shape, str(error).split("\n")[0])
            path = _Recorded({}, (), None)
        self._recorded[key] = path
        if len(self._recorded) > MOST_GRAPHS:
            self._recorded.popitem(last=False)
        return path


def fingerprint(model: nn.Module) -> int:
    """What a recording of a model's forward depends on: its layers, their settings and hooks, where tensors lie."""
    layers = tuple((type(module), *_settings(module)) for module in model.modules())
    tensors = tuple((t.data_ptr(), t.dtype, t.shape) for t in chain(model.parameters(), model.buffers()))
    return hash((layers, tensors))


def _settings(module: nn.Module) -> Iterator[Hashable]:
    """What a layer keeps in plain Python, such as an adapter's scale, and which hooks it has."""
    for name, value in vars(module).items():
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            yield tuple(map(id, value.values()))
        elif isinstance(value, PLAIN):
            yield name, value
        elif isinstance(value, dict | list | tuple | set) and len(value) <= 16:
            entries = value.items() if isinstance(value, dict) else ((entry,) for entry in value)
            if all(isinstance(entry, PLAIN) for pair in entries for entry in pair):
                yield name, repr(value)
