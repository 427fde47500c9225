"""What the measurement of a card rests on, as far as a CPU shows it: the sampler that graphs hold, records, tables."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import measure_gpu
import pytest
import torch
from gpu import report
from gpu.common import PRESETS, Record, build, device_seconds, error, exact_float32, variant
from gpu.models import EAGER, GRAPHED, SHIPPED, WAYS, exact_output, forward_way, forwards, inputs_of, pipeline_of
from gpu.pieces import pieces_of
from gpu.sampling import graph_runs, pipeline_runs, sampling_way

from skipdit.acceleration.modulation import HeldModulation

CPU = torch.device("cpu")
TINY = replace(PRESETS["tiny"], steps=12)


def test_the_sampler_that_graphs_hold_gives_the_pipeline_s_latents():
    model = variant(build(TINY, CPU), torch.float32)
    noise = inputs_of(TINY, 2, CPU, torch.float32)[0]
    graphed, plain = graph_runs(model, TINY, noise), pipeline_runs(pipeline_of(model, EAGER), TINY, noise)
    for interval in (1, 2, 4):
        (schedule, mine), (expected_schedule, expected) = graphed[interval], plain[interval]
        assert schedule == expected_schedule and schedule.count(True) == {1: 12, 2: 7, 4: 4}[interval]
        assert error(mine(), expected()) < 1e-5
    assert error(plain[4][1](), plain[1][1]()) > 1e-3  # the cache has done something


def test_every_way_to_compute_a_piece_computes_the_same():
    torch.manual_seed(0)
    for piece in pieces_of(TINY, CPU, 2):
        plain = [way for way in piece.ways if not way.startswith("kernel") and way not in ("compiled", "linear alone")]
        inputs = piece.inputs()[0]
        results = [piece.ways[way](*inputs) for way in plain]
        results = [result[1] if isinstance(result, tuple) else result for result in results]
        assert all(error(result, results[0].double()) < 1e-2 for result in results), piece.name
        assert piece.moved > 0


def test_a_way_under_graphs_is_one_of_the_ways():
    assert GRAPHED in WAYS


def test_a_forward_s_weightiest_ways_come_first():
    order = forwards(PRESETS["xl"])
    assert order[:4] == [(1, EAGER), (1, SHIPPED), (4, EAGER), (4, SHIPPED)]
    assert order[-1] == (1, "compiled whole + kernels") and len(order) == len(WAYS) + 3


@torch.no_grad()
def test_forwards_run_as_in_the_pipeline_s_loop(monkeypatch):
    """What ships gets adaLN's vectors of the step; errors are those of bfloat16, and none without a reference."""
    monkeypatch.setattr("skipdit.acceleration.choice.compiler_for", lambda device: ("", "it takes seconds"))
    base, held = build(TINY, CPU), []
    run = HeldModulation.forward
    monkeypatch.setattr(HeldModulation, "forward", lambda self, c: held.append(self.vectors) or run(self, c))
    reference = exact_output(TINY, CPU, base, 1)
    found = {way: forward_way(TINY, CPU, base, reference, 1, way) for way in (EAGER, SHIPPED)}
    assert held and all(vectors is not None for vectors in held)
    assert found[EAGER]["error"] == pytest.approx(found[SHIPPED]["error"], rel=0.05)
    assert 1e-3 < found[EAGER]["error"] < 2e-2
    assert found[SHIPPED]["reused"]["operations"] < found[SHIPPED]["full"]["operations"]
    assert forward_way(TINY, CPU, base, None, 1, EAGER)["error"] is None


def test_differences_are_to_eager_alone(monkeypatch):
    """Where eager failed, no other way takes its place."""
    monkeypatch.setattr("skipdit.acceleration.choice.compiler_for", lambda device: ("", "it takes seconds"))
    base, references = build(TINY, CPU), {}
    arguments = (TINY, CPU, base, 1)
    lone = sampling_way(*arguments, SHIPPED, False, (1, 2), references)
    assert [lone[n]["difference"] for n in ("1", "2")] == [None, None] and references == {}
    assert sampling_way(*arguments, EAGER, False, (1, 2), references)["2"]["difference"] == 0.0
    compared = sampling_way(*arguments, SHIPPED, False, (1, 2), references)
    assert all(0 <= compared[n]["difference"] < 0.1 and compared[n]["set_up"] > 0 for n in ("1", "2"))


def test_references_round_nothing_to_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    with exact_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before


def test_sections_compile_into_folders_of_their_own(tmp_path):
    one, other = (measure_gpu.environment(tmp_path / name) for name in ("one", "other"))
    assert one["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "one") != other["TORCHINDUCTOR_CACHE_DIR"]
    assert one["TRITON_CACHE_DIR"] == str(tmp_path / "one/triton")


def test_error_is_relative():
    assert error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_device_seconds_divides_by_the_inputs():
    seen = []
    found = device_seconds(seen.append, [(1,), (2,)], CPU, repeats=3)
    assert seen == [1, 2] * 5  # two to warm up
    assert found["graph"] is False and 0 < found["seconds"] < 1e-2


def test_a_record_outlives_failures_and_keeps_to_its_time(tmp_path, capsys):
    record = Record(tmp_path / "part.json", seconds=100, device=CPU)
    assert record.attempt("good", lambda: {"a": 1.5, "b": float("nan")}) == {
        "a": 1.5,
        "b": pytest.approx(float("nan"), nan_ok=True),
    }
    assert record.attempt("bad", lambda: 1 / 0) is None
    assert record.attempt("long", lambda: {}, seconds=200) is None
    assert record.prepare("reference", lambda: torch.ones(2)).sum() == 2  # no JSON, and no item
    assert record.prepare("no reference", lambda: torch.ones(-1)) is None
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["items"] == {"good": {"a": 1.5, "b": "nan"}}
    assert list(found["errors"]) == ["bad", "no reference"]
    assert found["errors"]["bad"]["message"] == "ZeroDivisionError: division by zero"
    assert found["skipped"] == ["long"]
    assert "bad FAILED" in capsys.readouterr().out


def forward_item(full: float, reused: float, graph: float | None = None, error: float | None = 4e-3) -> dict:
    times = {"operations": 7.7e12, "set_up": 1.0}
    item = {"full": {"seconds": full, **times}, "reused": {"seconds": reused, **times}, "error": error}
    if graph:
        item["reused"]["graph_seconds"] = graph
    return item


def test_the_report_judges_targets_and_names_what_is_missing(tmp_path):
    forwards = {
        "B2 eager": forward_item(28e-3, 3e-3),
        "B2 pipe.compile()": forward_item(14e-3, 1.95e-3, error=3.9e-3),
        "B2 compiled": forward_item(13e-3, 2.4e-3, graph=1.9e-3, error=None),
    }
    part = {
        "items": forwards,
        "errors": {"B8 eager": {"message": "OutOfMemoryError: 1\n2"}},
        "skipped": ["B2 compiled whole"],
    }
    (tmp_path / "forward.json").write_text(json.dumps(part))
    report.write(tmp_path, tmp_path, "xl", {"forward": "was stopped", "training": "had no time left"})
    text = (tmp_path / "gpu.md").read_text()
    assert "| | target | pipe.compile() | best exact way | by | reached |" in text.replace("|  |", "| |")
    assert "| full forward, one clip with guidance | 13.5 ms | 14 ms | 13 ms | B2 compiled | NO |" in text
    assert "| reused step, one clip with guidance | 2 ms | 1.95 ms | 1.9 ms | B2 compiled | yes |" in text
    assert "| error, of eager bfloat16's | 1.000 | 0.975 | 0.975 | B2 pipe.compile() | yes |" in text
    assert "| training | 40 clips/s |  |  | not measured |  |" in text
    assert "| first start | 60.0 s | not measured |  |  |  |" in text
    assert "This section was stopped." in text and "FAILED B8 eager: OutOfMemoryError: 1\n" in text
    assert "No time was left for: B2 compiled whole." in text
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["training"]["items"] == {}


def test_targets_count_no_way_that_loses_quality():
    """The fastest forward has a larger error than eager bfloat16, or is in float8: neither is the best exact way."""
    forwards = {
        "B2 eager": forward_item(28e-3, 3e-3),
        "B2 pipe.compile()": forward_item(13e-3, 1.9e-3, error=4.4e-3),
        "B2 kernels": forward_item(14e-3, 2.4e-3, error=4.1e-3),
        "B2 float8": forward_item(4e-3, 1e-3),
        "B8 pipe.compile()": forward_item(16e-3, 9e-3),
        "B8 eager": forward_item(100e-3, 10e-3),
    }
    text = report.targets({"forward": forwards})
    assert "| full forward, one clip with guidance | 13.5 ms | 13 ms | 14 ms | B2 kernels | yes |" in text
    assert "| error, of eager bfloat16's | 1.000 | 1.100 | 1.025 | B2 kernels | NO |" in text
    assert (
        "| full forward, four clips | 474 TFLOP/s | 481.2 TFLOP/s | 481.2 TFLOP/s | B8 pipe.compile() | yes |" in text
    )


def test_targets_show_what_ships_beside_what_is_possible():
    samplings = {
        "1 clip, eager": {"1": cached(1.6, 1.0, 1.0), "2": cached(1.0, 1.6, 1.61), "4": cached(0.7, 2.29, 2.3)},
        "1 clip, pipe.compile()": {
            "1": cached(0.8, 1.0, 1.0) | {"set_up": 41.0},
            "2": cached(0.5, 1.6, 1.61),
            "4": cached(0.29, 2.0, 2.3),
        },
        "second start": {"seconds": 12.5},
        "4 clips, pipe.compile()": {"1": cached(3.0, 1.0, 1.0), "2": cached(1.9, 1.58, 1.61)},
        "1 clip, CUDA graphs": {"1": cached(0.7, 1.0, 1.0), "2": cached(0.42, 1.6, 1.61), "4": cached(0.3, 2.29, 2.3)},
        "1 clip, float8": {"1": cached(0.5, 1.0, 1.0), "2": cached(0.2, 1.6, 1.61), "4": cached(0.1, 2.3, 2.3)},
    }
    text = report.targets({"sampling": samplings, "training": {"eager": {"clips_per_second": 41.0}}})
    assert "| DDIM-50, N=2, without VAE | 430 ms | 500 ms | 420 ms | 1 clip, CUDA graphs | NO |" in text
    assert "| DDIM-50, N=4, without VAE | 300 ms | 290 ms | 290 ms | 1 clip, pipe.compile() | yes |" in text
    assert "| speed-up by the cache, of the predicted | 95 % | 87.0 % | 99.4 % | 1 clip, CUDA graphs | NO |" in text
    assert "| first start | 60.0 s | 41.0 s |  |  | yes |" in text
    assert "| second start | 41.0 s | 12.5 s |  |  | yes |" in text
    assert "| training | 40 clips/s |  | 41.0 clips/s | eager | yes |" in text


def cached(seconds: float, speedup: float, bound: float) -> dict:
    return {"seconds": seconds, "speedup": speedup, "bound": bound}


def test_every_section_gets_time_and_all_together_keep_to_the_budget():
    left, waiting, given = 525.0, list(measure_gpu.SECTIONS), {}
    while waiting:
        given[waiting[0]] = measure_gpu.time_for(waiting, left)
        left -= given[waiting[0]] + measure_gpu.START  # the worst case: every section is stopped
        waiting.pop(0)
    assert left >= -1e-9
    assert min(given.values()) >= 15 and given["forward"] > 120 and given["sampling"] > 100
    assert measure_gpu.time_for(["pieces", "breakdown"], 20.0) < measure_gpu.LEAST  # too late to start


def test_what_the_sections_import_is_checked_first(monkeypatch, capsys):
    """Exactly the packages that any of their modules, and any of this package's that they load, import at its head."""
    listed = (
        "import sys; from gpu import breakdown, decoding, models, pieces, sampling\nprint(*(m.__file__ for n, m in "
    )
    listed += "list(sys.modules.items()) if n.split('.')[0] in ('gpu', 'skipdit') and m.__file__), sep='\\n')"
    path = os.pathsep.join([str(measure_gpu.ROOT), str(measure_gpu.ROOT / "tests")])
    ran = subprocess.run(
        [sys.executable, "-c", listed], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    imported = set()
    for file in ran.stdout.split():
        for node in ast.parse(Path(file).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    assert imported - sys.stdlib_module_names - {"skipdit", "gpu"} == set(measure_gpu.NEEDED)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("diffusers", "PIL") else name)
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py"])
    assert measure_gpu.main() == 2
    told = capsys.readouterr().err
    assert told.startswith("Not installed: diffusers, pillow; run 'pip install -e .'") and told.count("\n") == 1


def test_one_section_from_the_command_line(tmp_path):
    script = Path(__file__).with_name("measure_gpu.py")
    options = ["--device", "cpu", "--preset", "tiny", "--only", "rates", "--output", str(tmp_path)]
    ran = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["rates"]
    assert section["ended"] == "ended" and not section["errors"]
    assert section["items"]["memory"]["rate"] > 0
