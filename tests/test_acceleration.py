"""`pipe.compile()`: the same samples, fixed graphs, nothing read from the device, and undone bit for bit."""

import contextlib
import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerated import OFF, TOLERANCE, cached, quiet, relative, samples
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from skipdit import SkipLattePipeline, make_scheduler
from skipdit.acceleration import CHOICES, compiler_for
from skipdit.acceleration.choice import choose, compiles_decoder
from skipdit.acceleration.modulation import HeldModulation, Modulations
from skipdit.acceleration.quality import psnr
from skipdit.acceleration.undoing import recast, turn_on_blocks, turn_on_compiled
from skipdit.cli import main
from skipdit.kernels import float8_available

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(not compiler_for(CPU)[0], reason=compiler_for(CPU)[1])


# ---------------------------------------------------------------------- compiled blocks


@pytest.mark.parametrize("modulation", [False, True])
@pytest.mark.parametrize(("kind", "count"), [("video", 6), ("image", 4)])
def test_two_paths_compile_to_fixed_graphs(kind, count, modulation):
    """Video: a spatial block, a temporal one with and without positions, two joins (the middle one joins a tensor
    with itself), the final layer; images: one block. Reused steps need nothing more, nor do further steps or calls.

    The backend that only traces: what is traced anew is what would be compiled anew.
    """
    torch._dynamo.reset()
    counters.clear()
    pipe = cached(quiet(kind), True)
    expected = samples(pipe)
    pipe.compile(**{**OFF, "modulation": modulation})
    turn_on_blocks(pipe.transformer, backend="eager")
    assert relative(samples(pipe), expected) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == count
    samples(pipe, steps=11)
    pipe.transformer.disable_cache()
    samples(pipe)
    assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"]


def test_a_second_batch_size_serves_all_others():
    torch._dynamo.reset()
    counters.clear()
    pipe, plain = quiet(), quiet()
    turn_on_blocks(pipe.transformer, backend="eager")
    graphs = {}
    for labels in ([0], [1, 2], [0, 1, 2], [0, 0, 1, 2]):
        assert relative(samples(pipe, labels), samples(plain, labels)) < TOLERANCE
        graphs[len(labels)] = counters["stats"]["unique_graphs"]
    assert graphs[1] == 6 and graphs[2] > 6 and graphs[4] == graphs[2] == graphs[3]
    assert not counters["graph_break"]


@needs_compiler
def test_compiled_blocks_give_the_same_samples_and_are_undone():
    torch._dynamo.reset()
    pipe = cached(quiet(), True)
    expected = samples(pipe)
    chosen = pipe.compile()
    assert chosen.parts == ("blocks", "modulation", "decoder")
    found = samples(pipe)
    assert 0 < relative(found, expected) < TOLERANCE
    pipe.uncompile()
    assert torch.equal(samples(pipe), expected)
    assert "join_skip" not in vars(pipe.transformer) and not pipe.transformer.x_embedder._forward_hooks


# ---------------------------------------------------------------------- modulation


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kind": "image"}, {"num_classes": None}, {"skip": None}])
def test_modulations_ahead_of_the_loop_give_the_same_samples(settings, with_cache):
    pipe = cached(quiet(**settings), with_cache and "skip" not in settings)
    expected = samples(pipe), samples(pipe, labels=[1, 1, 2], guidance_scale=1.0)
    names = list(pipe.transformer.state_dict())
    pipe.compile(**OFF | {"modulation": True})
    assert list(pipe.transformer.state_dict()) == names  # saving goes on
    found = samples(pipe), samples(pipe, labels=[1, 1, 2], guidance_scale=1.0)
    assert all(relative(*pair) < TOLERANCE for pair in zip(found, expected, strict=True))
    pipe.uncompile()
    assert torch.equal(samples(pipe), expected[0])
    assert not any(isinstance(module, HeldModulation) for module in pipe.transformer.modules())


def test_modulations_are_one_product_a_layer():
    """Of all steps and distinct classes: 5 steps, the classes 1, 2 and none. Conditioning itself is still computed."""
    pipe = quiet()
    pipe.compile(**OFF | {"modulation": True})
    rows = []
    for owner in [*pipe.transformer.blocks, pipe.transformer.final_layer]:
        owner.adaLN_modulation[1].register_forward_hook(lambda m, inputs, output: rows.append(inputs[0].shape[:-1]))
    samples(pipe, labels=[1, 1, 2], steps=5)
    assert rows == [(5, 3)] * 9


def test_a_call_outside_the_loop_computes_its_own_vectors():
    """Also one from a callback between two steps, and one after a trajectory that was cut short."""
    pipe, plain = quiet(), quiet()
    pipe.compile(**OFF | {"modulation": True})
    inputs = torch.randn(2, 4, 4, 8, 8), torch.tensor([7, 600]), torch.tensor([0, 1])
    expected = plain.transformer(*inputs).sample
    seen = []

    def call(pipe, index, timestep, tensors):
        seen.append(pipe.transformer(*inputs).sample)
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        samples(pipe, callback_on_step_end=call)
    assert len(seen) == 3 and all(torch.equal(found, expected) for found in seen)
    assert torch.equal(pipe.transformer(*inputs).sample, expected)


def test_a_table_that_is_too_large_is_left_out(monkeypatch):
    monkeypatch.setattr("skipdit.acceleration.modulation.MOST_BYTES", 1000)
    pipe = quiet()
    steps = Modulations(pipe.transformer).trajectory(torch.arange(5), torch.tensor([0, 1]), 2)
    assert steps is contextlib.nullcontext


# ---------------------------------------------------------------------- the loop


class Reads(TorchDispatchMode):
    """Notes what makes the host wait for the device: reading a value, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name.startswith(self.WAITS):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_reads_are_noticed():
    with Reads() as reads:
        float(torch.ones(()))
        torch.ones(3).nonzero()
    assert reads.seen == ["_local_scalar_dense", "nonzero"]


class OnDevice(torch.Tensor):
    """Marks what would lie on the device; what is computed from it is marked as well."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            raise AssertionError(f"the loop calls {name} on a tensor of the device")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "unipc"])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_reads_the_device(sampler, compiled):
    """Every tensor that comes from the latents is watched; the schedulers' own tables lie on the host."""
    pipe = cached(quiet(), True)
    trained = {"variance_type": "learned_range"} if sampler == "ddpm" else {}
    pipe.scheduler = make_scheduler(sampler, **trained)
    if compiled:
        pipe.compile(**OFF | {"modulation": True})
    watched = []

    def watch(pipe, index, timestep, tensors):
        watched.append(isinstance(tensors["latents"], OnDevice))
        return {"latents": tensors["latents"].as_subclass(OnDevice)}

    samples(pipe, callback_on_step_end=watch)
    assert watched[1:] == [True] * (len(watched) - 1) and len(watched) >= 7


@pytest.mark.parametrize("modulation", [False, True])
def test_ddim_reads_nothing_at_all_in_a_step(modulation):
    """Not even on the host: its coefficients are numbers."""
    pipe = cached(quiet(), True)
    if modulation:
        pipe.compile(**OFF | {"modulation": True})
    seen: list[list[str]] = []
    reads = Reads()

    def between(pipe, index, timestep, tensors):
        seen.append(list(reads.seen))

    with reads:
        samples(pipe, callback_on_step_end=between)
    per_step = [len(after) - len(before) for before, after in zip(seen, seen[1:], strict=False)]
    assert per_step == [1] * 6  # `int(timestep)` of the scheduler's own list on the host


def test_guidance_is_one_batch_without_repeats():
    """Two rows for a clip, whatever its frames; timesteps and labels are one a row."""
    pipe = quiet()
    shapes = []
    pipe.transformer.t_embedder.register_forward_hook(lambda m, inputs, out: shapes.append(inputs[0].shape))
    pipe.transformer.y_embedder.register_forward_hook(lambda m, inputs, out: shapes.append(inputs[0].shape))
    pipe.transformer.blocks[0].adaLN_modulation.register_forward_hook(
        lambda m, inputs, out: shapes.append(inputs[0].shape[:-1])
    )
    samples(pipe, labels=[1], steps=2)
    assert shapes == [(2,), (2,), (2, 1, 1)] * 2


# ---------------------------------------------------------------------- what is chosen, and undone


def test_a_cpu_gets_no_kernels_and_is_told_why():
    chosen = {choice.name: choice for choice in choose(CPU, {})}
    assert list(chosen) == list(CHOICES)
    for name in ("kernels", "graphs"):
        assert not chosen[name].on and chosen[name].reason == "cpu is not a CUDA device"
    assert chosen["modulation"].on and chosen["decoder"].on
    assert not compiles_decoder(CPU) and compiles_decoder(torch.device("cuda"))
    assert not any(choice.on for choice in choose(torch.device("mps"), {}))


def test_one_log_line_where_nothing_helps(caplog):
    pipe = quiet()
    expected = samples(pipe)
    with caplog.at_level(logging.INFO, "skipdit.acceleration"):
        chosen = pipe.compile(**OFF)
    assert chosen.parts == () and str(chosen).startswith("The plain path on cpu\n")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the plain path is taken" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert torch.equal(samples(pipe), expected)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"graphs": True}, r"compile\(graphs=True\) is not possible: cpu is not a CUDA device"),
        ({"kernels": True}, "cpu is not a CUDA device"),
        ({"flash": True}, "No part 'flash' to compile: choose from kernels, blocks"),
        ({"dtype": torch.int8}, "choose torch.float32, torch.bfloat16 or torch.float16"),
    ],
)
def test_what_cannot_be_had_is_refused_and_nothing_changes(choices, message):
    pipe = quiet()
    expected = samples(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.compile(**{"blocks": False, **choices})
    assert pipe._acceleration is None and torch.equal(samples(pipe), expected)


def test_where_the_compiler_fails_the_plain_path_is_taken_and_told(tmp_path):
    """In a process that finds no compiler and no code that was compiled before."""
    program = """
import logging
from accelerated import quiet, samples
logging.basicConfig(level="WARNING")
pipe = quiet()
expected = samples(pipe)
print(pipe.compile(modulation=False, decoder=False))
assert samples(pipe).equal(expected)
"""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "The plain path on cpu\n" in ran.stdout
    assert "  - blocks: torch.compile, which needs a C++ compiler here, fails (" in ran.stdout
    assert ran.stderr.count("WARNING") == 1 and "the plain path is taken" in ran.stderr


def test_another_dtype_and_order_are_undone_bit_for_bit():
    pipe = cached(quiet(), True)
    expected = samples(pipe, output_type="pt")
    chosen = pipe.compile(dtype=torch.bfloat16, decoder=True, blocks=False)
    assert chosen.parts == ("modulation", "decoder", "dtype")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert psnr(samples(pipe, output_type="pt"), expected) > 30
    pipe.uncompile()
    assert torch.equal(samples(pipe, output_type="pt"), expected)


def test_channels_last_decodes_the_same_pictures():
    pipe = quiet()
    expected = samples(pipe, output_type="pt")
    pipe.compile(**OFF | {"decoder": True})
    assert relative(samples(pipe, output_type="pt"), expected) < TOLERANCE


def test_a_compiled_decoder_decodes_the_same_pictures_in_any_number_and_is_undone():
    """As on CUDA devices, but traced only: a decoder takes a compiler a minute."""
    vae, calls = quiet().vae, []
    latents = torch.randn(5, vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [vae.decode(some).sample for some in latents.split([3, 2])]

    def trace(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    undo = turn_on_compiled([vae.decoder], backend=trace)
    with torch.no_grad():
        found = [vae.decode(some).sample for some in latents.split([3, 2])]
        assert 1 <= len(calls) <= 2  # for this number of pictures, then for any
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        undo()
        assert vae.decoder._compiled_call_impl is None and torch.equal(vae.decode(latents[:3]).sample, expected[0])
    assert len(calls) <= 2


def test_recast_keeps_whole_numbers_and_other_shapes():
    layers = torch.nn.BatchNorm2d(2)
    undo = recast(layers, torch.bfloat16, channels_last=True)
    assert layers.weight.dtype == torch.bfloat16 and layers.num_batches_tracked.dtype == torch.int64
    undo()
    assert layers.weight.dtype == torch.float32


def add_one(pipe) -> None:
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(1)


def write_past_autograd(pipe) -> None:
    """As diffusers' `EMAModel.copy_to` does."""
    for parameter in pipe.vae.parameters():
        parameter.data.mul_(0.5)


def load_zeros(pipe) -> None:
    pipe.vae.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in pipe.vae.state_dict().items()})


def cast(pipe) -> None:
    pipe.vae.to(torch.float64)


@pytest.mark.parametrize("change", [add_one, write_past_autograd, load_zeros, cast])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_was_done_to_the_weights_since_stays_done(change, dtype):
    """Undoing puts the former dtype and order back, not the former values."""
    pipe, plain = quiet(), quiet()
    pipe.compile(dtype=dtype, **OFF | {"decoder": True})
    change(pipe)
    pipe.uncompile()
    change(plain)
    for (name, found), expected in zip(pipe.vae.state_dict().items(), plain.vae.state_dict().values(), strict=True):
        assert found.dtype == expected.dtype and found.stride() == expected.stride(), name
        assert relative(found + 1e-9, expected + 1e-9) < (1e-2 if dtype else 1e-6), name


def test_a_cast_that_fails_changes_nothing(monkeypatch):
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    to, casts = torch.Tensor.to, []

    def fail_at_third(tensor, *args, **kwargs):
        casts.append(tensor.dtype)
        if len(casts) == 3:
            raise torch.OutOfMemoryError("no room")
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", fail_at_third)
    with pytest.raises(torch.OutOfMemoryError):
        recast(layers, torch.bfloat16)
    assert {parameter.dtype for parameter in layers.parameters()} == {torch.float32}


def test_a_wrong_argument_leaves_what_is_compiled_as_it_is():
    pipe = quiet()
    before = pipe.compile(**OFF | {"modulation": True})
    for wrong in ({"flash": True}, {"float8": 1}, {"float8": "norm"}, {"dtype": torch.int8}):
        with pytest.raises(ValueError):
            pipe.compile(**wrong)
        assert pipe._acceleration is before
    pipe.uncompile()


def test_cast_weights_are_not_saved(tmp_path):
    pipe = quiet()
    pipe.compile(dtype=torch.bfloat16, **OFF)
    with pytest.raises(ValueError, match=r"compile\(dtype=...\) has cast the weights: call uncompile\(\) before"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.compile(**OFF | {"modulation": True, "decoder": True})
    expected = samples(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = SkipLattePipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert relative(samples(loaded), expected) < TOLERANCE


def test_a_copy_of_a_compiled_network_has_its_own_skips():
    torch._dynamo.reset()
    model = quiet().transformer
    turn_on_blocks(model, backend="eager")
    copied = copy.deepcopy(model)
    inputs = torch.randn(1, 4, 4, 8, 8), torch.tensor([7]), torch.tensor([1])
    with torch.no_grad():
        before = model(*inputs).sample
        for skip in copied.skip_linears:
            skip.linear.weight.zero_()
        assert not torch.allclose(copied(*inputs).sample, before) and torch.allclose(model(*inputs).sample, before)
    copied(*inputs).sample.sum().backward()
    assert copied.skip_linears[0].linear.weight.grad is not None and model.skip_linears[0].linear.weight.grad is None


def test_compiling_twice_starts_anew():
    pipe = quiet()
    expected = samples(pipe)
    pipe.compile(**OFF | {"modulation": True})
    assert pipe.compile(**OFF).parts == ()
    assert torch.equal(samples(pipe), expected)
    pipe.uncompile()
    pipe.uncompile()


# ---------------------------------------------------------------------- float8


def test_psnr_is_of_the_mean_square():
    zeros = torch.zeros(2, 3)
    assert psnr(zeros, zeros) == float("inf")
    assert psnr(zeros + 0.1, zeros) == pytest.approx(20.0)
    assert psnr(zeros + 0.1, zeros, peak=10.0) == pytest.approx(40.0)


@pytest.mark.skipif(not float8_available(CPU)[0], reason="this version of PyTorch has no float8 product on CPUs")
def test_float8_passes_its_gate_or_is_refused():
    pipe = quiet()
    torch.nn.Module.to(pipe.transformer, torch.bfloat16)
    expected = samples(pipe)
    with pytest.raises(ValueError, match=r"float8 of attention and mlp is refused: its samples are [\d.]+ dB .* 200"):
        pipe.compile(float8=True, least_psnr=200)
    assert pipe._acceleration is None
    assert torch.equal(samples(pipe), expected)
    chosen = pipe.compile(float8=["mlp"], least_psnr=1, **OFF)
    assert chosen.parts == ("float8",) and "mlp as asked; samples are" in str(chosen)
    assert not torch.equal(samples(pipe), expected)
    pipe.uncompile()
    assert torch.equal(samples(pipe), expected)


# ---------------------------------------------------------------------- the config key


def test_fast_samples_are_the_same_pictures(tmp_path, monkeypatch, capsys):
    unasked = ("", "left out of this test, for it takes seconds")
    monkeypatch.setattr("skipdit.acceleration.choice.compiler_for", lambda device: unasked)
    quiet().save_pretrained(tmp_path / "pipeline")
    words = [f"model={tmp_path / 'pipeline'}", "steps=3", "classes=[one]", "format=[npz]", "cache=N2"]
    pixels = {}
    for name in ("plain", "fast"):
        fast = ["fast=true"] if name == "fast" else []
        assert main(["sample", *words, *fast, f"output={tmp_path / name}"]) == 0
        (file,) = (tmp_path / name).glob("*.npz")
        pixels[name] = np.load(file)["arr_0"].astype(int)
        assert ("Turned on for cpu: modulation, decoder" in capsys.readouterr().out) == (name == "fast")
    assert pixels["plain"].std() > 0 and abs(pixels["plain"] - pixels["fast"]).max() <= 1
