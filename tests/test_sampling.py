"""`skipdit sample`: mistakes told before any work, samples independent of batching, files that hold them."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import NAMES, save_pipelines, tiny_pipeline

from skipdit import SkipCacheConfig, make_scheduler
from skipdit.cli import main
from skipdit.config import load_config
from skipdit.errors import UserError
from skipdit.models.presets import PRESETS
from skipdit.sampling.command import SampleConfig
from skipdit.sampling.generate import generate
from skipdit.sampling.loading import choose_device, find_model, read_class_names, resolve_classes
from skipdit.sampling.planning import parse_cache
from skipdit.sampling.streaming import sample_generators

ROOT = Path(__file__).resolve().parents[1]
SETS = ("ucf101", "taichi", "sky", "ffs", "imagenet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("pipelines"))


def settings(folder: Path, output: Path, **changes) -> SampleConfig:
    defaults = {"steps": 4, "seed": 3, "guidance_scale": 2.0, "format": ["npz"]}
    return SampleConfig(model=str(folder), output=str(output), **{**defaults, **changes})


def samples(config: SampleConfig) -> np.ndarray:
    generate(config)
    return np.load(Path(config.output) / "samples.npz")["arr_0"]


# ---------------------------------------------------------------------- samples


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_do_not_depend_on_the_batch_size(sampler):
    """As the command draws them: one generator a sample, in batches of 1 and of 4, cache on."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(sampler)
    pipeline.transformer.enable_cache(SkipCacheConfig(interval=2))

    def clips(indices: list[int]) -> np.ndarray:
        labels = [index % 3 for index in indices]
        generators = sample_generators(7, indices)
        return pipeline(labels, 6, 3.0, generators, output_type="np").frames

    together = clips([0, 1, 2, 3])
    alone = np.concatenate([clips([index]) for index in range(4)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[0] - together[3]).max() > 0.1  # the same class, other noise


@pytest.mark.parametrize("kind", ["video", "image", "unconditional"])
def test_files_do_not_depend_on_the_batch_size(kind, folders, tmp_path):
    changes = {"num_samples": 3 if kind == "unconditional" else 1, "cache": "N2"}
    changes |= {"guidance_scale": None} if kind == "unconditional" else {}
    changes |= {"cache_shallow": 1}
    one = samples(settings(folders[kind], tmp_path / "one", batch_size=1, **changes))
    two = samples(settings(folders[kind], tmp_path / "two", batch_size=2, **changes))
    assert one.shape == ((3, 16, 16, 3) if kind == "image" else (3, 4, 16, 16, 3))
    assert np.abs(one.astype(int) - two).max() <= 1  # a value may round to either side


def test_the_seed_decides(folders, tmp_path):
    first, again, other = (
        samples(settings(folders["video"], tmp_path / str(number), seed=seed)) for number, seed in enumerate((3, 3, 4))
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).max() > 20


def test_noise_of_a_sample_is_fixed_by_seed_and_index():
    starts = [torch.randn(1, generator=g).item() for g in sample_generators(0, [0, 1, 5])]
    assert starts == [torch.randn(1, generator=sample_generators(0, [i])[0]).item() for i in (0, 1, 5)]
    seeds = {g.initial_seed() for seed in range(3) for g in sample_generators(seed, range(2000))}
    assert len(seeds) == 6000


def test_cache_and_guidance_reach_the_pipeline(folders, tmp_path):
    """Off, N=1 and N=3 with the same seed: N=1 changes nothing, N=3 and another guidance do."""
    folder = folders["video"]
    off = samples(settings(folder, tmp_path / "off"))
    np.testing.assert_array_equal(samples(settings(folder, tmp_path / "n1", cache="N1-900-50")), off)
    report = generate(settings(folder, tmp_path / "n3", steps=12, cache="N3-900-50"))
    # t = 999, 908 (start window), 817, 726 (counter 3), ..., 454 (6), ..., 182 (9), 91, 0.
    assert (report.full, report.reused) == (5, 7)
    assert "5 full + 7 reused steps" in report.summary() and "cache=N3-900-50" in report.summary()
    other = samples(settings(folder, tmp_path / "g", guidance_scale=6.0))
    assert np.abs(other.astype(int) - off).max() > 5


# ---------------------------------------------------------------------- files


def test_every_format_holds_the_same_clips(folders, tmp_path):
    config = settings(
        folders["video"],
        tmp_path,
        classes=["two", "0"],
        num_samples=2,
        format=["npz", "frames", "mp4", "gif", "png"],
    )
    report = generate(config)
    clips = np.load(tmp_path / "samples.npz")["arr_0"]
    names = ["00000_two", "00001_two", "00002_zero", "00003_zero"]
    for clip, name in zip(clips, names, strict=True):
        frames = [np.asarray(Image.open(file)) for file in sorted((tmp_path / name).iterdir())]
        np.testing.assert_array_equal(np.stack(frames), clip)
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        # Random weights make coloured noise, the worst case of 4:2:0, which keeps each pixel's brightness.
        light = (0.299, 0.587, 0.114)
        assert np.abs(shown @ light - clip @ light).mean() < 6
        with Image.open(tmp_path / f"{name}.gif") as gif:
            assert gif.size == (16, 16)
    assert set(report.files) == {path.name for path in tmp_path.iterdir()} - {"settings.yaml"}
    assert {"grid.mp4", "grid.gif", "grid.png"} <= set(report.files)
    assert report.summary().startswith(f"4 clips in {tmp_path.resolve()}: ")


def test_settings_are_saved_and_reproduce_the_run(folders, tmp_path):
    first = samples(settings(folders["video"], tmp_path, cache="N2"))
    again = load_config(SampleConfig, tmp_path / "settings.yaml", [f"output={tmp_path / 'again'}"])
    np.testing.assert_array_equal(samples(again), first)


def test_pictures_come_as_png_each_and_in_a_grid(folders, tmp_path):
    report = generate(settings(folders["image"], tmp_path, format=["npz", "png"]))
    pictures = np.load(tmp_path / "samples.npz")["arr_0"]
    for picture, name in zip(pictures, NAMES, strict=True):
        (file,) = tmp_path.glob(f"*_{name}.png")
        np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)
    assert "grid.png" in report.files and report.summary().startswith("3 pictures in ")


def test_default_formats(folders, tmp_path):
    files = generate(settings(folders["video"], tmp_path / "v", format=[])).files
    assert sorted(files) == ["00000_zero.mp4", "00001_one.mp4", "00002_two.mp4", "grid.mp4"]
    files = generate(settings(folders["image"], tmp_path / "i", format=[], classes=["1"])).files
    assert files == ("00000_one.png",)


def test_a_preset_with_a_checkpoint_equals_the_saved_pipeline(folders, tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    config = dict(pipeline.transformer.config)
    sizes = {key: config[key] for key in ("hidden_size", "depth", "num_heads", "patch_size", "skip")}
    monkeypatch.setitem(PRESETS, "Latte-T/2-skip", (type(pipeline.transformer), sizes))
    torch.save({"ema": pipeline.transformer.state_dict()}, tmp_path / "weights.pt")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    found = samples(
        settings(
            "Latte-T/2-skip",
            tmp_path / "preset",
            checkpoint=str(tmp_path / "weights.pt"),
            vae=str(folders["video"] / "vae"),
            num_classes=3,
            class_names=str(tmp_path / "names.txt"),
            image_size=16,
            num_frames=4,
            classes=["two"],
        )
    )
    np.testing.assert_array_equal(found, samples(settings(folders["video"], tmp_path / "s", classes=["2"])))


def test_other_sizes_than_the_pipelines_own(folders, tmp_path):
    clips = samples(settings(folders["video"], tmp_path / "wide", image_size=24, num_frames=6, classes=["1"]))
    assert clips.shape == (1, 6, 24, 24, 3)
    with pytest.raises(UserError, match="image_size=18 must be a multiple of 4 pixels"):
        generate(settings(folders["video"], tmp_path / "odd", image_size=18))
    with pytest.raises(UserError, match="num_frames=6: this model makes pictures"):
        generate(settings(folders["image"], tmp_path / "picture", num_frames=6))


def test_another_sampler_keeps_what_the_model_was_trained_for(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_scheduler("ddim", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline.save_pretrained(tmp_path / "v")
    source = find_model(settings(tmp_path / "v", tmp_path / "out"))
    scheduler = source.load(torch.device("cpu"), sampler="unipc").scheduler
    assert type(scheduler).__name__ == "UniPCMultistepScheduler"
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    pipeline = tiny_pipeline()
    torch.nn.init.constant_(pipeline.transformer.final_layer.linear.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="not finite numbers: lower guidance_scale"):
        generate(settings(tmp_path / "broken", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_half_precision_stays_close(folders, tmp_path):
    full = samples(settings(folders["video"], tmp_path / "full"))
    half = samples(settings(folders["video"], tmp_path / "half", dtype="bf16"))
    assert 0 < np.abs(half.astype(int) - full).mean() < 8


# ---------------------------------------------------------------------- mistakes


def mistake(config: SampleConfig) -> str:
    with pytest.raises(UserError) as caught:
        generate(config)
    assert not Path(config.output).exists(), "work was begun"
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("video", {"classes": ["tow"]}, "No class 'tow': did you mean 'two'?"),
        ("video", {"classes": ["3"]}, "No class '3': this model has classes 0 to 2."),
        ("video", {"classes": ["-1"]}, "No class '-1': this model has classes 0 to 2."),
        ("video", {"classes": []}, "classes=[] asks for nothing"),
        ("unconditional", {"classes": ["1"], "guidance_scale": 1.0}, "this model is unconditional"),
        ("unconditional", {"guidance_scale": 2.0}, "guidance_scale=2: this model is unconditional"),
        ("video", {"cache": "2-900-50"}, "cache=2-900-50: "),
        ("video", {"cache": "N2-50-900"}, "cache=N2-50-900: "),
        ("video", {"cache": "N2", "cache_shallow": 2}, "shallow=2 is out of range"),
        ("vanilla", {"cache": "N2"}, "Skip-Cache needs long skips"),
        ("video", {"sampler": "ddmi"}, "No sampler 'ddmi'"),
        ("video", {"dtype": "fp8"}, "No dtype 'fp8'"),
        ("video", {"dtype": "fp16", "device": "cpu"}, "dtype=fp16 is many times slower"),
        ("video", {"device": "gpu"}, "No device 'gpu'"),
        ("video", {"device": "cpu:7"}, "No device 'cpu:7'"),
        ("video", {"device": "cuda:"}, "No device 'cuda:'"),
        ("video", {"guidance_channels": 5}, "the latents have 4 channels"),
        ("image", {"format": ["mp4"]}, "format=mp4 is for clips"),
        ("video", {"vae": "elsewhere"}, "vae is for presets"),
    ],
)
def test_mistakes_are_told_before_any_work(kind, changes, said, folders, tmp_path):
    assert said in mistake(settings(folders[kind], tmp_path / "none", **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0 must be 1 or more."),
        ({"steps": 1001}, "steps=1001 must be 1000 or less"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more."),
        ({"fps": 0.0}, "fps=0 must be above 0"),
        ({"format": ["avi"]}, "No format 'avi': choose from mp4, gif, png, frames, npz, shards."),
        ({"format": ["pgn"]}, "No format 'pgn': did you mean 'png'?"),
        ({"model": ""}, "pass --config configs/digits/sample.yaml or model="),
    ],
)
def test_values_out_of_range(changes, said):
    with pytest.raises(ValueError) as caught:
        SampleConfig(**{"model": "x", **changes})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "Late-XL/2"}, "it is neither a folder nor a preset"),
        ({"model": "Latte-XL/2-skp"}, "did you mean 'Latte-XL/2-skip'?"),
        ({"model": "Latte-XL/2-skip"}, "pass checkpoint=<path> as well"),
        (
            {"model": "Latte-XL/2-skip", "checkpoint": "no.pt", "vae": "x"},
            "no.pt and x are not there: pass checkpoint=<path> and vae=<path>",
        ),
    ],
)
def test_models_that_are_not_there(changes, said, tmp_path):
    assert said in mistake(SampleConfig(**changes, output=str(tmp_path / "none")))


def test_damaged_pipeline_folders(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in mistake(settings(tmp_path / "empty", tmp_path / "none"))
    shutil.copytree(folders["video"], tmp_path / "cut")
    weights = tmp_path / "cut/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as a pipeline"):
        generate(settings(tmp_path / "cut", tmp_path / "out"))
    for name in ("transformer/config.json", "model_index.json"):
        (tmp_path / "cut" / name).write_text("[]")
        assert f"{name} cannot be read (it holds a list" in mistake(settings(tmp_path / "cut", tmp_path / "none"))


def test_absent_cuda_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda:1 is not available: there is no CUDA device"):
        choose_device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")


def test_command_prints_where_and_what_it_cost(folders, tmp_path, capsys):
    words = [f"model={folders['video']}", "steps=2", f"output={tmp_path}", "classes=[one, 0]", "cache=off"]
    assert main(["sample", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"2 clips in {tmp_path.resolve()}: grid.mp4")
    assert "s per clip; 2 full steps each (cache=off)" in out


# ---------------------------------------------------------------------- classes and published settings


def test_resolve_classes():
    assert resolve_classes(["all"], NAMES, 3) == [0, 1, 2]
    assert resolve_classes(["TWO", "0", "one"], NAMES, 3) == [2, 0, 1]
    assert resolve_classes(["207"], (), 1000) == [207]
    assert resolve_classes(["1"], ["1", "0"], 2) == [0]  # a name goes before an index
    assert resolve_classes(["all"], (), None) is None


def test_ucf101_names_are_the_official_index(shared_dir):
    names = read_class_names(ROOT / "configs/ucf101/classes.txt")
    lines = (shared_dir / "data/ucfTrainTestlist/classInd.txt").read_text().split("\n")
    assert list(names) == [line.split()[1] for line in lines if line.strip()]


@pytest.mark.parametrize("name", SETS)
def test_configs_hold_the_published_settings(name):
    config = load_config(SampleConfig, ROOT / f"configs/{name}/sample.yaml")
    video = ("Latte-XL/2-skip", "N2-900-50", 1, 256, 16, None)
    sampler = {"ucf101": ("ddim", 50, 7.0, 101), "imagenet": ("ddpm", 250, 4.0, 1000)}
    expected = ("DiT-XL/2-skip", "N2-1000-21", 4, 256, None, 3) if name == "imagenet" else video
    found = (config.model, config.cache, config.cache_shallow, config.image_size, config.num_frames)
    assert (*found, config.guidance_channels) == expected
    found = (config.sampler, config.steps, config.guidance_scale, config.num_classes)
    assert found == sampler.get(name, ("ddpm", 250, 1.0, None))
    assert config.vae == "pretrained/Latte/vae"


def test_cache_words(folders):
    video, image = (find_model(SampleConfig(model=str(folders[kind]))) for kind in ("video", "image"))

    def parse(source, **changes):
        return parse_cache(SampleConfig(model="x", **changes), source)

    assert parse(video, cache="off") is None
    assert parse(video, cache="N3-700-51") == SkipCacheConfig(3, 1, 700, 51)
    assert parse(video, cache="N4") == SkipCacheConfig(4, 1, 900, 50)
    assert parse(image, cache="N4") == SkipCacheConfig(4, 4, 1000, 21)
    assert parse(image, cache="N2-1000-21", cache_shallow=3) == SkipCacheConfig(2, 3, 1000, 21)
