"""Networks: the published numbers, sizes, joint images, skips that start exact."""

import pytest
import torch
from golden_data import FAMILIES, golden, golden_model, golden_weights, relative_error

from skipdit.models import SkipDiTTransformer2DModel, SkipLatteTransformer3DModel, create_model, list_models


def forward(model, tensors, labels="forward.labels"):
    return model(tensors["forward.sample"], tensors["forward.timestep"], tensors[labels] if labels else None).sample


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("skip", "expected"), [("linear", "forward.skip_output"), (None, "forward.vanilla_output")])
def test_forward_agrees_with_the_published_model(family, skip, expected):
    tensors, _ = golden(family)
    assert relative_error(forward(golden_model(family, skip=skip), tensors), tensors[expected]) < 1e-5


def test_unconditional_forward_agrees_with_the_published_model():
    tensors, _ = golden("latte_skip")
    model = golden_model("latte_skip", num_classes=None)
    assert relative_error(forward(model, tensors, None), tensors["forward.unconditional_output"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_positions_are_the_published_ones(family):
    weights = golden_weights(family)
    fresh = type(golden_model(family))(**{k: v for k, v in golden_model(family).config.items() if k[0] != "_"})
    for name in ("pos_embed", "temp_embed"):
        if name in weights:
            assert torch.equal(getattr(fresh, name), weights[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_skips_leave_a_vanilla_model_exactly_as_it_was(family):
    tensors, _ = golden(family)
    vanilla = golden_model(family, skip=None)
    config = {k: v for k, v in vanilla.config.items() if k[0] != "_"}
    retrofitted = type(vanilla)(**{**config, "skip": "residual"}).eval().requires_grad_(False)
    missing, unexpected = retrofitted.load_state_dict(vanilla.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("skip_") for name in missing)
    assert torch.equal(forward(retrofitted, tensors), forward(vanilla, tensors))
    retrofitted.skip_linears[0].linear.weight.data.normal_()  # and the branch is really there
    assert not torch.allclose(forward(retrofitted, tensors), forward(vanilla, tensors))


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_the_labels_out_means_the_null_class(family):
    tensors, _ = golden(family)
    model = golden_model(family)
    null = torch.full_like(tensors["forward.labels"], model.null_class)
    with_null = model(tensors["forward.sample"], tensors["forward.timestep"], null).sample
    assert torch.equal(forward(model, tensors, None), with_null)
    assert not torch.allclose(forward(model, tensors), with_null)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    tensors, _ = golden(family)
    model = golden_model(family).requires_grad_(True).train()

    def gradients():
        model.zero_grad()
        forward(model, tensors).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_other_sizes_frames_and_non_square_latents():
    model = golden_model("latte_skip")
    out = model(torch.randn(1, 4, 7, 4, 12), torch.tensor([3]), torch.tensor([0])).sample
    assert out.shape == (1, 8, 7, 4, 12) and out.isfinite().all()
    rectangular = SkipLatteTransformer3DModel(
        sample_size=(4, 12), num_frames=7, hidden_size=32, depth=28, num_heads=4, num_classes=5
    )
    weights = {k: v for k, v in golden_weights("latte_skip").items() if not k.endswith("_embed")}
    rectangular.load_state_dict(weights, strict=False)
    latents = torch.randn(1, 4, 7, 4, 12)
    same = rectangular.eval()(latents, torch.tensor([3]), torch.tensor([0])).sample
    again = model(latents, torch.tensor([3]), torch.tensor([0])).sample
    assert torch.allclose(same, again, atol=1e-6)


def test_width_fills_the_first_half_of_the_position_embedding():
    model = SkipDiTTransformer2DModel(sample_size=(4, 8), patch_size=2, hidden_size=8, depth=2, num_heads=2)
    grid = model.pos_embed[0].reshape(2, 4, 8)
    assert torch.equal(grid[0, :, 4:], grid[0, :1, 4:].expand(4, 4))  # along a row only the first half changes
    assert torch.equal(grid[:, 0, :4], grid[:1, 0, :4].expand(2, 4))
    assert torch.allclose(grid[0, 3, :2], torch.sin(torch.tensor([3.0, 0.03])))


def test_joint_images_pass_the_spatial_blocks_only():
    model = golden_model("latte_skip")
    clip, images = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 3, 8, 8)
    t, label, image_labels = torch.tensor([400]), torch.tensor([1]), torch.tensor([[0, 2, 4]])

    def joint(images, image_labels):
        latents = torch.cat([clip, images], dim=2)
        return model(latents, t, label, num_images=3, image_class_labels=image_labels).sample

    out = joint(images, image_labels)
    alone = model(clip, t, label).sample
    assert torch.allclose(out[:, :, :4], alone, atol=1e-5)  # the clip does not see the images
    changed = images.clone()
    changed[:, :, 1] += 1
    other = joint(changed, image_labels)
    assert torch.allclose(other[:, :, [4, 6]], out[:, :, [4, 6]], atol=1e-5)  # nor do images see each other
    assert not torch.allclose(other[:, :, 5], out[:, :, 5])
    relabelled = joint(images, torch.tensor([[0, 3, 4]]))
    assert torch.allclose(relabelled[:, :, [4, 6]], out[:, :, [4, 6]], atol=1e-5)
    assert not torch.allclose(relabelled[:, :, 5], out[:, :, 5])


@pytest.mark.parametrize("name", ["Latte-S/8", "Latte-S/8-skip", "DiT-S/4-skip", "DiT-B/8-skip-residual"])
def test_presets_build(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=3, sample_size=16)
    assert model.num_units == (6 if name.startswith("Latte") else 12)
    assert len(model.skip_linears) == (0 if name.endswith("8") else model.num_units // 2)
    assert model.config.patch_size == int(name.split("/")[1][0])


def test_preset_names_and_parameter_counts():
    assert len(list_models()) == 2 * 4 * 3 * 3
    with torch.device("meta"):
        xl = create_model("Latte-XL/2-skip", num_classes=101)
    # The published file holds 2 771 053 040 bytes of float32 weights and a few kB of pickle.
    bytes_of_weights = 4 * sum(v.numel() for v in xl.state_dict().values())
    assert 0 <= 2_771_053_040 - bytes_of_weights < 200_000
    with pytest.raises(ValueError, match="Latte-XL/2-skip"):
        create_model("Latte-XXL/2")


def test_fresh_models_predict_zero_and_have_live_skips():
    model = create_model("Latte-S/8-skip", num_classes=3, sample_size=16, num_frames=2, hidden_size=48)
    out = model(torch.randn(1, 4, 2, 16, 16), torch.tensor([5]), torch.tensor([0])).sample
    assert torch.equal(out, torch.zeros_like(out))  # adaLN-Zero
    assert all(skip.linear.weight.std() > 0 for skip in model.skip_linears)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 6}, "multiple of 4"),
        ({"skip": "dense"}, "skip='dense'"),
        ({"num_heads": 5}, "divisible"),
        ({"sample_size": 9}, "patch_size"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SkipLatteTransformer3DModel(**{"sample_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 4, **arguments})


def test_bad_inputs_are_refused():
    model = golden_model("latte_skip")
    t = torch.tensor([1])
    with pytest.raises(ValueError, match="Expected latents"):
        model(torch.randn(1, 4, 8, 8), t)
    with pytest.raises(ValueError, match="patches of 2"):
        model(torch.randn(1, 4, 4, 7, 8), t)
    with pytest.raises(ValueError, match="class labels"):
        model(torch.randn(1, 4, 4, 8, 8), t, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="leaves no clip"):
        model(torch.randn(1, 4, 4, 8, 8), t, num_images=4)
    with pytest.raises(ValueError, match="unconditional"):
        golden_model("latte_skip", num_classes=None)(torch.randn(1, 4, 4, 8, 8), t, torch.tensor([1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_round_trip(family, tmp_path):
    model = golden_model(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert loaded.config.skip == "linear"
