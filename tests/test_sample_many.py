"""`skipdit sample total=...`: exactly so many samples, the same bytes by whatever road they came."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny_pipelines import NAMES, save_pipelines

from skipdit import SkipLattePipeline
from skipdit.data import ClipDataset, ImageDataset
from skipdit.errors import UserError
from skipdit.files import only_call
from skipdit.media import join_npz, npz_array, npz_shape
from skipdit.sampling import streaming
from skipdit.sampling.collecting import split_evenly
from skipdit.sampling.collection import Collection
from skipdit.sampling.command import SampleConfig
from skipdit.sampling.generate import generate, iterate_samples
from skipdit.sampling.labels import apportion, count_labels, draw_labels, plan_labels, spread
from skipdit.sampling.loading import find_model, read_class_names
from skipdit.sampling.planning import plan_samples
from skipdit.sampling.streaming import plan_batches, sample_indices

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 11


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_pipelines(tmp_path_factory.mktemp("pipelines"))


def settings(model: Path, output: Path, **changes) -> SampleConfig:
    defaults = {"total": TOTAL, "steps": 2, "seed": 3, "samples_per_shard": 4, "batch_size": 3}
    return SampleConfig(model=str(model), output=str(output), **{**defaults, **changes})


def words(config: SampleConfig) -> list[str]:
    """The same settings for a shell."""
    own = ("model", "output", "total", "steps", "seed", "samples_per_shard", "batch_size")
    return [*(f"{name}={getattr(config, name)}" for name in own), f"format=[{','.join(config.format)}]"]


def content(folder: Path) -> dict[str, str]:
    """Every file but the settings, which name the folder, and the lock: path -> hash."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("settings.yaml", ".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory) -> dict[str, str]:
    """Content of an uninterrupted run of one process with all formats."""
    folder = tmp_path_factory.mktemp("whole")
    generate(settings(folders["video"], folder, format=["shards", "npz", "frames"]))
    return content(folder)


# ---------------------------------------------------------------------- how many, and of what class


def test_exactly_so_many_in_shards(folders, tmp_path):
    report = generate(settings(folders["video"], tmp_path))
    shards = [np.load(path) for path in sorted((tmp_path / "shards").iterdir())]
    assert [shard["arr_0"].shape for shard in shards] == [(4, 4, 16, 16, 3), (4, 4, 16, 16, 3), (3, 4, 16, 16, 3)]
    assert all(shard["arr_0"].dtype == np.uint8 and shard["labels"].dtype == np.int64 for shard in shards)
    assert np.concatenate([shard["labels"] for shard in shards]).tolist() == [i % 3 for i in range(TOTAL)]
    clips = np.concatenate([shard["arr_0"] for shard in shards])
    assert len({clip.tobytes() for clip in clips}) == TOTAL, "two samples are the same"
    assert report.summary().startswith(f"{TOTAL} clips in {tmp_path.resolve()}: shards/, samples.json")
    about = json.loads((tmp_path / "samples.json").read_text())
    assert about["complete"] and about["total"] == TOTAL and about["labels"] == [i % 3 for i in range(TOTAL)]
    assert about["shape"] == [4, 16, 16, 3] and about["kind"] == "clip" and about["class_names"] == NAMES


def test_pictures_become_the_file_of_the_adm_evaluator(folders, tmp_path):
    report = generate(settings(folders["image"], tmp_path))
    assert report.files == ("samples.npz", "samples.json") and not (tmp_path / "shards").exists()
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (TOTAL, 16, 16, 3) and samples["arr_0"].dtype == np.uint8
    assert samples.files[0] == "arr_0" and samples["labels"].tolist() == [i % 3 for i in range(TOTAL)]
    again = generate(settings(folders["image"], tmp_path))
    assert "Nothing was left to do." in again.summary()


def test_an_unconditional_model_has_no_labels(folders, tmp_path):
    generate(settings(folders["unconditional"], tmp_path, format=["npz", "frames"], total=3))
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == ["000000", "000001", "000002"]


def test_largest_remainders_add_up():
    assert apportion([1, 1, 1], 10) == [4, 3, 3]
    assert apportion([50, 30, 20], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert apportion([1, 0, 999], 100) == [0, 0, 100]
    assert apportion([7, 2, 1], 10) == [7, 2, 1]
    weights = list(range(1, 102))
    assert sum(apportion(weights, 2048)) == 2048


def test_spread_labels_keep_the_proportions_everywhere():
    counts = {0: 50, 3: 30, 7: 1, 9: 19}
    labels = spread(counts)
    assert Counter(labels) == counts
    for length in range(1, 101):
        found = Counter(labels[:length])
        assert all(abs(found[label] - count * length / 100) <= 1 for label, count in counts.items())


def test_random_labels_depend_on_seed_and_index():
    labels = draw_labels(10, 3000, seed=5)
    assert labels[:40] == draw_labels(10, 40, seed=5)
    assert labels[:8] == [3, 0, 3, 0, 5, 2, 7, 5]
    assert labels != draw_labels(10, 3000, seed=6)
    assert max(abs(count - 300) for count in Counter(labels).values()) < 60  # 3.6 standard deviations


def test_labels_uniform_over_chosen_classes(folders):
    source = find_model(SampleConfig(model=str(folders["video"])))
    assert plan_labels("uniform", ["two", "0"], source, 5, 0) == (2, 0, 2, 0, 2)
    assert set(plan_labels("random", ["two", "0"], source, 50, 0)) == {0, 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\none\ntwo\n\n", {1: 1, 2: 2}),
        ("zero 10\r\n2, 30\r\n", {0: 10, 2: 30}),
        ("one/v_one_g01_c01.avi 1\none/v_one_g01_c02.avi 1\nzero/v_zero_g01_c01.avi 2", {0: 1, 1: 2}),
    ],
)
def test_labels_of_a_text_file(text, expected, folders, tmp_path):
    (tmp_path / "labels.txt").write_text(text)
    source = find_model(SampleConfig(model=str(folders["video"])))
    assert count_labels(tmp_path / "labels.txt", source) == expected


def test_labels_of_a_data_folder(folders, tmp_path):
    for name, number in (("one", 6), ("two", 2)):
        (tmp_path / name).mkdir()
        for index in range(number):
            (tmp_path / name / f"v_{index}.avi").touch()
    plan = plan_samples(settings(folders["video"], tmp_path / "out", labels=str(tmp_path), total=12))
    assert Counter(plan.labels) == {1: 9, 2: 3} and Counter(plan.labels[:4]) == {1: 3, 2: 1}


def test_unnamed_classes_are_numbered_like_the_folders(folders, tmp_path):
    """As the data sets number them: ImageNet's folders are n01440764, ..., its classes 0 to 999."""
    source = replace(find_model(SampleConfig(model=str(folders["image"]))), class_names=())
    for number, name in enumerate(("n03", "n01", "n02")):
        (tmp_path / name).mkdir()
        for index in range(number + 1):
            (tmp_path / name / f"{index}.JPEG").touch()
    assert count_labels(tmp_path, source) == {0: 2, 1: 3, 2: 1}
    (tmp_path / "n02").rename(tmp_path / ".aside")
    with pytest.raises(UserError, match="No class 'n01': this model has classes 0 to 2"):
        count_labels(tmp_path, source)
    (tmp_path / "n01").rename(tmp_path / "2")
    (tmp_path / "n03").rename(tmp_path / "0")
    assert count_labels(tmp_path, source) == {0: 1, 2: 2}


def test_labels_of_the_official_split_of_ucf101(shared_dir):
    names = read_class_names(ROOT / "configs/ucf101/classes.txt")
    source = find_model(SampleConfig(model=str(ROOT / "pretrained/digits")))
    source.model.register_to_config(num_classes=101)
    counts = count_labels(shared_dir / "data/ucfTrainTestlist/trainlist01.txt", replace(source, class_names=names))
    assert len(counts) == 101 and sum(counts.values()) == 9537
    numbers = apportion(list(counts.values()), 2048)
    assert sum(numbers) == 2048
    for count, number in zip(counts.values(), numbers, strict=True):
        assert abs(number - count * 2048 / 9537) < 1


# ---------------------------------------------------------------------- the same bytes


def test_bytes_do_not_depend_on_the_batch_size(folders, whole, tmp_path):
    """On the CPU each sample is computed alone; on other devices see below."""
    for size in (1, 8):
        formats = ["shards", "npz", "frames"]
        generate(settings(folders["video"], tmp_path / str(size), format=formats, batch_size=size))
        assert content(tmp_path / str(size)) == whole


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_bytes_do_not_depend_on_what_else_is_asked_for(sampler, folders, tmp_path, monkeypatch):
    """As on a GPU, in batches: a sample keeps its place in a batch of the same size, whoever is beside it."""
    monkeypatch.setattr(streaming, "computes_alone", lambda pipeline, config: False)
    config = settings(folders["video"], tmp_path, sampler=sampler, cache="N2", batch_size=3)
    plan = plan_samples(config)
    pipeline = plan.load()

    def clips(indices) -> dict[int, bytes]:
        batches = sample_indices(pipeline, indices, plan.label_of, config)
        return {i: clip.numpy().tobytes() for some, pixels in batches for i, clip in zip(some, pixels, strict=True)}

    everything = clips(range(TOTAL))
    assert list(everything) == list(range(TOTAL))
    for some in ([4], [1, 2, 8], range(5, 10), [10]):
        found = clips(some)
        assert list(found) == list(some) and all(found[index] == everything[index] for index in some)


def test_what_is_computed_at_once():
    config = SampleConfig(model="x", total=12, batch_size=4)
    assert list(plan_batches([1, 2, 6], config, alone=False)) == [
        ([1, 2], [[1, 1, 2, 1]], [1, 2]),
        ([6], [[6, 6, 6, 6]], [2]),
    ]
    assert list(plan_batches([1, 2, 6], config, alone=True)) == [([1, 2], [[1], [2]], [0, 1]), ([6], [[6]], [0])]
    few = SampleConfig(model="x", num_samples=5, batch_size=4)  # to look at: nothing is filled up
    assert [batches for _, batches, _ in plan_batches(range(5), few, alone=False)] == [[[0, 1, 2, 3]], [[4]]]


def test_batches_and_single_samples_agree_to_one_level(folders, tmp_path, monkeypatch):
    """What another batch size may change on a GPU: the last bit of a float, which rounds to either side."""
    config = settings(folders["video"], tmp_path, batch_size=8)
    alone = torch.cat([clips for _, _, clips in iterate_samples(config)]).int()
    monkeypatch.setattr(streaming, "computes_alone", lambda pipeline, config: False)
    together = torch.cat([clips for _, _, clips in iterate_samples(config)]).int()
    assert (alone - together).abs().max() <= 1 and (alone != together).float().mean() < 1e-3


def test_a_consumer_gets_what_the_files_hold(folders, tmp_path):
    config = settings(folders["video"], tmp_path, format=["npz"])
    generate(config)
    samples = np.load(tmp_path / "samples.npz")
    before = set(tmp_path.rglob("*"))
    seen = []
    for indices, labels, clips in iterate_samples(config):
        assert clips.dtype == torch.uint8 and 1 <= len(clips) <= config.batch_size
        np.testing.assert_array_equal(clips.numpy(), samples["arr_0"][indices])
        assert labels == samples["labels"][indices].tolist()
        seen += indices
    assert seen == list(range(TOTAL))
    (some,) = iterate_samples(config, indices=[6, 8])
    assert some[0] == [6, 8]
    np.testing.assert_array_equal(some[2].numpy(), samples["arr_0"][[6, 8]])
    assert set(tmp_path.rglob("*")) == before


def test_the_carried_pipeline(tmp_path):
    """Real weights: 12 digits, the same bytes in batches of 1 and 5 and from a stream."""
    config = settings(
        ROOT / "pretrained/digits", tmp_path / "5", total=12, cache="N2", guidance_scale=4.0, batch_size=5
    )
    generate(config)
    generate(replace(config, batch_size=1, output=str(tmp_path / "1")))
    assert content(tmp_path / "1") == content(tmp_path / "5")
    shards = [np.load(path)["arr_0"] for path in sorted((tmp_path / "1/shards").iterdir())]
    assert [len(shard) for shard in shards] == [4, 4, 4] and shards[0].shape[1:] == (16, 32, 32, 3)
    ((indices, labels, clips),) = iterate_samples(config, indices=[11])
    assert (indices, labels) == ([11], [1])
    np.testing.assert_array_equal(clips[0].numpy(), shards[2][3])


def test_shards_of_another_size_hold_the_same(folders, whole, tmp_path):
    generate(settings(folders["video"], tmp_path, format=["npz", "frames"], samples_per_shard=7))
    found = content(tmp_path)
    assert found.pop("samples.json") and found.items() <= whole.items()


def test_frames_read_back_as_a_data_set(folders, tmp_path):
    generate(settings(folders["video"], tmp_path, format=["frames", "npz"]))
    samples = np.load(tmp_path / "samples.npz")
    data = ClipDataset(tmp_path / "frames", num_frames=4, size=16, flip=False)
    assert data.class_names == sorted(NAMES) and len(data) == TOTAL
    for index, entry in enumerate(data.entries):
        number = int(entry.path.name)
        frames = (data.frames(index, range(4)) + 1) * 127.5
        expected = samples["arr_0"][number].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(frames.round().byte().numpy(), expected)
        assert data.class_names[entry.class_label] == NAMES[samples["labels"][number]]


def test_pictures_read_back_as_a_data_set(folders, tmp_path):
    generate(settings(folders["image"], tmp_path, format=["png", "npz"]))
    samples = np.load(tmp_path / "samples.npz")["arr_0"]
    assert len(ImageDataset(tmp_path / "pictures", size=16)) == TOTAL
    for path in (tmp_path / "pictures").rglob("*.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), samples[int(path.stem)])


# ---------------------------------------------------------------------- processes and interruptions


def command(config: SampleConfig, processes: int = 1) -> dict:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    arguments = [sys.executable, *(launcher if processes > 1 else []), "-m", "skipdit", "sample", *words(config)]
    return {"args": arguments, "env": environment, "cwd": ROOT}


def test_two_processes_write_the_same_bytes(folders, whole, tmp_path):
    config = settings(folders["video"], tmp_path, format=["shards", "npz", "frames"])
    done = subprocess.run(**command(config, 2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path) == whole
    assert done.stdout.count(f"{TOTAL} clips in ") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_continue_to_the_same_bytes(processes, folders, tmp_path):
    """Killed when a first shard is there and others are not, then finished by one process."""
    config = settings(folders["video"], tmp_path / "killed", steps=30, format=["shards", "npz", "frames"])
    generate(replace(config, output=str(tmp_path / "whole")))
    whole, tmp_path = content(tmp_path / "whole"), tmp_path / "killed"
    running = subprocess.Popen(**command(config, processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list(tmp_path.glob("shards/0*.npz")):
        time.sleep(0.0005)
    workers = psutil.Process(running.pid).children(recursive=True)
    for process in (running, *workers):
        process.kill()
    psutil.wait_procs(workers)
    assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/0*.npz")}
    assert 1 <= len(there) < 3 and not (tmp_path / "samples.npz").exists()
    assert not json.loads((tmp_path / "samples.json").read_text())["complete"]
    report = generate(config)
    assert 0 < report.made < TOTAL and f"({TOTAL - report.made} were there before)" in report.summary()
    assert content(tmp_path) == whole
    assert all(path.stat().st_mtime_ns == at for path, at in there.items()), "a finished shard was written again"


@pytest.mark.parametrize("lost", ["shard", "cut", "half", "clip", "picture", "npz", "joining", "nothing"])
def test_whatever_is_lost_is_made_again(lost, folders, whole, tmp_path):
    config = settings(folders["video"], tmp_path, format=["shards", "npz", "frames"])
    generate(config)
    shard, clip = tmp_path / "shards/00001.npz", tmp_path / "frames/two/000005"
    made = {"shard": 4, "cut": 4, "half": 4, "clip": 1, "picture": 0, "npz": 0, "joining": 0, "nothing": 0}[lost]
    if lost in ("shard", "half"):
        shard.unlink()
        (tmp_path / "samples.npz").unlink()
    if lost == "cut":
        os.truncate(shard, 1000)
    if lost == "half":
        (shard.parent / ".00001.npz.abcd_123").mkdir()
        (clip.parent / ".000007.abcd_123").mkdir()
    if lost == "clip":
        clip.rename(tmp_path.with_name(f"{tmp_path.name}-aside"))
    if lost in ("npz", "joining"):
        (tmp_path / "samples.npz").unlink()
    if lost == "joining":
        (tmp_path / ".samples.npz.abcd_123").mkdir()
        (tmp_path / ".samples.npz.abcd_123/samples.npz").write_bytes(b"half")
    assert generate(config).made == made
    assert content(tmp_path) == whole
    assert not list(tmp_path.rglob(".*_123"))


def test_only_missing_clips_are_sampled_when_only_frames_are_wanted(folders, whole, tmp_path):
    config = settings(folders["video"], tmp_path, format=["frames"])
    generate(config)
    for name in ("one/000010", "zero/000000"):
        (tmp_path / "frames" / name).rename(tmp_path / f"aside-{name[:3]}")
    assert generate(config).made == 2
    frames = {name: value for name, value in content(tmp_path).items() if name.startswith("frames/")}
    assert frames == {name: value for name, value in whole.items() if name.startswith("frames/")}


def test_another_format_is_added_to_what_is_there(folders, whole, tmp_path):
    config = settings(folders["video"], tmp_path)
    generate(replace(config, format=["shards"]))
    assert generate(replace(config, format=["npz"])).made == 0  # joined from the shards, which stay
    assert generate(replace(config, format=["frames"])).made == TOTAL
    assert content(tmp_path) == whole


def test_processes_share_evenly():
    items = list(range(11))
    for parts in (1, 2, 3, 8, 20):
        shares = [split_evenly(items, part, parts) for part in range(parts)]
        assert sum(map(list, shares), []) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and shares[0]


def test_a_full_disk_keeps_what_is_finished(folders, whole, tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, 14_000))  # a shard of 4 clips is 12 720 bytes, all 34 224

    config = settings(folders["video"], tmp_path, format=["shards", "npz"])
    done = subprocess.run(**command(config), preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "takes no more files (File too large): finished ones are kept; make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert generate(config).made == 0
    assert content(tmp_path).items() <= whole.items() | {("samples.json", content(tmp_path)["samples.json"])}


def test_joining_takes_no_memory_for_the_samples(tmp_path):
    shape, parts = (64, 128, 128, 3), []
    for number in range(4):
        parts.append(tmp_path / f"{number}.npz")
        with npz_array(parts[-1], shape) as array:
            array[:] = number
    tracemalloc.start()
    join_npz(tmp_path / "all.npz", parts, (256, *shape[1:]), labels=range(256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20 < (tmp_path / "all.npz").stat().st_size / 3
    assert npz_shape(tmp_path / "all.npz") == (256, 128, 128, 3)
    together = np.load(tmp_path / "all.npz")
    assert (together["arr_0"][:, 0, 0, 0] == np.repeat(range(4), 64)).all() and together["labels"][-1] == 255


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total": 0}, "total=0 must be 1 or more."),
        ({"total": 5, "num_samples": 2}, "total=5 and num_samples=2 are two counts: leave one out."),
        (
            {"total": 5, "format": ["npz", "mp4"]},
            "format=mp4 is for looking at: with total choose frames, npz or shards",
        ),
        ({"labels": "random"}, "labels=random goes with total=<number>; leave it out otherwise."),
        ({"format": ["shards"]}, "format=shards goes with total=<number>; without it, choose npz."),
        ({"total": 5, "samples_per_shard": 0}, "samples_per_shard=0 must be 1 or more."),
    ],
)
def test_settings_that_contradict(changes, said):
    with pytest.raises(ValueError) as caught:
        SampleConfig(model="x", **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "video",
            {"format": ["png"]},
            "format=png is for pictures: with total choose frames, npz or shards for",
        ),
        ("image", {"format": ["frames"]}, "format=frames is for clips: this model makes pictures; choose png, npz or"),
        ("video", {"labels": "unifrom"}, "labels=unifrom is not there: choose uniform, random, a folder"),
        (
            "video",
            {"labels": "{tmp}/empty"},
            "empty holds no videos or folders of frames: pass a folder with one",
        ),
        ("video", {"labels": "{tmp}/flat"}, "flat holds videos or folders of frames outside of folders"),
        ("video", {"labels": "{tmp}/other.txt"}, "other.txt: No class 'tow': did you mean 'two'?"),
        ("video", {"labels": "{tmp}/none.txt"}, "none.txt counts nothing: a class, or a class and a count, is needed"),
        ("video", {"labels": "{tmp}/binary.txt"}, "binary.txt is no text: a class, or a class and a count"),
        (
            "video",
            {"labels": "{tmp}/fine.txt", "classes": ["one"]},
            "how often each class comes: leave classes=[one]",
        ),
        ("unconditional", {"labels": "{tmp}/fine.txt"}, "this model is unconditional; leave labels out."),
        ("video", {"classes": ["3"]}, "No class '3': this model has classes 0 to 2."),
        ("image", {"labels": "{tmp}/flat"}, "flat holds no pictures: pass a folder with one folder a class."),
    ],
)
def test_mistakes_are_told_before_any_work(kind, changes, said, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/v.avi").touch()
    (tmp_path / "other.txt").write_text("two 3\ntow 4")
    (tmp_path / "none.txt").write_text("two 0")
    (tmp_path / "fine.txt").write_text("two 1")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    changes = {key: value.format(tmp=tmp_path) if key == "labels" else value for key, value in changes.items()}
    with pytest.raises(UserError) as caught:
        generate(settings(folders[kind], tmp_path / "out", **changes))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "samples of other settings (seed=3, not 4): choose another output, or remove"),
        ({"total": 12, "steps": 3}, "(total=11, not 12, steps=2, not 3, another labels)"),
        ({"cache": "N2"}, "(cache=off, not N2-900-50, cache_shallow=None, not 1)"),
        ({"labels": "random"}, "(another labels)"),
        ({"samples_per_shard": 5}, "(samples_per_shard=4, not 5)"),
    ],
)
def test_samples_of_other_settings_are_not_mixed(changes, said, folders, tmp_path):
    generate(settings(folders["video"], tmp_path))
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        generate(settings(folders["video"], tmp_path, **changes))
    assert said in str(caught.value)
    assert content(tmp_path) == before
    assert generate(settings(folders["video"], tmp_path, batch_size=8, fps=3.0)).made == 0  # alter no sample


def test_samples_of_another_model_are_not_mixed(folders, tmp_path):
    pipeline = SkipLattePipeline.from_pretrained(folders["video"])
    pipeline.save_pretrained(tmp_path / "copy")
    generate(settings(folders["video"], tmp_path / "out"))
    assert generate(settings(tmp_path / "copy", tmp_path / "out")).made == 0
    pipeline.transformer.final_layer.linear.bias.data += 1
    pipeline.save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="samples of other settings \\(another model\\)"):
        generate(settings(tmp_path / "copy", tmp_path / "out"))


def test_unknown_files_are_not_taken_for_samples(folders, tmp_path):
    config = settings(folders["video"], tmp_path)
    generate(SampleConfig(model=config.model, output=config.output, steps=1, format=["npz"]))  # to look at
    with pytest.raises(UserError, match="holds samples.npz, but samples.json, .* cannot be read: choose another"):
        generate(config)
    (tmp_path / "samples.npz").unlink()
    generate(config)
    with pytest.raises(UserError, match="holds a set of samples .*: choose another output"):
        generate(SampleConfig(model=config.model, output=config.output, steps=1))


def test_one_call_a_folder(folders, tmp_path):
    with only_call("sample", tmp_path), pytest.raises(UserError, match="Another skipdit sample is writing to"):
        generate(settings(folders["video"], tmp_path))


def test_too_little_room_is_told_before_any_work(folders, tmp_path):
    plan = plan_samples(settings(folders["video"], tmp_path, total=10**6, format=["npz"], samples_per_shard=10**5))
    collection = Collection(tmp_path, plan)
    assert collection._bytes_needed() == 2 * 10**6 * 4 * 16 * 16 * 3  # the shards, and all in one file
    collection.shape = (10**6, *collection.shape[1:])
    with pytest.raises(UserError, match="take up to 1.54e\\+06 GB, and .* GB free: choose an output with more room"):
        collection.check()


def test_several_processes_need_a_number(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="pass total=<number>, or start one process"):
        generate(SampleConfig(model=str(folders["video"]), output=str(tmp_path)))
    with pytest.raises(UserError, match="put ACCELERATE_USE_CPU=true in front"):
        generate(settings(folders["video"], tmp_path))


def test_a_lock_dies_with_its_process_though_a_forked_worker_lives_on(tmp_path):
    program = """
import os, sys, time
from pathlib import Path
from skipdit.files import only_call
with only_call("train", Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="Another skipdit train is writing"), only_call("train", tmp_path):
                pass
            process.kill()
            process.wait()
            with only_call("train", tmp_path):  # its child still sleeps
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
