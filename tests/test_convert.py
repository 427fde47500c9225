"""Published weights to diffusers folders and back; what does not fit is named; pickles run nothing."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline

from skipdit import (
    SkipDiTPipeline,
    SkipDiTTransformer2DModel,
    SkipLattePipeline,
    SkipLatteTransformer3DModel,
    make_scheduler,
)
from skipdit.cli import main
from skipdit.convert import convert
from skipdit.errors import UserError
from skipdit.weights import describe, infer_config

GOLDEN = Path(__file__).parent / "golden"
TINY = {"sample_size": 8, "hidden_size": 32, "num_heads": 4, "depth": 8, "num_classes": 3}


def latte(**changes) -> SkipLatteTransformer3DModel:
    return noisy(SkipLatteTransformer3DModel(**{**TINY, "num_frames": 4, **changes}))


def dit(**changes) -> SkipDiTTransformer2DModel:
    return noisy(SkipDiTTransformer2DModel(**{**TINY, **changes}))


def noisy(model):
    """No parameter at its initial zero, so that every weight matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def vae(tmp_path) -> Path:
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1
    )
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def save(state: dict, path: Path) -> Path:
    torch.save(state, path)
    return path


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["latte", "dit"])
def test_the_config_of_the_published_models_is_inferred(family):
    sizes = json.loads((GOLDEN / f"{family}_skip.json").read_text())
    tensors = load_file(GOLDEN / f"{family}_skip.safetensors")
    state = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    config = infer_config(state, "golden", num_heads=sizes["num_heads"])
    names = ("depth", "hidden_size", "num_heads", "num_classes", "sample_size", "patch_size", "in_channels")
    assert {name: config[name] for name in names} == {name: sizes[name] for name in names}
    assert config.get("num_frames") == sizes.get("num_frames")
    assert (config["skip"], config["learn_sigma"], config["mlp_ratio"]) == ("linear", True, 4.0)


@pytest.mark.parametrize(
    "make, changes",
    [(latte, {}), (latte, {"num_classes": None, "skip": None}), (latte, {"patch_size": 4}), (dit, {}),
     (dit, {"learn_sigma": False, "mlp_ratio": 2.0, "num_classes": None})],
)  # fmt: skip
def test_what_was_built_is_inferred(make, changes):
    model = make(**changes)
    config = infer_config(model.state_dict(), "file", num_heads=4)
    kept = {name: value for name, value in model.config.items() if name in config and not name.startswith("_")}
    assert {name: config[name] for name in kept} == kept
    assert config["_class_name"] == type(model).__name__


@pytest.mark.parametrize(
    "size, name",
    [
        (
            {"depth": 28, "hidden_size": 1152, "num_heads": 16, "num_classes": 101},
            "Latte-XL/2-skip (video, 16 frames",
        ),
        (
            {"depth": 12, "hidden_size": 384, "num_heads": 6, "skip": None},
            "Latte-S/2 (video, 16 frames, unconditional)",
        ),
    ],
)
def test_a_model_of_published_size_needs_no_heads_and_has_its_name(size, name):
    with torch.device("meta"):
        model = SkipLatteTransformer3DModel(**size)
    config = infer_config(model.state_dict(), "file")
    assert config["num_heads"] == size["num_heads"]
    assert describe(model).startswith(name)


def test_a_published_file_becomes_a_folder_that_samples_the_same(tmp_path, vae):
    model = latte()
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    source = save({"ema": state}, tmp_path / "tiny.pt")
    (tmp_path / "names.txt").write_text("1 Archery\r\n2 Biking\r\n3 Diving\r\n")
    said = convert(source, tmp_path / "out", vae=vae, num_heads=4, class_names=tmp_path / "names.txt")
    assert said.startswith("Latte of depth 8 and hidden size 32 with linear skips (video, 4 frames, 3 classes) -> ")

    direct = SkipLattePipeline(
        transformer=model, vae=AutoencoderKL.from_pretrained(vae), scheduler=make_scheduler("ddim")
    )
    loaded = SkipLattePipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").is_file()
    assert same(loaded.transformer.state_dict(), model.state_dict())
    frames = []
    for pipe in (direct, loaded):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        frames.append(pipe(class_labels=[2], num_inference_steps=2, generator=generator, output_type="np").frames)
    assert frames[0].shape == (1, 4, 8, 8, 3)
    assert (frames[0] == frames[1]).all()
    assert loaded.get_label_ids(["Diving"]) == [2]


def test_an_image_model_becomes_an_image_pipeline(tmp_path, vae):
    source = save({"ema": dit().state_dict()}, tmp_path / "tiny.pt")
    convert(source, tmp_path / "out", vae=vae, num_heads=4)
    pipe = SkipDiTPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[0, 1], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("only", [[], ["--transformer-only"]])
def test_there_and_back_gives_the_same_tensors(tmp_path, vae, only):
    model = latte()
    save({"ema": model.state_dict()}, tmp_path / "a.pt")
    words = ["--num-heads", "4", "--vae", str(vae), *only]
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "folder"), *words]) == 0
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "b.pt")]) == 0
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(content) == ["ema"]
    assert same(content["ema"], model.state_dict())


def test_a_training_checkpoint_shrinks_to_its_ema(tmp_path):
    """Four copies of the weights and a Namespace, as the published image model has, to one copy."""
    ema, model = dit(), dit(num_classes=5)
    weights = model.state_dict()
    moments = {name: {"exp_avg": value.clone(), "exp_avg_sq": value.clone()} for name, value in weights.items()}
    content = {
        "model": weights,
        "ema": ema.state_dict(),
        "opt": moments,
        "args": argparse.Namespace(model="DiT"),
    }
    source = save(content, tmp_path / "full.pt")
    convert(source, tmp_path / "ema.safetensors", num_heads=4)
    assert same(load_file(tmp_path / "ema.safetensors"), ema.state_dict())
    assert (tmp_path / "ema.safetensors").stat().st_size < 0.3 * source.stat().st_size
    convert(source, tmp_path / "model.safetensors", num_heads=4, weights="model")
    assert same(load_file(tmp_path / "model.safetensors"), weights)


def test_half_precision_halves_the_file(tmp_path):
    model = latte()
    source = save(model.state_dict(), tmp_path / "a.pt")
    convert(source, tmp_path / "full.safetensors", num_heads=4)
    convert(source, tmp_path / "half.safetensors", num_heads=4, dtype="bf16")
    half = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert same(half, {name: value.bfloat16() for name, value in model.state_dict().items()})
    modes = {item.stat().st_mode & 0o777 for item in tmp_path.glob("*.safetensors")}
    assert modes == {(tmp_path / "a.pt").stat().st_mode & 0o777}
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]


# -- what does not fit


def change(state: dict, **changes) -> dict:
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


def test_names_and_shapes_that_differ_are_listed(tmp_path):
    state = change(latte().state_dict(), **{"blocks.3.attn.proj.weight": None, "extra.weight": torch.zeros(1)})
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(7)
    with pytest.raises(UserError) as caught:
        convert(save(state, tmp_path / "odd.pt"), tmp_path / "out.pt", num_heads=4)
    assert str(caught.value).split("odd.pt ")[1] == (
        "looks like Latte of depth 8 and hidden size 32 with linear skips (video, 4 frames, 3 classes), "
        "but does not fit it; missing: blocks.3.attn.proj.weight; not known: extra.weight; of another shape: "
        "blocks.1.mlp.fc2.bias (7,), not (32,)."
    )
    assert not (tmp_path / "out.pt").exists()


def test_half_of_the_skips_missing_is_seen(tmp_path):
    state = latte().state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(("skip_linears.1.", "skip_norms.1."))}
    with pytest.raises(UserError, match=r"missing: skip_linears\.1\.linear\.bias, skip_linears\.1\.linear\.weight"):
        convert(save(state, tmp_path / "odd.pt"), tmp_path / "out.pt", num_heads=4)


@pytest.mark.parametrize(
    "name, what",
    [
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "an autoencoder"),
        ("caption_projection.linear_1.weight", "a text-to-video model"),
        ("somewhere.weight", "Its names begin with somewhere"),
    ],
)
def test_another_kind_of_model_is_named(tmp_path, name, what):
    with pytest.raises(UserError, match=f"is no DiT or Latte: it has no x_embedder.proj.weight.*{what}"):
        convert(save({name: torch.zeros(2, 2)}, tmp_path / "odd.pt"), tmp_path / "out.pt")


def test_a_size_that_nothing_tells_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="hidden size 32.*pass --num-heads"):
        convert(save(latte().state_dict(), tmp_path / "a.pt"), tmp_path / "out.pt")


class Harmful:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_harmful_pickle_is_refused_and_not_run(tmp_path, capsys):
    bait = tmp_path / "was-run"
    save({"ema": latte().state_dict(), "args": Harmful(bait)}, tmp_path / "evil.pt")
    assert main(["convert", str(tmp_path / "evil.pt"), str(tmp_path / "out.pt"), "--num-heads", "4"]) == 2
    assert "which are not loaded because they could run code" in capsys.readouterr().err
    assert not bait.exists()
    assert not (tmp_path / "out.pt").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert bait.exists()  # the bait works


def test_mistakes_are_told_before_any_work(tmp_path, vae):
    source = save(latte().state_dict(), tmp_path / "a.pt")
    (tmp_path / "there").mkdir()

    def message(*arguments, **options) -> str:
        with pytest.raises(UserError) as caught:
            convert(*arguments, num_heads=4, **options)
        return str(caught.value)

    assert "is not there" in message(tmp_path / "none.pt", tmp_path / "out.pt")
    assert "exists: choose another name or add --overwrite" in message(source, tmp_path / "there")
    assert "download_ckpts.py skip-dit/vae" in message(source, tmp_path / "out", vae=tmp_path / "no-vae")
    assert "No sampler 'eulr'" in message(source, tmp_path / "out", vae=vae, scheduler="eulr")
    assert "name the file with .pt or .safetensors" in message(source, tmp_path / "out.ckpt")
    assert "no diffusers folder" in message(tmp_path / "there", tmp_path / "out.pt")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "2 names for 3 classes" in message(source, tmp_path / "out", vae=vae, class_names=tmp_path / "names.txt")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.pt", "names.txt", "there", "vae"]


def test_a_pipeline_keeps_its_own_parts(tmp_path):
    """Autoencoder, scheduler and class names; an option replaces one of them."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_scheduler("unipc", prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "half", dtype="fp16")
    half = SkipLattePipeline.from_pretrained(tmp_path / "half")
    assert half.class_names == ["zero", "one", "two"]
    assert type(half.scheduler).__name__ == "UniPCMultistepScheduler"
    assert half.scheduler.config.prediction_type == "v_prediction"
    weights = pipeline.vae.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in half.vae.state_dict().items())
    (tmp_path / "classInd.txt").write_text("1 A\n2 B\n3 C\n")
    convert(tmp_path / "own", tmp_path / "named", class_names=tmp_path / "classInd.txt", scheduler="ddim")
    named = SkipLattePipeline.from_pretrained(tmp_path / "named")
    assert named.class_names == ["A", "B", "C"] and type(named.scheduler).__name__ == "RespacedDDIMScheduler"
