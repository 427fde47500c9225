"""Operations against PyTorch's own counter, the published bounds, and the command from end to end."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipdit import (
    SkipCacheConfig,
    SkipDiTTransformer2DModel,
    SkipLatteTransformer3DModel,
    create_model,
    make_scheduler,
)
from skipdit.acceleration.modulation import HeldModulation
from skipdit.cli import main
from skipdit.evaluation.bench import add_arguments, measure
from skipdit.evaluation.bench.breakdown import make_parts
from skipdit.evaluation.bench.measure import Timing, plain_pipeline, time_in_turns
from skipdit.evaluation.bench.plan import make_plan
from skipdit.evaluation.bench.report import to_markdown
from skipdit.operations import count_operations, speedup_bound

SIZES = {"hidden_size": 48, "num_heads": 3, "sample_size": (8, 12), "num_classes": 3, "mlp_ratio": 2.5}
LATTE, DIT = (2, 4, 5, 8, 12), (3, 4, 8, 12)
# Of class-to-video XL by blocks: as published, which is the limit of many steps, and with 50 steps of DDIM.
BOUNDS = {2: (1.57, 1.606), 3: (1.94, 1.989), 4: (2.20, 2.303), 5: (2.40, 2.397), 6: (2.55, 2.612)}


def latte(**settings):
    return SkipLatteTransformer3DModel(**{**SIZES, "depth": 12, "num_frames": 5, **settings}).eval()


def dit(**settings):
    return SkipDiTTransformer2DModel(**{**SIZES, "depth": 12, **settings}).eval()


@torch.no_grad()
def counted_by_torch(model, shape, **path) -> int:
    labels = None if model.null_class is None else torch.zeros(shape[0], dtype=torch.long)
    inputs = torch.randn(shape), torch.full((shape[0],), 500), labels
    # The fused attention of a CPU is not in the counter's table; the plain one is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs, **path)
    return counter.get_total_flops()


CASES = {
    "latte": (latte(), LATTE),
    "latte-vanilla": (latte(skip=None), LATTE),
    "latte-residual": (latte(skip="residual"), LATTE),
    "latte-unconditional": (latte(num_classes=None, learn_sigma=False), LATTE),
    "latte-other-size": (latte(), (1, 4, 3, 4, 16)),
    "latte-patch-4": (latte(patch_size=4, in_channels=8), (1, 8, 5, 8, 12)),
    "dit": (dit(), DIT),
    "dit-vanilla": (dit(skip=None), DIT),
    "dit-patch-4": (dit(patch_size=4), DIT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_full_step_counts_as_torch_counts(name):
    model, shape = CASES[name]
    assert count_operations(model, shape).total == counted_by_torch(model, shape)


@pytest.mark.parametrize("name", [name for name in CASES if "vanilla" not in name])
@pytest.mark.parametrize("shallow", [1, 2])
def test_a_reused_step_counts_as_torch_counts(name, shallow):
    model, shape = CASES[name]
    with torch.no_grad():
        labels = None if model.null_class is None else torch.zeros(shape[0], dtype=torch.long)
        features = model(torch.randn(shape), torch.zeros(shape[0]), labels, shallow=shallow).deep_features
    by_torch = counted_by_torch(model, shape, shallow=shallow, deep_features=features)
    assert count_operations(model, shape, shallow, reused=True).total == by_torch


def test_no_count_of_a_reused_step_that_cannot_be():
    with pytest.raises(ValueError, match="vanilla"):
        count_operations(latte(skip=None), LATTE, 1, reused=True)
    with pytest.raises(ValueError, match="out of range"):
        count_operations(latte(), LATTE, 3, reused=True)


def video_schedule(interval: int, steps: int) -> list[bool]:
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(steps)
    return SkipCacheConfig.preset("class-to-video", interval).schedule(scheduler.timesteps.tolist())


@pytest.mark.parametrize("interval", BOUNDS)
def test_published_bounds(interval):
    """4 of 28 blocks on a reused step; 15% of the timesteps lie outside the window and are full."""
    published, with_50_steps = BOUNDS[interval]
    full = 0.15 + 0.85 / interval
    limit = 1 / (full + (1 - full) * 4 / 28)
    assert limit == pytest.approx(published, abs=0.0051)
    assert speedup_bound(video_schedule(interval, 1000), 4 / 28) == pytest.approx(limit, rel=0.003)
    assert speedup_bound(video_schedule(interval, 50), 4 / 28) == pytest.approx(with_50_steps, abs=0.0005)


def test_published_bound_of_any_interval():
    assert speedup_bound(video_schedule(10**6, 1000), 4 / 28) == pytest.approx(3.7, abs=0.05)


def test_bound_without_reuse_and_without_cost():
    assert speedup_bound([True] * 7, 0.1) == 1
    assert speedup_bound([True, False, False, False], 0) == 4
    assert speedup_bound([True, False], 1) == 1


def test_counts_in_the_documents(root):
    """The table of counted operations in docs/benchmarks.md is what the code counts."""
    page = (root / "docs/benchmarks.md").read_text()
    rows = re.findall(r"^\| (\S+-skip) \| (\d+x)?256x256 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) >= 2
    for name, frames, full, reused, share in rows:
        with torch.device("meta"):
            model = create_model(name, num_classes=10)
        shape = (2, 4, int(frames[:-1]), 32, 32) if frames else (2, 4, 32, 32)
        shallow = SkipCacheConfig.preset("class-to-video" if frames else "class-to-image").shallow
        counts = (
            count_operations(model, shape).total,
            count_operations(model, shape, shallow, reused=True).total,
        )
        shown = f"{counts[0] / 1e12:.3f}", f"{counts[1] / 1e12:.3f}", f"{counts[1] / counts[0]:.3f}"
        assert (full, reused, share) == shown


def test_turns_go_forth_and_back():
    order = []
    seconds = iter(range(1, 10))

    def stopwatch(name):
        def run() -> float:
            order.append(name)
            return float(next(seconds))

        return run

    took = time_in_turns({name: stopwatch(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abccbaabc"
    assert took["a"] == Timing(median=6.0, least=1.0, most=7.0, repeats=3)
    assert took["b"] == Timing(median=5.0, least=2.0, most=8.0, repeats=3)


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders with nothing but a config: the weights do not matter for speed."""
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "num_heads": 2, "sample_size": 8}
    made = {"latte": latte(**small, num_frames=4), "dit": dit(**small), "vanilla": latte(**small, skip=None)}
    made["free"] = latte(**{**small, "num_classes": None})
    for name, model in made.items():
        model.save_config(folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return {path.name: path for path in folder.iterdir()}


FAST = ["--steps", "10", "--intervals", "2", "3", "--repeats", "2", "--rounds", "1", "--device", "cpu"]


def bench(model: Path, output: Path, *words: str) -> dict:
    assert main(["bench", "--model", str(model), "--output", str(output), *FAST, *words]) == 0
    return json.loads((output / "bench.json").read_text())


def cells(table: str, name: str) -> list[str]:
    """Cells of the first row that begins with this name."""
    row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_bench_end_to_end(models, tmp_path, capsys):
    report = bench(models["latte"], tmp_path)
    printed = capsys.readouterr().out
    table = (tmp_path / "bench.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"bench.md", "bench.json", "bench.png"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert table in printed and str(tmp_path) in printed

    assert report["setting"]["input_shape"] == [2, 4, 4, 8, 8]  # guidance: both branches as one batch
    full, reused = report["operations"]["full"], report["operations"]["reused"]
    assert full == count_operations(latte(hidden_size=16, num_heads=2), (2, 4, 4, 8, 8)).total
    eager = report["modes"]["eager"]
    share = eager["reused"]["median"] / eager["full"]["median"]
    assert eager["time_share"] == pytest.approx(share)
    assert eager["cost_per_operation"] == pytest.approx(share / (reused / full))
    for row, measured in zip(report["sampling"], eager["sampling"], strict=True):
        seconds = eager["sampling"][0]["seconds"]["median"] / measured["seconds"]["median"]
        assert measured["interval"] == row["interval"] and measured["speedup"] == pytest.approx(seconds)
        assert row["operations"] == row["full_steps"] * full + row["reused_steps"] * reused
        assert row["bound"] == pytest.approx(10 * full / row["operations"])
        assert row["full_steps"] + row["reused_steps"] == 10
        assert measured["seconds"]["least"] <= measured["seconds"]["median"] <= measured["seconds"]["most"]


def test_the_tables_say_what_the_json_says(models, tmp_path):
    report = bench(models["latte"], tmp_path)
    table = (tmp_path / "bench.md").read_text()
    eager = report["modes"]["eager"]
    milliseconds = [f"{eager[kind]['median'] * 1e3:.3g} ms" for kind in ("full", "reused")]
    shown = cells(table, "eager")
    assert [cell.split(" (")[0] for cell in shown[1:3]] == milliseconds
    assert shown[3] == f"{eager['time_share']:.3f}"
    assert cells(table, "operations")[3] == f"{report['operations']['share']:.3f}"
    for row, measured in zip(report["sampling"], eager["sampling"], strict=True):
        shown = cells(table, "no cache" if row["cache"] == "off" else row["cache"])
        assert shown[1] == f"{row['full_steps']} + {row['reused_steps']}"
        assert shown[3] == f"{row['bound']:.2f}x" and shown[5] == f"{measured['speedup']:.2f}x"
    cost = eager["cost_per_operation"]
    judgement = "within" if cost <= 1.3 else "above"
    assert f"takes {cost:.2f} times its share of the operations: {judgement} the aim of 1.3." in table
    assert "`skipdit bench --model" in table and "--rounds 1" in table and "--output" not in table


def test_the_verdict_is_honest(models, tmp_path):
    """Above the aim, or on a busy machine, the table says so."""
    report = bench(models["latte"], tmp_path)
    hardware, eager = report["hardware"], report["modes"]["eager"]
    hardware["load"], eager["cost_per_operation"] = hardware["cores"] + 3.0, 1.31
    table = to_markdown(report)
    assert "takes 1.31 times its share of the operations: above the aim of 1.3." in table
    assert f"The machine was busy (load {hardware['load']:.1f} on {hardware['cores']} cores)" in table
    hardware["load"], eager["cost_per_operation"] = 0.5, 1.3
    table = to_markdown(report)
    assert "takes 1.30 times its share of the operations: within the aim of 1.3." in table
    assert "busy" not in table


def test_bench_of_an_image_model(models, tmp_path):
    report = bench(models["dit"], tmp_path, "--batch-size", "2", "--size", "96", "--dtype", "bf16")
    assert report["setting"]["input_shape"] == [4, 4, 12, 12]
    assert report["setting"]["shallow"] == 4
    assert [row["cache"] for row in report["sampling"]] == ["off", "N2-1000-21", "N3-1000-21"]


def test_bench_without_guidance(models, tmp_path):
    assert bench(models["free"], tmp_path)["setting"]["input_shape"] == [1, 4, 5, 8, 8]
    report = bench(models["latte"], tmp_path, "--no-guidance", "--num-frames", "3", "--sampler", "dpm++")
    assert report["setting"]["input_shape"] == [1, 4, 3, 8, 8]


MISTAKES = {
    "--model Latte-XL/3-skip": "No preset 'Latte-XL/3-skip'",
    "--model nowhere": "neither a preset such as Latte-XL/2-skip nor a folder",
    "--model {broken}": "cannot be read",
    "--model {foreign}": "is of a UNet2DModel",
    "--model {vanilla}": "has no long skips",
    "--model Latte-S/2": "use Latte-S/2-skip",
    "--model {latte} --num-frames 0": "--num-frames 0 must be 1 or more",
    "--model {latte} --size 20": "must be a multiple of 16 pixels",
    "--model {latte} --shallow 3": "out of range",
    "--model {dit} --num-frames 4": "makes pictures",
    "--model {latte} --intervals 1 2": "an interval is 2 or more",
    "--model {latte} --steps 1001": "take at most as many",
    "--model {latte} --sampler euler": "No sampler 'euler'",
    "--model {latte} --dtype fp8": "choose from fp32",
    "--model {latte} --device cpu --dtype fp16": "fp32 or bf16",
    "--model {latte} --device tpu": "choose auto, cpu, cuda",
    "--model {latte} --device cpu:": "choose auto, cpu, cuda",
    "--model {latte} --device cuda:99": "CUDA device",
    "--model {latte} --output {broken}/config.json": "Cannot write to",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_sentence(words, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words.format(**models).split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert MISTAKES[words] in captured.err
    assert captured.err.startswith("skipdit: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


# ---------------------------------------------------------------------- where time goes, and against the plain path


def planned(model: Path, output: Path, *words: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return make_plan(parser.parse_args(["--model", str(model), "--output", str(output), *FAST, *words]))


def test_the_carried_pipeline_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert planned(Path("pretrained/digits"), tmp_path / "out").settings["depth"] == 16


@pytest.mark.parametrize(("name", "words"), [("latte", []), ("dit", []), ("free", []), ("dit", ["--no-guidance"])])
def test_the_parts_make_up_a_step(name, words, models, tmp_path):
    """Their operations, times how often a step does them, are those of the step."""
    plan = planned(models[name], tmp_path, *words)
    parts = make_parts(plan, plain_pipeline(plan))
    assert sum(part.full * part.operations for part in parts) == plan.full.total
    assert sum(part.reused * part.operations for part in parts) == plan.reused.total
    attention = {part.name: part.full for part in parts if "attention" in part.name}
    assert attention == ({"spatial attention": 12} if name == "dit" else dict.fromkeys(attention, 6))
    assert all(part.moved > 0 for part in parts)


def test_bytes_of_a_part(models, tmp_path):
    """Float32: x read, normed written, read by fc1, hidden written and read, output written, gate reads two, writes."""
    plan = planned(models["latte"], tmp_path)
    parts = {part.name: part for part in make_parts(plan, plain_pipeline(plan))}
    tokens, dim, hidden = 2 * 4 * 16, 16, 40
    weights = 2 * dim * hidden + dim + hidden
    assert parts["MLP"].moved == 4 * (tokens * (2 * dim + dim + 2 * hidden + dim + 3 * dim) + weights)
    plan = planned(models["latte"], tmp_path, "--dtype", "bf16")
    parts_of_half = {part.name: part for part in make_parts(plan, plain_pipeline(plan))}
    for name in ("MLP", "skip fusion", "temporal attention", "final layer"):
        assert parts_of_half[name].moved * 2 == parts[name].moved


def test_a_breakdown_end_to_end(models, tmp_path, root):
    folder = tmp_path / "pipeline"
    (folder / "vae").mkdir(parents=True)
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text((models["latte"] / "config.json").read_text())
    vae = json.loads((root / "pretrained/digits/vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(vae))
    report = bench(folder, tmp_path / "out", "--breakdown")
    figures = report["breakdown"]
    assert figures["matrix_rate"] > 0 and figures["memory_rate"] > 0
    names = [part["name"] for part in figures["parts"]]
    assert names == [
        *("embedding", "modulation (adaLN)", "spatial attention", "temporal attention", "MLP"),
        *("skip fusion", "final layer", "sampler", "VAE, all frames"),
    ]
    table = (tmp_path / "out/bench.md").read_text()
    total = 0.0
    for part in figures["parts"]:
        by_rates = part["operations"] / figures["matrix_rate"], part["bytes"] / figures["memory_rate"]
        assert part["limit"] == pytest.approx(max(by_rates))
        shown = cells(table, part["name"])
        assert shown[3] == f"{part['seconds']['median'] * 1e3:.3g} ms"
        assert shown[6] == f"{part['limit'] / part['seconds']['median']:.0%}"
        total += part["full"] * part["seconds"]["median"] * (part["name"] != "sampler")
    assert cells(table, "forward, sum of parts")[7] == f"{total * 1e3:.3g} ms"
    assert cells(table, "forward, measured whole")[7] == f"{report['modes']['eager']['full']['median'] * 1e3:.3g} ms"
    assert names[-1] not in [
        part["name"] for part in bench(models["latte"], tmp_path, "--breakdown")["breakdown"]["parts"]
    ]


@torch.no_grad()
def test_operations_of_the_autoencoder(models, tmp_path, root):
    """Four frames of 8x8 latents by PyTorch's own counter on a real one; bytes grow with the frames, weights do not."""
    config = json.loads((root / "pretrained/digits/vae/config.json").read_text())
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    plan = dataclasses.replace(planned(models["latte"], tmp_path), vae=settings)
    part = make_parts(plan, plain_pipeline(plan))[-1]
    vae = AutoencoderKL(**settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.decode(torch.randn(4, 4, 8, 8))
    assert part.operations == counter.get_total_flops()
    assert part.moved > 4 * sum(p.numel() for p in vae.decoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["latte", "free"])
def test_fast_steps_run_as_in_the_pipeline_s_loop(name, models, tmp_path, monkeypatch):
    """With adaLN's vectors of their step, which the loop computes ahead."""
    monkeypatch.setattr("skipdit.acceleration.choice.compiler_for", lambda device: ("", "it takes seconds"))
    held, run = [], HeldModulation.forward
    monkeypatch.setattr(HeldModulation, "forward", lambda self, c: held.append(self.vectors) or run(self, c))
    plan = planned(models[name], tmp_path)
    pipeline = plain_pipeline(plan)
    pipeline.compile()
    steps = measure._step_stopwatches(pipeline, plan)
    assert steps["full"]() > 0 and steps["reused"]() > 0
    blocks = len(pipeline.transformer.blocks)
    assert len(held) == 2 * (blocks + 1) + 4 * plan.shallow + 1 and all(vectors is not None for vectors in held)


def test_against_the_plain_path(models, tmp_path, monkeypatch):
    monkeypatch.setattr("skipdit.acceleration.choice.compiler_for", lambda device: ("", "it takes seconds"))
    report = bench(models["latte"], tmp_path, "--against-plain")
    figures, plain, fast = report["against_plain"], report["modes"]["eager"], report["modes"]["fast"]
    table = (tmp_path / "bench.md").read_text()
    assert "Turned on for cpu: modulation, decoder" in fast["choices"] and fast["choices"] in table
    for kind in ("full", "reused"):
        assert figures[kind] == pytest.approx(plain[kind]["median"] / fast[kind]["median"])
        assert cells(table, f"{kind} step")[3] == f"{figures[kind]:.2f}"
    assert [row["interval"] for row in figures["sampling"]] == [1, 2, 3]
    for row, one, other in zip(figures["sampling"], plain["sampling"], fast["sampling"], strict=True):
        assert row["times"] == pytest.approx(one["seconds"]["median"] / other["seconds"]["median"])
        assert row["difference"] < 1e-5
    assert "--against-plain" in table
