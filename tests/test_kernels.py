"""The kernels' definitions, when they are used, what torch.compile makes of them; the kernels themselves are run by
`kernel_cases.py` and compiled by `compile_kernels.py`, each in a process of its own."""

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipdit import create_model, kernels
from skipdit.kernels import dispatch
from skipdit.kernels.float8 import Float8Linear, float8_available, quantize_rows
from skipdit.kernels.tiles import groups_of, power_of_two, split
from skipdit.models.layers import use_float8, use_kernels

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_float8 = pytest.mark.skipif(not float8_available("cpu")[0], reason="no float8 products on this CPU")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, env=env | variables, capture_output=True, text=True
    )


@pytest.fixture(autouse=True)
def nothing_told_yet():
    dispatch._tell.cache_clear()


@pytest.fixture
def on_a_card(monkeypatch):
    """A device that has the kernels, so that only the tensors decide."""
    monkeypatch.setattr(dispatch, "available", lambda device: (True, "here"))


# ---------------------------------------------------------------------- definitions


def test_attention_is_softmax_over_the_given_axis():
    qkv = torch.randn(2, 3, 4, 3, 2, 5, dtype=torch.float64)
    q, k, v = qkv.unbind(3)
    over_frames = torch.einsum("bfphd,bgphd->bphfg", q, k) / math.sqrt(5)
    expected = torch.einsum("bphfg,bgphd->bfphd", over_frames.softmax(-1), v).flatten(-2)
    torch.testing.assert_close(kernels.attention(qkv, -3), expected)
    over_patches = torch.einsum("bfphd,bfqhd->bfhpq", q, k) / math.sqrt(5)
    expected = torch.einsum("bfhpq,bfqhd->bfphd", over_patches.softmax(-1), v).flatten(-2)
    torch.testing.assert_close(kernels.attention(qkv, -2), expected)


def test_norm_modulate_of_known_values():
    x = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    shift, scale = torch.tensor([[[10.0, 20.0]]]), torch.tensor([[[1.0, -1.0]]])
    expected = torch.tensor([[[8.0, 20.0], [10.0, 20.0]]])
    torch.testing.assert_close(kernels.norm_modulate(x, shift, scale), expected, atol=1e-5, rtol=0)


def test_gate_residual_norm_is_one_after_the_other():
    x, y, gate, shift, scale = (torch.randn(2, 3, 8) for _ in range(5))
    summed, normed = kernels.gate_residual_norm(x, gate, y, shift, scale)
    assert torch.equal(summed, kernels.gate_residual(x, gate, y)) and torch.equal(summed, x + gate * y)
    assert torch.equal(normed, kernels.norm_modulate(summed, shift, scale))


@pytest.mark.parametrize(
    ("size", "sides"), [(72, (64, 16)), (64, (64, 0)), (8, (16, 0)), (17, (16, 16)), (88, (64, 32)), (120, (64, 64))]
)
def test_split_covers_a_size_by_two_powers_of_two(size, sides):
    assert split(size) == sides
    assert sum(sides) >= size


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 1024, 1152)] == [1, 2, 4, 1024, 2048]


@pytest.mark.parametrize(
    ("shape", "vectors", "groups"),
    [
        ((2, 16, 9, 8), (2, 1, 1, 8), 2),
        ((2, 16, 9, 8), (2, 16, 1, 8), 32),
        ((2, 16, 9, 8), (1, 1, 1, 8), 1),
        ((2, 16, 9, 8), (2, 16, 9, 8), 288),
        ((1, 16, 9, 8), (1, 1, 1, 8), 1),
        ((2, 1, 9, 8), (2, 1, 1, 8), 2),
        ((2, 16, 9, 8), (1, 16, 1, 8), None),
        ((2, 16, 9, 8), (2, 1, 9, 8), None),
        ((2, 16, 9, 8), (3, 1, 1, 8), None),
    ],
)
def test_groups_of_rows_that_share_a_vector(shape, vectors, groups):
    assert groups_of(torch.Size(shape), torch.Size(vectors)) == groups


# ---------------------------------------------------------------------- when they are used


def test_a_cpu_has_no_kernels_and_says_why():
    assert kernels.available("cpu") == (False, "cpu is not a CUDA device")
    assert kernels.available(torch.device("cpu"))[0] is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_card_is_a_reason():
    assert kernels.available("cuda") == (False, "torch finds no CUDA device")


def pretend_card(monkeypatch, capability=(9, 0), triton=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(dispatch, "_triton_version", lambda: "3")
    return dispatch._available.__wrapped__("cuda")  # past the cache


def test_cards_and_installations_that_lack_the_kernels(monkeypatch):
    assert float8_available("meta") == (False, "meta is not a CUDA device")
    old = "Card has compute capability 7.5, and 8.0 is needed"
    assert pretend_card(monkeypatch, capability=(7, 5)) == (False, old)
    assert pretend_card(monkeypatch, triton=False) == (False, "Triton is not installed")
    assert pretend_card(monkeypatch, (8, 0)) == (True, "Triton 3 on Card (compute capability 8.0)")


def test_the_plain_way_is_exact_and_told_once(caplog):
    x, y, gate, shift, scale = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), *torch.randn(3, 2, 1, 1, 8)
    qkv = torch.randn(2, 3, 4, 3, 2, 8)
    weight, bias = torch.randn(16, 8), torch.randn(16)
    with caplog.at_level(logging.INFO, "skipdit.kernels"):
        for _ in range(2):
            for axis in (-2, -3):
                assert torch.equal(kernels.fused_attention(qkv, axis), kernels.attention(qkv, axis))
            assert torch.equal(kernels.fused_norm_modulate(x, shift, scale), kernels.norm_modulate(x, shift, scale))
            assert torch.equal(kernels.fused_gate_residual(x, gate, y), x + gate * y)
            found = kernels.fused_gate_residual_norm(x, gate, y, shift, scale)
            expected = kernels.gate_residual_norm(x, gate, y, shift, scale)
            assert all(map(torch.equal, found, expected))
            assert torch.equal(kernels.fused_linear_gelu(x, weight, bias), kernels.linear_gelu(x, weight, bias))
    assert [record.getMessage() for record in caplog.records] == [
        f"The {name} kernel is not used, because cpu is not a CUDA device; PyTorch's own operations are."
        for name in ("attention", "norm", "mlp")
    ]


@pytest.mark.parametrize(
    ("qkv", "axis", "reason"),
    [
        (torch.zeros(1, 2, 3, 3, 2, 8, dtype=torch.float64), -3, "they are of torch.float64"),
        (torch.zeros(1, 17, 3, 3, 2, 8), -3, "sequences of torch.float32 are longer than 16"),
        (torch.zeros(1, 2, 65, 3, 2, 8, dtype=torch.bfloat16), -2, "sequences of torch.bfloat16 are longer than 64"),
        (torch.zeros(1, 2, 3, 3, 1, 136), -3, "heads are larger than 128"),
        (torch.zeros(2, 3, 3, 2, 8), -3, "it runs along F or P"),
    ],
)
def test_what_the_attention_kernel_leaves_to_pytorch(on_a_card, caplog, qkv, axis, reason):
    caplog.set_level(logging.INFO)
    assert kernels.fused_attention(qkv, axis).shape == (*qkv.shape[:-3], qkv.shape[-2] * qkv.shape[-1])
    assert reason in caplog.text


def test_what_the_norm_kernels_leave_to_pytorch(on_a_card, caplog):
    caplog.set_level(logging.INFO)
    x = torch.randn(2, 3, 4, 8)
    unusual = torch.randn(1, 3, 1, 8)
    assert torch.equal(kernels.fused_norm_modulate(x, unusual, unusual), kernels.norm_modulate(x, unusual, unusual))
    assert "the conditioning is not of shape" in caplog.text
    y, gate = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 1, 8)
    assert torch.equal(kernels.fused_gate_residual(x, gate, y), x + gate * y)
    assert "differ in shape" in caplog.text


def test_the_mlp_kernel_is_left_out_where_a_gradient_is_wanted(on_a_card):
    x, weight, bias = torch.randn(3, 8), torch.randn(16, 8, requires_grad=True), torch.randn(16)
    kernels.fused_linear_gelu(x, weight, bias).sum().backward()
    assert weight.grad.shape == weight.shape


def test_without_triton_everything_is_plain():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from skipdit import create_model; from skipdit.models.layers import use_float8, use_kernels\n"
        "model = create_model('Latte-S/8-skip', depth=4, hidden_size=24, num_heads=2)\n"
        "use_kernels(model); print(*model(torch.zeros(1, 4, 2, 16, 16), torch.tensor([5])).sample.shape)"
    )
    ran = run("-c", code)
    assert ran.stdout.strip() == "1 8 2 16 16", ran.stderr[-1000:]


# ---------------------------------------------------------------------- in models


def tiny_inputs():
    sizes = {"depth": 4, "hidden_size": 24, "num_heads": 2, "sample_size": 4, "num_frames": 2, "num_classes": 5}
    model = create_model("Latte-S/2-skip", **sizes).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, (torch.randn(2, 4, 2, 4, 4), torch.tensor([3, 800]), torch.tensor([1, 4]))


def test_a_model_takes_the_plain_way_bit_for_bit_on_a_cpu():
    model, inputs = tiny_inputs()
    expected = model(*inputs).sample
    use_kernels(model)
    assert model.blocks[0].attn.kernels == model.final_layer.kernels == kernels.KERNELS
    assert torch.equal(model(*inputs).sample, expected)
    use_kernels(model, ())
    assert model.blocks[0].mlp.kernels == ()


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="No kernel 'softmax': choose from attention, norm, mlp"):
        use_kernels(torch.nn.Module(), ["norm", "softmax"])


def test_the_plain_way_is_one_graph_when_compiled():
    model, inputs = tiny_inputs()
    use_kernels(model)
    expected = model(*inputs).sample
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    found = torch.compile(model, fullgraph=True, backend=keep)(*inputs).sample
    assert torch.equal(found, expected)
    assert len(graphs) == 1 and "skipdit" not in graphs[0].code.replace("skipdit_", "")


# ---------------------------------------------------------------------- float8


def test_rows_are_scaled_to_the_range_of_float8():
    values = torch.tensor([[448.0, -224.0, 1.0], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]])
    rows, scale = quantize_rows(values)
    assert rows.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(scale[:2], torch.tensor([[1.0], [0.5 / 448]]))
    torch.testing.assert_close(rows.float() * scale, values)  # all of them are floats of 3 bits


@needs_float8
def test_a_float8_layer_is_the_product_of_the_rounded_sides():
    linear = torch.nn.Linear(32, 48).to(torch.bfloat16)
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    layer = Float8Linear(linear)
    (weight, weight_scale), (rows, scale) = quantize_rows(linear.weight), quantize_rows(x.view(-1, 32))
    expected = (rows.float() * scale) @ (weight.float() * weight_scale).T + linear.bias.float()
    found = layer(x)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 5, 48)
    torch.testing.assert_close(found.float().view(-1, 48), expected, atol=0.02, rtol=0.01)
    exact = linear(x).float()
    assert 0.005 < (found.float() - exact).norm() / exact.norm() < 0.05


@needs_float8
def test_float8_in_a_model_and_in_one_graph():
    sizes = {"depth": 4, "hidden_size": 32, "num_heads": 2, "sample_size": 4, "num_frames": 2, "num_classes": 5}
    model = create_model("Latte-S/2-skip", **sizes).to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 4, 2, 4, 4, dtype=torch.bfloat16), torch.tensor([3, 800]), torch.tensor([1, 4])
    expected = model(*inputs).sample
    use_float8(model)
    kinds = [type(m) for m in model.blocks.modules()].count(Float8Linear), type(model.skip_linears[0].linear)
    assert kinds == (16, torch.nn.Linear)
    found = model(*inputs).sample
    error = (found - expected).float().norm() / expected.float().norm()
    assert 1e-3 < error < 0.1
    use_kernels(model)  # the MLP's has no say over layers of float8
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs).sample, found)


@needs_float8
def test_what_float8_refuses(monkeypatch):
    model, _ = tiny_inputs()
    with pytest.raises(ValueError, match="A layer of 24 to 72 cannot run in float8: its sizes are not in mult"):
        use_float8(model)
    with pytest.raises(ValueError, match="No float8 layers 'norm': choose from attention, mlp, skips"):
        use_float8(model, ["norm"])
    pretend_card(monkeypatch, (8, 0))
    assert float8_available("cuda") == (False, "Card has compute capability 8.0, and 8.9 is needed")
    pretend_card(monkeypatch, (9, 0))
    assert float8_available("cuda") == (True, "Card")


# ---------------------------------------------------------------------- the kernels themselves


@needs_triton
def test_the_kernels_in_triton_s_interpreter():
    cases = str(HERE / "kernel_cases.py")
    ran = run("-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


@needs_triton
@pytest.mark.skipif(not kernels.available("cuda")[0], reason="no card that runs the kernels")
def test_the_kernels_on_the_card():
    ran = run("-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", str(HERE / "kernel_cases.py"))
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


@needs_triton
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton brings its assembler on Linux only")
def test_the_kernels_compile_for_a_hopper_card_within_its_registers(tmp_path):
    ran = run(str(HERE / "compile_kernels.py"), "90", TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == 7
    for kernel in found:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["wide"] == 1, kernel  # every access moves 16 bytes
        assert (kernel["matrix_units"] > 0) == ("attention" in kernel["kernel"])
