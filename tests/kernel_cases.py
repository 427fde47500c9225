"""The kernels against their definitions, through Triton's interpreter on a CPU or on a card.

`test_kernels.py` runs this file in a process of its own, because Triton reads TRITON_INTERPRET when it is first
imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernel_cases.py, or without it where there is a card.
"""

import os

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from skipdit import create_model
from skipdit.kernels import (
    KERNELS,
    attention,
    dispatch,
    gate_residual,
    gate_residual_norm,
    linear_gelu,
    norm_modulate,
)
from skipdit.kernels.attention import short_attention, short_attention_backward
from skipdit.kernels.mlp import _linear_gelu
from skipdit.kernels.norm import (
    _gate_residual,
    _gate_residual_backward,
    _gate_residual_norm,
    _norm_modulate,
    _norm_modulate_backward,
)
from skipdit.models.layers import Block, use_kernels

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Largest error allowed, relative to the largest value: a few roundings (the interpreter truncates bfloat16, a card
# multiplies float32 as three products of TF32).
TOLERANCE = {torch.float32: 2e-6 if INTERPRETED else 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in float64, a leaf for autograd."""
    return tensor.detach().to(torch.float64, copy=True).requires_grad_()


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, times: float = 1) -> None:
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected.detach()).abs().max()
    assert error <= times * TOLERANCE[dtype] * expected.detach().abs().max()


# ---------------------------------------------------------------------- attention


def check_attention(qkv: torch.Tensor, axis: int) -> None:
    """Output and gradient of `short_attention` against the definition in float64."""
    mine, reference = leaf(qkv), exact(qkv)
    out, expected = short_attention(mine, axis), attention(reference, axis - 4)
    assert out.dtype == qkv.dtype and out.is_contiguous()
    grad = random(*out.shape, dtype=qkv.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert_near(out, expected, qkv.dtype)
    assert_near(mine.grad, reference.grad, qkv.dtype)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_every_dtype_at_the_published_head_size(dtype, axis):
    check_attention(random(2, 3, 2, 3, 2, 72, dtype=dtype), axis)


@pytest.mark.parametrize(("length", "size"), [(1, 72), (16, 64), (17, 24), (33, 40), (64, 16), (2, 128), (3, 5)])
def test_attention_over_lengths_and_head_sizes(length, size):
    check_attention(random(1, length, 2, 3, 1, size), 1)


def test_attention_reads_any_strides_in_place():
    stored = random(2, 3, 2, 5, 72, 2)  # [B, kind, H, F, d, P]
    check_attention(stored.permute(0, 3, 5, 1, 2, 4), 1)
    check_attention(random(2, 6, 3, 3, 2, 24)[:, 1:5], 1)  # frames of a clip that joint images follow
    check_attention(random(2, 1, 3, 3, 2, 24).expand(2, 4, 3, 3, 2, 24), 2)


def test_attention_masks_what_lies_beyond_the_sequence():
    qkv = random(1, 8, 2, 3, 1, 24)
    qkv[:, 5:] = float("nan")  # must not be read
    assert_near(short_attention(qkv[:, :5], 1), attention(qkv[:, :5].double(), -3), torch.float32)


def test_attention_takes_gradients_of_any_strides():
    qkv = leaf(random(1, 3, 2, 3, 2, 24))
    short_attention(qkv, 1).sum().backward()  # a gradient of stride 0
    reference = exact(qkv)
    attention(reference, -3).sum().backward()
    assert_near(qkv.grad, reference.grad, torch.float32)


def test_attention_of_nothing():
    qkv = leaf(random(0, 3, 2, 3, 2, 24))
    short_attention(qkv, 1).sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_attention_survives_large_scores():
    check_attention(torch.randint(-40, 40, (1, 4, 1, 3, 1, 16)).to(DEVICE, torch.float32), 1)  # exact products


# ---------------------------------------------------------------------- norm, gate, residual

CONDITIONS = {
    "one for a clip": ((2, 3, 5, 72), (2, 1, 1, 72)),
    "one for a frame": ((2, 3, 5, 72), (2, 3, 1, 72)),
    "pictures": ((2, 7, 24), (2, 1, 24)),
    "one for all": ((2, 3, 24), (1, 1, 24)),
    "several programs a group": ((1, 19, 33), (1, 1, 33)),
}


def check_norms(x, y, conditioning, dtype, times=1):
    """The three operators, outputs and gradients, against the definitions in float64."""
    mine, reference = [leaf(t) for t in (x, y, conditioning)], [exact(t) for t in (x, y, conditioning)]
    shift, scale, gate = mine[2].chunk(3, dim=-1)
    outputs = [
        _norm_modulate(mine[0], shift, scale, 1e-6, dtype),
        _gate_residual(mine[0], gate, mine[1], dtype),
        *_gate_residual_norm(mine[0], gate, mine[1], shift, scale, 1e-6, dtype, dtype),
    ]
    shift, scale, gate = reference[2].chunk(3, dim=-1)
    expected = [
        norm_modulate(reference[0], shift, scale),
        gate_residual(reference[0], gate, reference[1]),
        *gate_residual_norm(reference[0], gate, reference[1], shift, scale),
    ]
    grads = [random(*x.shape, dtype=dtype) for _ in outputs]
    for output, right in zip(outputs, expected, strict=True):
        assert output.dtype == dtype and output.is_contiguous()
        assert_near(output, right, dtype)
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for one, right in zip(mine, reference, strict=True):
        assert_near(one.grad, right.grad, dtype, times)


@pytest.mark.parametrize(("shape", "vectors"), CONDITIONS.values(), ids=CONDITIONS)
def test_norms_over_shapes_of_the_conditioning(shape, vectors):
    conditioning = random(*vectors[:-1], 3 * vectors[-1])
    check_norms(random(*shape), random(*shape), conditioning, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_norms_in_half_precision(dtype):
    shape = (2, 2, 3, 72)
    x, y, conditioning = (random(*s, dtype=dtype) for s in (shape, shape, (2, 1, 1, 216)))
    check_norms(x, y, conditioning, dtype, times=2)  # gradients add up several rounded ones


def test_norms_of_mixed_dtypes_as_under_autocast():
    x, y = random(2, 3, 24), random(2, 3, 24, dtype=torch.bfloat16)
    check_norms(x, y, random(2, 1, 72, dtype=torch.bfloat16), torch.float32, times=1e4)  # bfloat16 gradients
    normed = _norm_modulate(x, x[:, :1], x[:, :1], 1e-6, torch.bfloat16)
    assert normed.dtype == torch.bfloat16


def test_norms_read_a_clip_that_images_follow_and_transposed_rows():
    whole = random(2, 5, 3, 24)
    conditioning = random(2, 1, 1, 72)
    check_norms(whole[:, :3], whole[:, 2:], conditioning, torch.float32)
    turned = random(2, 24, 3).transpose(1, 2)
    check_norms(turned, turned, random(2, 1, 72), torch.float32)


def test_norm_of_rows_far_from_zero():
    x = random(2, 3, 24) + 1000
    vectors = torch.zeros(2, 1, 24, device=DEVICE)
    normed = _norm_modulate(x, vectors, vectors, 1e-6, torch.float32)
    expected = norm_modulate(x.double(), vectors.double(), vectors.double())
    assert (normed - expected).abs().max() < 1e-3  # of values of order 1, read with 6e-5 of rounding


def test_norms_of_nothing():
    x, vectors = random(0, 3, 24), random(0, 1, 24)
    assert _norm_modulate(x, vectors, vectors, 1e-6, torch.float32).shape == x.shape
    assert _gate_residual(x, vectors, x, torch.float32).shape == x.shape


def test_linear_gelu():
    x, weight, bias = random(2, 3, 24), random(32, 24), random(32)
    expected = linear_gelu(*(t.double() for t in (x, weight, bias)))
    # On CPUs PyTorch takes the exact GELU here, which differs from the tanh form by up to 5e-4.
    assert (_linear_gelu(x, weight, bias) - expected).abs().max() < (1e-3 if INTERPRETED else 2e-3)


# ---------------------------------------------------------------------- as PyTorch sees them


def test_operators_keep_the_rules_of_the_library():
    qkv, x = random(1, 2, 2, 3, 1, 16), random(2, 3, 24)
    vector = random(2, 1, 24)
    cases = [
        (short_attention, (leaf(qkv), 1)),
        (short_attention_backward, (random(1, 2, 2, 16), qkv, 1)),
        (_norm_modulate, (leaf(x), leaf(vector), leaf(vector + 1), 1e-6, torch.float32)),
        (_norm_modulate_backward, (x + 1, x, vector, 1e-6, None)),
        (_norm_modulate_backward, (x + 1, x, vector, 1e-6, x + 2)),
        (_gate_residual, (leaf(x), leaf(vector), leaf(x + 1), torch.float32)),
        (_gate_residual_backward, (x, vector, x + 1)),
        (
            _gate_residual_norm,
            (leaf(x), leaf(vector), leaf(x + 1), leaf(vector + 1), vector + 2, 1e-6, torch.float32, torch.bfloat16),
        ),
        (_linear_gelu, (x, random(32, 24), random(32))),
    ]
    for operator, inputs in cases:
        torch.library.opcheck(operator, inputs)


@pytest.fixture
def everywhere(monkeypatch):
    """Kernels on the CPU too: the interpreter runs them."""
    monkeypatch.setattr(dispatch, "available", lambda device: (True, "interpreted"))
    if INTERPRETED:  # not the same function on CPUs
        monkeypatch.setattr("skipdit.models.layers.fused_linear_gelu", linear_gelu)


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    """On the device, with no zero gates."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.to(DEVICE)


def run_latte(model, latents, **inputs):
    """Output and the gradients of all parameters."""
    labels = torch.tensor([4], device=DEVICE)
    out = model(latents, torch.tensor([800], device=DEVICE), labels, return_dict=False, **inputs)[0]
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
    return [out, *(parameter.grad.clone() for parameter in model.parameters())]


def test_a_model_with_kernels_is_the_plain_model(everywhere):
    sizes = {"depth": 4, "hidden_size": 24, "num_heads": 1, "sample_size": 4, "num_frames": 2, "num_classes": 5}
    model = seeded(create_model("Latte-S/2-skip", **sizes))
    latents = random(1, 4, 3, 4, 4)
    images = {"num_images": 1, "image_class_labels": torch.tensor([[2]], device=DEVICE)}
    expected = run_latte(model, latents, **images)
    use_kernels(model)
    found = run_latte(model, latents, **images)
    assert not torch.equal(found[0], expected[0])  # or no kernel ran
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 3e-5 * max(other.abs().max(), 1e-2)


def run_block(call, block, hidden_states, conditioning):
    inputs = [leaf(hidden_states), leaf(conditioning)]
    out = call(*inputs, axis=-3)
    block.zero_grad()
    out.square().sum().backward()
    return [out, *(t.grad.clone() for t in (*inputs, *block.parameters()))]


@pytest.mark.parametrize("names", [KERNELS, ("attention", "norm")])
def test_a_compiled_block_keeps_the_kernels_in_one_graph(everywhere, names):
    block = seeded(Block(24, num_heads=1, mlp_ratio=2))
    use_kernels(block, names)
    inputs = random(1, 2, 2, 24), random(1, 1, 1, 24)
    expected = run_block(block, block, *inputs)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(block, fullgraph=True, backend=keep)
    for one, other in zip(run_block(compiled, block, *inputs), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    operators = [str(node.target) for node in graphs[0].graph.nodes if "skipdit" in str(node.target)]
    names = ("norm_modulate", "short_attention", "gate_residual_norm", "gate_residual")
    assert operators == [f"skipdit.{name}.default" for name in names]
