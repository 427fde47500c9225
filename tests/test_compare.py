"""`skipdit compare`: what must agree whatever the machine, and what is refused."""

import csv
import json
import sys

import pytest
import torch
from scripted_detector import write_detector
from tiny_pipelines import tiny_pipeline

from skipdit.cache import SkipCacheConfig
from skipdit.cli import main
from skipdit.config import load_config
from skipdit.errors import UserError
from skipdit.evaluation.compare import CompareConfig, compare
from skipdit.evaluation.compare.command import _fewer_steps
from skipdit.evaluation.compare.measure import Contender, count_flops
from skipdit.evaluation.compare.peers import magnitude_ratios, parse_peer
from skipdit.evaluation.compare.report import to_markdown
from skipdit.operations import count_operations
from skipdit.pipelines import SkipLattePipeline

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with skips and a vanilla twin."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, skip in (("skip", "linear"), ("vanilla", None)):
        tiny_pipeline(skip=skip).save_pretrained(root / name)
    return root


def settings(folders, tmp_path, *words) -> CompareConfig:
    common = [f"model={folders}/skip", "clips=3", "batch_size=2", "steps=8", "guidance_scale=2"]
    return load_config(CompareConfig, None, [*common, f"cache_dir={tmp_path}/cache", *words])


def by_name(report) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"]}


def test_a_cache_that_never_reuses_is_no_cache(folders, tmp_path):
    report = compare(settings(folders, tmp_path, "caches=[N1-1000-0, N4-1000-0]", "equal_time=false"))
    rows = by_name(report)
    plain, same, cached = rows["no cache"], rows["Skip-Cache N1-1000-0"], rows["Skip-Cache N4-1000-0"]
    assert torch.equal(plain["shown"], same["shown"]) and same["psnr"] == float("inf") and same["ssim"] == 1
    assert same["teraflops"] == plain["teraflops"] > cached["teraflops"]
    assert 0 < cached["psnr"] < 100 and plain["psnr"] is None and plain["speedup"] == 1
    assert all(row["clips"] == 3 for row in rows.values())


def test_fewer_steps_of_equal_operations_stand_beside_a_cache(folders, tmp_path):
    """8 steps, of which the cache runs 2 in full: whatever the clock says."""
    report = compare(settings(folders, tmp_path, "caches=[N4-1000-0]", "equal_operations=true"))
    rows = by_name(report)
    cached, plain = rows["Skip-Cache N4-1000-0"], rows["no cache"]
    steps = round(plain["steps"] * cached["teraflops"] / plain["teraflops"])
    rival = rows[f"{steps} steps"]
    assert 1 < steps < plain["steps"] and rival["teraflops"] == pytest.approx(
        plain["teraflops"] * steps / plain["steps"]
    )
    assert cached["rival"] == f"{steps} steps, {rival['teraflops']:.4f} TFLOP" and cached["rival_psnr"] == rival["psnr"]
    assert "| no cache, same operations |" in to_markdown(report)


def test_operations_are_those_that_ran(folders):
    """Against the count from the sizes: 8 full steps, or 2 full and 6 reused ones, of a guided batch of one clip."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def sample(pipeline, steps, indices):
        return pipeline([0], steps, 2.0, torch.manual_seed(0), output_type="latent").frames

    shape = (2, 4, 4, 8, 8)
    full = count_operations(pipeline.transformer, shape).total
    reused = count_operations(pipeline.transformer, shape, shallow=1, reused=True).total
    plain = Contender("no cache", "no cache", "skip", pipeline, 8)
    cached = Contender("N4", "Skip-Cache", "skip", pipeline, 8, SkipCacheConfig.parse("N4-1000-0"))
    assert count_flops(plain, sample) == 8 * full
    assert count_flops(cached, sample) == 2 * full + 6 * reused
    assert not pipeline.transformer.is_cache_enabled


def test_rivals_run_on_the_twin_and_are_compared_with_it(folders, tmp_path):
    peers = "[pab:2, taylorseer:3, fbcache:9, magcache:0.5, fastercache:2]"
    report = compare(settings(folders, tmp_path, f"twin={folders}/vanilla", "caches=[N3]", f"peers={peers}"))
    rows = by_name(report)
    plain = rows["vanilla, no cache"]
    for name in ("pab:2", "taylorseer:3", "fbcache:9", "magcache:0.5"):
        assert rows[name]["network"] == "vanilla" and rows[name]["teraflops"] < plain["teraflops"], name
        assert 0 < rows[name]["psnr"] < 100, name
    assert plain["psnr"] is None and "fastercache:2" not in rows
    assert any(note.startswith("fastercache:2 cannot be attached") for note in report["notes"])


def test_distances_to_real_clips_are_in_the_table(folders, tmp_path):
    real = tmp_path / "real.pt"
    torch.save(torch.randint(0, 255, (4, 10, 16, 16, 3), dtype=torch.uint8), real)
    tiny_pipeline(num_frames=10).save_pretrained(tmp_path / "long")
    detector = write_detector(tmp_path / "detector.pt")
    words = [
        f"model={tmp_path}/long",
        "caches=[N1-1000-0, N3]",
        f"real.path={real}",
        f"i3d={detector}",
        "equal_time=false",
    ]
    report = compare(settings(folders, tmp_path, *words))
    rows = by_name(report)
    assert rows["no cache"]["fvd"] == rows["Skip-Cache N1-1000-0"]["fvd"] > 0
    assert rows["no cache"]["fvd"] != rows["Skip-Cache N3-900-50"]["fvd"]
    assert "| FVD |" in to_markdown(report) and any("perfect generator" in note for note in report["notes"])


def test_real_clips_of_another_interval_are_refused(tmp_path):
    pipeline = tiny_pipeline(num_frames=10)
    pipeline.register_to_config(frame_interval=3)
    pipeline.save_pretrained(tmp_path / "long")
    torch.save(torch.zeros(4, 10, 16, 16, 3, dtype=torch.uint8), tmp_path / "real.pt")
    detector = write_detector(tmp_path / "detector.pt")
    words = [f"model={tmp_path}/long", f"real.path={tmp_path}/real.pt", f"i3d={detector}", f"cache_dir={tmp_path}/c"]
    with pytest.raises(UserError, match=r"frame interval 1 \(real\) and 3 \(generated\)"):
        compare(load_config(CompareConfig, None, words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["real.path=digits", "i3d=nowhere.ckpt"], "No weights at nowhere.ckpt"),
        (["real.path=nowhere", "i3d={detector}"], "nowhere is not there"),
        (["real.path=digits", "i3d={detector}"], "I3D needs clips of at least 9 frames, these have 4"),
        (["lpips=true"], "lpips needs torchvision"),
    ],
)
def test_nothing_is_sampled_before_all_is_seen_to_be_there(folders, tmp_path, monkeypatch, words, says):
    """MagCache is calibrated on clips: that must wait for the real side."""
    detector = write_detector(tmp_path / "detector.pt")
    monkeypatch.setattr(SkipLattePipeline, "__call__", lambda *_, **__: pytest.fail("a clip was sampled"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    words = [f"twin={folders}/vanilla", "peers=[magcache:0.5]", *(word.format(detector=detector) for word in words)]
    with pytest.raises(UserError, match=says):
        compare(settings(folders, tmp_path, *words))


def test_one_real_clip_has_no_distribution(tmp_path):
    tiny_pipeline(num_frames=10).save_pretrained(tmp_path / "long")
    torch.save(torch.zeros(1, 10, 16, 16, 3, dtype=torch.uint8), tmp_path / "real.pt")
    words = [f"model={tmp_path}/long", f"real.path={tmp_path}/real.pt", f"i3d={write_detector(tmp_path / 'd.pt')}"]
    with pytest.raises(UserError, match="holds 1 clip: FVD and KVD need 2 or more"):
        compare(load_config(CompareConfig, None, [*words, f"cache_dir={tmp_path}/c"]))


def test_samples_that_are_not_finite_stop_it(folders, tmp_path):
    pipeline = tiny_pipeline()
    torch.nn.init.constant_(pipeline.transformer.final_layer.linear.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="no cache are not finite"):
        compare(settings(folders, tmp_path, f"model={tmp_path}/broken", "caches=[N2]"))


def test_fewer_steps_take_as_long_as_each_cache():
    pipeline = tiny_pipeline()
    skip = Contender("no cache", "no cache", "skip", pipeline, 50)
    cached = [Contender(f"c{i}", "Skip-Cache", "skip", pipeline, 50, SkipCacheConfig()) for i in range(3)]
    fewer = _fewer_steps([skip, *cached], [10.0, 5.0, 4.8, 12.0])
    assert [(c.steps, c.family, c.cache) for c in fewer] == [(25, "fewer steps", None), (24, "fewer steps", None)]


def test_magnitude_ratios_begin_with_one_and_watch_without_changing(folders):
    pipeline = tiny_pipeline(skip=None)
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        return pipeline([0], 5, 2.0, torch.manual_seed(0), output_type="latent").frames

    before = sample()
    ratios = magnitude_ratios(pipeline, sample)
    assert len(ratios) == 5 and ratios[0] == 1 and all(0 < ratio < 3 for ratio in ratios)
    assert torch.equal(sample(), before)


def test_the_command_writes_all_forms(folders, tmp_path, capsys):
    words = [f"model={folders}/skip", "caches=[N2]", "clips=2", "steps=4", f"output={tmp_path}/out"]
    assert main(["compare", *words]) == 0
    out = tmp_path / "out"
    assert (out / "compare.md").read_text() in capsys.readouterr().out
    rows = list(csv.DictReader((out / "compare.csv").open()))
    figures = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in rows] == [row["name"] for row in figures["rows"]]
    assert {"compare.png", "strip.png", "settings.yaml"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("at", [1, 4, 9])  # calibration of MagCache, pilot, measurement
def test_after_ctrl_c_nothing_is_left_and_the_same_command_completes(folders, tmp_path, monkeypatch, at):
    out, calls, whole = tmp_path / "out", [], SkipLattePipeline.__call__

    def sample(self, *args, **settings):
        calls.append(settings)
        if len(calls) == at:
            raise KeyboardInterrupt
        return whole(self, *args, **settings)

    monkeypatch.setattr(SkipLattePipeline, "__call__", sample)
    words = [f"model={folders}/skip", f"twin={folders}/vanilla", "peers=[magcache:0.5]", "caches=[N2]", "clips=2"]
    words += ["steps=3", "equal_time=false", f"output={out}"]
    assert main(["compare", *words]) == 130
    assert list(out.iterdir()) == []
    assert main(["compare", *words]) == 0
    assert {"compare.md", "compare.csv", "settings.yaml"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["twin={skip}"], "has long skips, which twin= must not have"),
        (["model={vanilla}"], "has no long skips, which model= needs"),
        (["caches=[X3]"], "X3.*not spelled"),
        (["sampler=foo"], "foo"),
        (["guidance_scale=nan"], "guidance_scale=nan must be finite"),
        (["guidance_scale=-1"], "guidance_scale=-1"),
        (["device=cuda:99"], "device=cuda:99 is not available"),
        (["dtype=fp16", "device=cpu"], "dtype=fp16 is many times slower"),
        (["twin={vanilla}", "peers=[fb:0.1]"], "No rival cache 'fb'.*fbcache"),
        (["twin={vanilla}", "peers=[pab]"], "not spelled <name>:<number>"),
        (["twin={vanilla}", "peers=[pab:1.5]"], "whole number from 2"),
    ],
)
def test_mistakes_get_a_sentence(folders, tmp_path, words, says):
    words = [word.format(skip=folders / "skip", vanilla=folders / "vanilla") for word in words]
    with pytest.raises(UserError, match=says):
        compare(settings(folders, tmp_path, *words))


def test_peers_are_read():
    assert parse_peer("fbcache:0.08") == ("fbcache", 0.08)
