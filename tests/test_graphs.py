"""Recorded forwards: the same samples, of the weights of now, and only where a graph can stand for the forward.

The recorder replays kernels on the memory that they were recorded on and runs no Python, as a CUDA graph does.
"""

import copy
import gc
from threading import Thread

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerated import CACHE, OFF, TOLERANCE, cached, quiet, recorded, relative, samples
from diffusers import FirstBlockCacheConfig
from replaying import replaying
from torch import nn

from skipdit import SkipLattePipeline, make_scheduler
from skipdit.acceleration.graphs import MOST_GRAPHS, GraphedForward, fingerprint


def inputs_of(batch: int = 2) -> tuple[torch.Tensor, ...]:
    noise = torch.randn(batch, 4, 4, 8, 8, generator=torch.Generator().manual_seed(batch))
    return noise, torch.full((batch,), 7), torch.arange(batch) % 3


# ---------------------------------------------------------------------- the same samples


@pytest.mark.parametrize("settings", [{}, {"kind": "image"}, {"num_classes": None}])
def test_recorded_paths_give_the_same_samples(settings):
    pipe = quiet(**settings)
    plain = samples(pipe)
    pipe.transformer.enable_cache(CACHE)
    expected = samples(pipe)
    counts = copy.copy(pipe.transformer.cache_stats)
    assert counts.reused and not torch.equal(expected, plain)
    with recorded(pipe) as forward:
        for _ in range(2):
            assert torch.equal(samples(pipe), expected)
            assert pipe.transformer.cache_stats == counts
        assert len(forward._recorded) == 2  # the full path and the reused one, each recorded once
        pipe.transformer.disable_cache()
        assert torch.equal(samples(pipe), plain)
        pipe.transformer.enable_cache(CACHE)
    assert torch.equal(samples(pipe), expected)
    pipe.transformer.disable_cache()
    assert not isinstance(pipe.transformer.forward, GraphedForward)
    assert torch.equal(samples(pipe), plain)


def test_recorded_paths_read_the_modulations_of_their_step():
    pipe = quiet()
    expected = [samples(pipe, labels) for labels in ([0, 2], [1], [0, 2])]
    with recorded(pipe, modulation=True) as forward:
        for labels, right in zip(([0, 2], [1], [0, 2]), expected, strict=True):
            assert relative(samples(pipe, labels), right) < TOLERANCE
        assert len(forward._recorded) == 2  # one for each number of clips
    assert torch.equal(samples(pipe), expected[0])


def test_another_size_is_recorded_too():
    """Its positions are computed once, not copied from the host at every step."""
    pipe = cached(quiet(), True)
    size = {"num_frames": 3, "height": 24}
    expected = samples(pipe, **size)
    with recorded(pipe) as forward:
        assert torch.equal(samples(pipe, **size), expected) and len(forward._recorded) == 2
        positions = list(pipe.transformer._other_positions.values())
        assert len(positions) == 2 and torch.equal(samples(pipe, **size), expected)
        assert all(
            one is other for one, other in zip(positions, pipe.transformer._other_positions.values(), strict=True)
        )


def test_results_of_a_recorded_path_are_the_callers_own():
    pipe = quiet()
    model, inputs = pipe.transformer, inputs_of()
    with recorded(pipe) as forward, torch.no_grad(), forward.recordings_of(fingerprint(model)):
        first, features = model(*inputs, return_dict=False, shallow=1)
        kept = first.clone(), features.clone()
        model(-inputs[0], *inputs[1:], return_dict=False, shallow=1)
        assert torch.equal(first, kept[0]) and torch.equal(features, kept[1])
        reused = model(*inputs, return_dict=False, shallow=1, deep_features=features)
        assert reused[1] is features and torch.allclose(reused[0], first)
        assert len(forward._recorded) == 2


# ---------------------------------------------------------------------- of the weights of now


def scaled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 0.5 if tensor.is_floating_point() else tensor


class Adapter(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        torch.manual_seed(3)
        self.low, self.high = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        self.scaling = {"default": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scaling["default"] * self.high(self.low(x))


def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = scaled(parameter.data)  # new memory, as by `.to(device)` there and back


def assign(model: nn.Module) -> None:
    model.load_state_dict({name: scaled(tensor) for name, tensor in model.state_dict().items()}, assign=True)


def write(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def adapt(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.qkv, block.mlp.fc2 = Adapter(block.attn.qkv), Adapter(block.mlp.fc2)
        block.adaLN_modulation[1] = Adapter(block.adaLN_modulation[1])


def scale_adapters(pipe, scale: float):
    for module in pipe.transformer.modules():
        if isinstance(module, Adapter):
            module.scaling["default"] = scale
    return pipe


@pytest.mark.parametrize("change", [move, assign, write, adapt])
@pytest.mark.parametrize("modulation", [False, True])
def test_weights_that_change_are_those_that_are_used(change, modulation):
    pipe, plain = cached(quiet(), True), cached(quiet(), True)
    before = samples(plain)
    change(plain.transformer)
    expected = samples(plain)
    assert relative(expected, before) > 0.01
    with recorded(pipe, modulation) as forward:
        assert relative(samples(pipe), before) < TOLERANCE
        change(pipe.transformer)
        gc.collect()
        assert relative(samples(pipe), expected) < TOLERANCE
        assert len(forward._recorded) == 2


def test_an_adapter_that_is_turned_off_is_off_and_outlives_the_compilation():
    pipe, plain = cached(quiet(), True), cached(quiet(), True)
    adapt(plain.transformer)
    expected = {scale: samples(scale_adapters(plain, scale)) for scale in (0.0, 1.0)}
    assert relative(expected[0.0], expected[1.0]) > 0.01
    with recorded(pipe, modulation=True):
        adapt(pipe.transformer)
        for scale in (1.0, 0.0, 1.0):
            assert relative(samples(scale_adapters(pipe, scale)), expected[scale]) < TOLERANCE
    assert isinstance(pipe.transformer.blocks[0].adaLN_modulation[1], Adapter)
    assert torch.equal(samples(pipe), expected[1.0])


def test_the_newest_pipeline_compiles_a_network_that_two_share():
    first = quiet()
    second = SkipLattePipeline(first.transformer, first.vae, make_scheduler("ddim"))
    second.set_progress_bar_config(disable=True)
    expected = samples(first)
    first.compile(dtype=torch.bfloat16, **OFF | {"modulation": True})
    second.compile(**OFF | {"modulation": True})
    for pipe in (first, second):
        assert relative(samples(pipe), expected) < TOLERANCE
    first.uncompile()
    assert relative(samples(second), expected) < TOLERANCE
    second.uncompile()
    assert torch.equal(samples(first), expected) and torch.equal(samples(second), expected)


def test_a_copy_computes_with_its_own_weights():
    pipe = quiet()
    with recorded(pipe):
        samples(pipe)
        copied = copy.deepcopy(pipe.transformer)
        write(copied)
        expected = copied(*inputs_of()).sample
        assert copied.forward.__self__ is copied
        assert not torch.allclose(pipe.transformer(*inputs_of()).sample, expected)
    plain = quiet().transformer
    write(plain)
    assert torch.equal(plain(*inputs_of()).sample, expected)


def test_two_threads_do_not_disturb_each_other():
    pipe = quiet()
    pipes = [pipe, SkipLattePipeline(pipe.transformer, pipe.vae, make_scheduler("ddim"))]
    for each in pipes:
        each.set_progress_bar_config(disable=True)
    noise, found = inputs_of()[0], {}
    expected = [samples(pipes[i], labels=[i, 2], steps=12, latents=noise) for i in range(2)]
    with recorded(pipe, modulation=True):
        pipes[1]._acceleration = pipe._acceleration

        def run(i: int) -> None:
            found[i] = [samples(pipes[i], labels=[i, 2], steps=12, latents=noise) for _ in range(3)]

        threads = [Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert len(found[i]) == 3 and all(relative(one, expected[i]) < TOLERANCE for one in found[i])


def test_inference_mode_and_no_grad_follow_each_other():
    pipe = cached(quiet(), True)
    expected = samples(pipe)
    with recorded(pipe, modulation=True):
        with torch.inference_mode():
            assert relative(samples(pipe), expected) < TOLERANCE
        assert relative(samples(pipe), expected) < TOLERANCE
        with torch.inference_mode():
            assert relative(samples(pipe), expected) < TOLERANCE


# ---------------------------------------------------------------------- where no graph can stand for it


def test_what_a_pipeline_does_not_call_is_not_recorded():
    pipe = quiet()
    model, inputs = pipe.transformer, inputs_of()
    with recorded(pipe) as forward:
        with forward.recordings_of(0):
            model(*inputs, return_dict=False)[0].sum().backward()
            with torch.no_grad():
                model(*inputs)
                model(*inputs, return_dict=False, num_images=1)
                with torch.autocast("cpu", torch.bfloat16):
                    model(*inputs, return_dict=False)
        with torch.no_grad():
            model(*inputs, return_dict=False)  # outside of a step
        assert not forward._recorded and model.blocks[0].attn.qkv.weight.grad is not None


def test_shapes_that_cannot_be_recorded_take_the_plain_path(caplog):
    def fail(call):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    pipe = cached(quiet(), True)
    expected = samples(pipe)
    with recorded(pipe, record=fail):
        assert torch.equal(samples(pipe), expected)
    assert len(caplog.records) == 2  # once for each path
    assert "[4, 4, 4, 8, 8] are not recorded as a CUDA graph: CUDA error: operation not permitted" in caplog.text


def test_a_cache_within_the_network_is_not_recorded():
    """It decides anew at every step which layers run."""
    pipe = quiet(skip=None)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    expected = samples(pipe)
    with recorded(pipe) as forward:
        assert torch.equal(samples(pipe), expected)
        assert not forward._recorded
        pipe.transformer.disable_cache()
        assert not torch.equal(samples(pipe), expected)
        assert len(forward._recorded) == 1


def test_old_recordings_are_let_go():
    def plus_one(hidden_states, timestep, class_labels=None, return_dict=False, shallow=None):
        return (hidden_states + 1,)

    forward = GraphedForward(plus_one, record=replaying)
    with torch.no_grad(), forward.recordings_of(0):
        for size in range(1, MOST_GRAPHS + 4):
            assert torch.equal(forward(torch.zeros(size), torch.zeros(size), None, False)[0], torch.ones(size))
    assert len(forward._recorded) == MOST_GRAPHS
    with forward.recordings_of(1):
        assert not forward._recorded


def offload_whole(model: nn.Module) -> None:
    """As `enable_model_cpu_offload` hooks it."""
    add_hook_to_module(model, ModelHook())


def offload_in_groups(model: nn.Module) -> None:
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_whole, offload_in_groups])
def test_weights_that_come_and_go_are_refused(offload):
    pipe = quiet()
    expected = samples(pipe)
    pipe.compile(**OFF | {"modulation": True})
    offload(pipe.transformer)
    with pytest.raises(ValueError, match="this pipeline offloads them"):
        samples(pipe)
    with pytest.raises(ValueError, match=r"compile\(\) needs weights that stay on the device"):
        pipe.compile()
    pipe.uncompile()
    assert torch.equal(samples(pipe), expected)
