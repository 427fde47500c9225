"""The demo, end to end, on a pipeline of the real class with random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline

from skipdit import SkipCacheConfig
from skipdit.cli import main
from skipdit.evaluation.comparison import compare_caches, to_markdown

RUNS = ["no-cache", "n2", "n3", "n3-forecast", "n5"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_demo_writes_everything_it_promises(pipeline_folder, tmp_path, capsys):
    words = ["--model", str(pipeline_folder), "--output", str(tmp_path), "--steps", "20", "--repeats", "1"]
    assert main(["demo", *words]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "comparison.png",
        "results.md",
        "results.json",
        *(f"{run}.{suffix}" for run in RUNS for suffix in ("mp4", "gif")),
    }
    with Image.open(tmp_path / "comparison.png") as picture:
        # Three classes: words around five rows of 16-pixel frames enlarged by 5.
        assert picture.height == 3 * (64 + 5 * 82)
    with Image.open(tmp_path / "n3.gif") as gif:
        assert gif.n_frames == 4

    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["cache"] for row in rows] == ["off", "N2-900-50", "N3-900-50", "N3-900-50-F2", "N5-900-50"]
    schedule = torch.linspace(999, 0, 20).round().tolist()  # both ends included, as the samplers space them
    for row, interval in zip(rows[1:], (2, 3, 3, 5), strict=True):
        full = SkipCacheConfig(interval).schedule(schedule)
        assert row["full_share"] == pytest.approx(sum(full) / 20)
        assert row["psnr"] is None or row["psnr"] > 0
        assert 0 < row["ssim"] <= 1 and row["speedup"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    assert (rows[0]["psnr"], rows[0]["ssim"], rows[0]["full_share"]) == (None, None, 1)

    table = (tmp_path / "results.md").read_text()
    assert "| no cache | off |" in table and "3 clips at once, 20 steps" in table
    out = capsys.readouterr().out
    assert table in out and str(tmp_path.resolve()) in out


def test_demo_without_its_pipeline_says_what_to_do(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path), "--output", str(tmp_path / "none")]) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", [{"kind": "image"}, {"skip": None}, {"num_classes": None}])
def test_demo_refuses_other_pipelines(kind, tmp_path, capsys):
    tiny_pipeline(**kind).save_pretrained(tmp_path / "other")
    assert main(["demo", "--model", str(tmp_path / "other"), "--output", str(tmp_path / "none")]) == 2
    assert "not a class-to-video pipeline with long skips" in capsys.readouterr().err


def test_compare_caches_measures_against_the_first():
    """A `sample` whose result is known: an error of 0.1 with the cache on, so 20 dB."""
    transformer = tiny_pipeline().transformer
    calls = []

    def sample() -> torch.Tensor:
        calls.append(transformer.is_cache_enabled)
        return torch.full((2, 3, 3, 16, 16), 0.5 + 0.1 * transformer.is_cache_enabled)

    first, cached = compare_caches(transformer, {"a": None, "b": SkipCacheConfig()}, sample, repeats=3)
    assert calls == [False, True] * 3 and not transformer.is_cache_enabled
    assert (first.psnr, first.ssim, first.speedup, first.repeats) == (None, None, 1, 3)
    assert cached.psnr == pytest.approx(20, abs=1e-4)
    assert np.isclose(cached.speedup, first.seconds / cached.seconds)
    assert to_markdown([first, cached]).count("\n") == 4


def test_compare_caches_keeps_to_its_budget_and_switches_the_cache_off_on_errors():
    transformer = tiny_pipeline().transformer
    runs = compare_caches(transformer, {"a": None}, lambda: torch.zeros(1, 1, 3, 16, 16), 50, budget=0)
    assert runs[0].repeats == 1

    def fail() -> torch.Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        compare_caches(transformer, {"a": SkipCacheConfig()}, fail)
    assert not transformer.is_cache_enabled
