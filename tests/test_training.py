"""Whole training runs at toy size: they resume without a trace, and nothing beside the training alters it."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import training_child
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from painted import write_frames
from safetensors.torch import load_file
from scripted_detector import write_detector
from torch.utils.data import Dataset

from skipdit.config import load_config
from skipdit.data import MovingDigits
from skipdit.errors import UnreadableError, UserError
from skipdit.evaluation.metrics import frechet_distance
from skipdit.evaluation.networks import load_detector
from skipdit.evaluation.sides import to_bytes
from skipdit.evaluation.statistics import Moments
from skipdit.files import only_call
from skipdit.kernels import dispatch
from skipdit.models.layers import Attention, Block, FinalLayer, Mlp
from skipdit.operations import count_operations
from skipdit.pipelines import SkipLattePipeline
from skipdit.sampling.streaming import sample_generators
from skipdit.training import checkpointing
from skipdit.training.config import TrainConfig
from skipdit.training.data import DATA_SETS
from skipdit.training.loop import Trainer
from skipdit.training.noise import draw_noise
from skipdit.training.order import GlobalOrder

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


@pytest.fixture(autouse=True)
def one_thread_and_fresh_accelerator():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A tiny autoencoder with random weights: 16x16 pixels to 4x8x8 latents."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def words(vae, tmp_path):
    """Settings of a toy run; called with further ones."""

    def build(output: str, *more: str) -> list[str]:
        base = {
            "vae": vae,
            "output": tmp_path / output,
            "model.arguments": "{sample_size: 8, patch_size: 2, hidden_size: 32, depth: 4, num_heads: 2, "
            "num_frames: 4, num_classes: 10}",
            "data.arguments": "{num_frames: 4, size: 16, length: 10}",
            "data.precompute_latents": "true",
            "data.num_workers": 0,
            "lr_schedule.name": "cosine",
            "lr_schedule.warmup_steps": 2,
            "optimizer.lr": 1e-3,
            "max_steps": STEPS,
            "batch_size": 4,
            "log_every": 1,
            "keep_last": 0,
            "preview.every": 0,
            "preview.steps": 2,
            "tracker": "null",
        }
        return [f"{key}={value}" for key, value in base.items()] + list(more)

    return build


@pytest.fixture
def trainer(words):
    def build(output: str, *more: str) -> Trainer:
        return Trainer(load_config(TrainConfig, None, words(output, *more)))

    return build


def final(output: Path) -> Path:
    return checkpointing.list_checkpoints(output)[-1][1]


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, average and optimizer, bit for bit."""
    assert one.name == other.name
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = (torch.load(folder / "optimizer.bin", weights_only=True) for folder in (one, other))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, moments in ours["state"].items():
        assert all(torch.equal(moments[key], theirs["state"][index][key]) for key in moments)


def assert_close_state(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < tolerance


def log_of(output: Path) -> list[dict]:
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


# ---------------------------------------------------------------------- stopping and resuming


def test_resumed_equals_uninterrupted(trainer, tmp_path):
    trainer("whole", "save_every=1").fit()
    whole = final(tmp_path / "whole")
    assert whole.name == f"step-{STEPS:07d}"
    for stop in (1, 3, STEPS - 1):
        start = checkpointing.checkpoint_folder(tmp_path / "whole", stop)
        again = trainer(f"from{stop}", f"resume={start}", "save_every=100", "preview.every=2")
        assert again.step == stop
        torch.manual_seed(stop)  # the global random state plays no part
        again.fit()
        assert_same_state(final(tmp_path / f"from{stop}"), whole)


def launch(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_and_asked_to_stop_runs_resume(trainer, words, tmp_path):
    long = ("max_steps=120", "save_every=10", "data.precompute_latents=false", "data.num_workers=1")
    trainer("whole", *long).fit()
    output = tmp_path / "stopped"
    config = tmp_path / "train.yaml"  # an empty file: all settings on the command line
    config.write_text("")

    process = launch(["--config", str(config), *words("stopped", *long)])
    wait_for(lambda: len(checkpointing.list_checkpoints(output)) >= 2, process)
    process.kill()
    process.wait()
    reached = checkpointing.list_checkpoints(output)[-1][0]
    assert 20 <= reached < 120

    process = launch(["--config", str(config), *words("stopped", *long, "resume=latest")])
    wait_for(lambda: log_of(output)[-1]["step"] > reached + 12, process)
    os.killpg(process.pid, signal.SIGTERM)  # to the data workers too, as clusters do
    text, _ = process.communicate(timeout=30)
    stopped = checkpointing.list_checkpoints(output)[-1][0]
    assert process.returncode == 0, text
    assert f"Stopped after step {stopped}" in text and "resume=latest" in text
    assert reached + 12 < stopped < 120

    trainer("stopped", *long, "resume=latest").fit()
    assert_same_state(final(output), final(tmp_path / "whole"))
    assert [entry["step"] for entry in log_of(output)] == list(range(1, 121))
    ours, theirs = log_of(output), log_of(tmp_path / "whole")
    assert all(a["loss"] == b["loss"] and a["lr"] == b["lr"] for a, b in zip(ours, theirs, strict=True))


KILLS = 20


def test_killed_at_random_moments_it_ends_with_the_same_weights(trainer, words, tmp_path):
    """Every step is saved, so about half of the kills fall into the writing of a checkpoint."""
    long = ("max_steps=80", "save_every=1", "keep_last=2")
    trainer("whole", *long).fit()
    forking, rng, output = training_child.context(), random.Random(0), tmp_path / "killed"
    survivors = []
    for _ in range(KILLS):
        process = forking.Process(target=training_child.run, args=(words("killed", *long, "resume=latest"),))
        process.start()
        began = time.monotonic()
        before = reached(output)
        # From the first sign of work on, so that a slow machine gets on too.
        while reached(output) == before and process.is_alive() and time.monotonic() < began + 60:
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.12))
        assert process.is_alive(), "it ended before it could be killed: raise max_steps"
        process.kill()
        process.join()
        survivors.append(reached(output))
        for _, folder in checkpointing.list_checkpoints(output):
            assert checkpointing.read_trainer_state(folder)["step"] == int(folder.name[-7:])  # none is half-written
    assert survivors == sorted(survivors) and survivors[-1] < 80
    trainer("killed", *long, "resume=latest").fit()
    assert_same_state(final(output), final(tmp_path / "whole"))
    assert [entry["step"] for entry in log_of(output)] == list(range(1, 81))
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"step-0000079", "step-0000080"}  # nothing half-written stays either


def reached(output: Path) -> int:
    """Step of the last whole checkpoint; 0 without one."""
    found = checkpointing.list_checkpoints(output) if output.is_dir() else []
    return found[-1][0] if found else 0


def test_a_full_disk_leaves_the_previous_checkpoint(trainer, tmp_path):
    trainer("full", "max_steps=1").fit()
    run = trainer("full", "max_steps=2", "resume=latest")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a checkpoint's files are larger
    try:
        with pytest.raises(UserError, match="could not be written .* older ones are intact"):
            run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-0000001"]
    assert trainer("full", "max_steps=2", "resume=latest").step == 1


def test_resume_of_moved_data_goes_on_and_of_other_files_is_refused(words, tmp_path):
    for name in "abcd":
        write_frames(tmp_path / "here" / name / "clip", 6)
    model = "{sample_size: 8, patch_size: 2, hidden_size: 32, depth: 4, num_heads: 2, num_frames: 4, num_classes: 4}"

    def trainer(root: str, *more: str, size: int = 16, share: float = 0.05) -> Trainer:
        arguments = f"{{root: {tmp_path / root}, num_frames: 4, size: {size}, max_bad_share: {share}}}"
        clips = ["data.name=clips", "data.precompute_latents=false", f"model.arguments={model}", *more]
        of_digits = [word for word in words("run") if not word.startswith("data.")]
        settings = [*of_digits, "max_steps=2", "save_every=1", f"data.arguments={arguments}", *clips]
        return Trainer(load_config(TrainConfig, None, settings))

    trainer("here").fit()
    (tmp_path / "here").rename(tmp_path / "there")
    assert trainer("there", "resume=latest", share=0.5).step == 2
    with pytest.raises(UserError, match="data.arguments.size was 16 and is 32"):
        trainer("there", "resume=latest", size=32)
    (tmp_path / "there" / "b").rename(tmp_path / "there" / "bb")
    with pytest.raises(UserError, match="trained on other files"):
        trainer("there", "resume=latest")


def test_a_checkpoint_set_aside_gets_its_name_back(trainer, tmp_path):
    """Killed between the two renames of a second save at one step."""
    trainer("out", "max_steps=2").fit()
    folder = final(tmp_path / "out")
    folder.rename(folder.with_name(f".{folder.name}.replaced.partial"))
    assert trainer("out", "max_steps=2", "resume=latest").step == 2


def test_checkpoints_of_two_runs_do_not_mix(trainer, tmp_path):
    trainer("one", "max_steps=2", "save_every=1").fit()
    trainer("two", "max_steps=4").fit()
    with pytest.raises(UserError, match="newer checkpoints than step-0000002"):
        trainer("two", f"resume={final(tmp_path / 'one')}")


def test_one_run_at_a_time_writes_to_an_output(trainer, tmp_path):
    run = trainer("out", "max_steps=2", "tracker=tensorboard")
    (tmp_path / "out" / "train.yaml").write_text("of the call that is running")
    before = sorted(tmp_path.rglob("*"))
    with only_call("train", tmp_path / "out"), pytest.raises(UserError, match="Another skipdit train"):
        run.fit()
    assert (tmp_path / "out" / "train.yaml").read_text() == "of the call that is running"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_average_may_have_its_decay_from_the_start(trainer):
    run = trainer("out", "ema.decay=0.9", "ema.warmup_power=null")
    assert [run.average.ema.get_decay(step) for step in (2, 3, 1000)] == [0.9] * 3


def test_resume_refuses_another_model(trainer):
    trainer("run").fit()
    with pytest.raises(UserError, match="belongs to another run .model.arguments.depth was 4 and is 8"):
        trainer("run", "resume=latest", "model.arguments.depth=8")


# ---------------------------------------------------------------------- what does not alter the training


def test_kernels_reach_the_layers_and_alter_nothing_where_they_do_not_run(trainer, tmp_path, caplog):
    """On a CPU the plain operations are taken, and told once for each kernel; either may be resumed as the other."""
    dispatch._tell.cache_clear()
    trainer("plain", "save_every=3").fit()
    assert not caplog.messages
    run = trainer("kernels", "kernels=true")
    chosen = {type(module): module.kernels for module in run.module.modules() if hasattr(module, "kernels")}
    assert chosen == dict.fromkeys((Attention, Mlp, Block, FinalLayer), ("attention", "norm"))
    run.fit()
    told = [line for line in caplog.messages if "kernel is not used, because cpu is not a CUDA device" in line]
    assert len(told) == len(set(told)) >= 2
    assert_same_state(final(tmp_path / "kernels"), final(tmp_path / "plain"))
    assert [a["loss"] for a in log_of(tmp_path / "kernels")] == [a["loss"] for a in log_of(tmp_path / "plain")]
    start = checkpointing.checkpoint_folder(tmp_path / "plain", 3)
    trainer("resumed", f"resume={start}", "kernels=true").fit()
    assert_same_state(final(tmp_path / "resumed"), final(tmp_path / "plain"))


def test_previews_and_saves_do_not_alter_the_training(trainer, tmp_path):
    deep = "model.arguments.depth=8"  # of which a reused step can leave out some
    trainer("quiet", deep).fit()
    pictures = (
        "preview.every=1",
        "preview.cache=[off,N2-900-50]",
        "tracker=tensorboard",
        "diagnostics.every=2",
        "diagnostics.steps=4",
    )
    trainer("busy", deep, "save_every=2", "log_every=5", *pictures).fit()
    assert_same_state(final(tmp_path / "busy"), final(tmp_path / "quiet"))
    assert len(list((tmp_path / "busy" / "samples").glob("*.gif"))) == 2 * STEPS
    assert list((tmp_path / "busy").rglob("events.out.tfevents.*"))


def test_accumulated_passes_give_the_same_weights(trainer, tmp_path):
    for passes in (1, 2, 4):
        trainer(f"passes{passes}", f"micro_batch_size={4 // passes}").fit()
    for passes in (2, 4):
        assert_close_state(final(tmp_path / f"passes{passes}"), final(tmp_path / "passes1"), 1e-5)


def test_workers_and_encoding_ahead_give_the_same_weights(trainer, tmp_path):
    trainer("ahead").fit()
    trainer("workers0", "data.precompute_latents=false").fit()
    trainer("workers2", "data.precompute_latents=false", "data.num_workers=2").fit()
    assert_same_state(final(tmp_path / "workers2"), final(tmp_path / "workers0"))
    assert_close_state(final(tmp_path / "ahead"), final(tmp_path / "workers0"), 1e-5)


def test_gradient_checkpointing_gives_the_same_weights(trainer, tmp_path):
    trainer("plain").fit()
    trainer("checkpointed", "gradient_checkpointing=true").fit()
    assert_close_state(final(tmp_path / "checkpointed"), final(tmp_path / "plain"), 1e-5)


def test_two_processes_equal_one(trainer, words, tmp_path):
    trainer("one").fit()
    config = tmp_path / "train.yaml"
    config.write_text("")
    # Without MPI, accelerate's --cpu starts a single process; its environment variable has no such effect.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [
            *launcher,
            "--main_process_port",
            "0",
            "train.py",
            "--config",
            str(config),
            *words("two", "save_every=3"),
        ],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es), 2 items a pass, 1 pass(es) a step" in done.stdout
    assert_close_state(final(tmp_path / "two"), final(tmp_path / "one"), 1e-5)
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    halfway = checkpointing.checkpoint_folder(tmp_path / "two", 3)
    trainer("three", f"resume={halfway}").fit()  # on another number of processes
    assert_close_state(final(tmp_path / "three"), final(tmp_path / "one"), 1e-5)


# ---------------------------------------------------------------------- the training itself


def test_loss_goes_down_on_a_fixed_batch(trainer, tmp_path):
    trainer("fixed", "data.arguments.length=4", "max_steps=100", "optimizer.lr=3e-3", "mixed_precision=bf16").fit()
    losses = [entry["mse"] for entry in log_of(tmp_path / "fixed")]
    assert sum(losses[:5]) / 5 > 0.95
    assert sum(losses[-20:]) / 20 < 0.6


def test_labels_are_dropped_as_the_noise_says(trainer):
    run = trainer("labels", "model.arguments.class_dropout_prob=0.5", "batch_size=10", "max_steps=2")
    seen = []
    run.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1:3]))
    run.fit()
    assert len(seen) == 2
    for step, (timestep, labels) in enumerate(seen):
        drawn = draw_noise(run.config.seed, step, range(10), (4, 4, 8, 8))
        assert torch.equal(timestep, drawn.timestep)
        assert torch.equal(labels == 10, drawn.dropout[:, 0] < 0.5)
        assert 0 < (labels == 10).sum() < 10


def test_clipping_bounds_the_step_and_waits_its_turn(trainer, tmp_path):
    trainer("free", "max_grad_norm=0", "max_steps=2").fit()
    trainer("late", "max_grad_norm=1e-3", "clip_after_step=2", "max_steps=2").fit()
    trainer("clipped", "max_grad_norm=1e-3", "max_steps=2").fit()
    assert_same_state(final(tmp_path / "late"), final(tmp_path / "free"))
    [entry, *_] = log_of(tmp_path / "clipped")
    assert entry["grad_norm"] > 1e-2  # as it was before clipping
    moments = [
        torch.load(final(tmp_path / name) / "optimizer.bin", weights_only=True)["state"] for name in ("free", "clipped")
    ]
    sizes = [math.sqrt(sum(float(m["exp_avg"].square().sum()) for m in state.values())) for state in moments]
    assert sizes[1] < 0.2e-3 < sizes[0]  # the first moment is at most (1 - 0.9 ** 2) of the bound


def test_a_non_finite_step_is_dropped_and_counted(trainer, tmp_path):
    run = trainer("bad", "max_steps=4", "save_every=1")
    poison = run.parameters[0].register_hook(lambda grad: grad * math.nan if run.step == 2 else grad)
    run.fit()
    poison.remove()
    two, three, four = (checkpointing.checkpoint_folder(tmp_path / "bad", step) for step in (2, 3, 4))
    for name in ("model.safetensors", "ema.safetensors"):
        before, after, later = (load_file(folder / name) for folder in (two, three, four))
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert any(not torch.equal(after[key], later[key]) for key in after)
    assert [entry["dropped_steps"] for entry in log_of(tmp_path / "bad")] == [0, 0, 1, 1]
    assert checkpointing.read_trainer_state(four)["dropped_steps"] == 1


def test_too_many_bad_steps_stop_the_run(trainer, tmp_path):
    run = trainer("bad", "save_every=2", "max_dropped_steps=3", "max_steps=20")
    run.parameters[0].register_hook(lambda grad: grad * math.inf if run.step >= 2 else grad)
    with pytest.raises(UserError, match="3 steps in a row"):
        run.fit()
    assert run.step == 4


def test_average_follows_its_decay(trainer):
    run = trainer("ema", "ema.decay=0.5", "ema.warmup_power=0.75", "max_steps=5")
    expected = [parameter.detach().clone() for parameter in run.parameters]
    step, updates = run.average.step, []

    def follow():
        decay = 0 if not updates else min(0.5, 1 - (1 + len(updates)) ** -0.75)  # the first update copies
        updates.append(decay)
        for average, parameter in zip(expected, run.parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
        step()

    run.average.step = follow
    run.fit()
    assert len(updates) == 5 and updates[-1] == 0.5
    for average, other in zip(expected, run.average.state().values(), strict=True):
        torch.testing.assert_close(other, average, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- real data's ways


class Clips(Dataset):
    """Random clips with joint images; an item in `bad` cannot be read. The first pixel tells the epoch."""

    max_bad_share = 0.25
    class_names = tuple("abcdefghij")

    def __init__(self, length: int = 8, images: int = 0, bad: Sequence[int] = (), num_frames: int = 4, size: int = 16):
        self.length, self.images, self.bad, self.num_frames, self.size = length, images, bad, num_frames, size

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, epoch: int) -> dict:
        if index in self.bad:
            raise UnreadableError(Path(f"clip{index}.mp4"), "it is empty")
        generator = torch.Generator().manual_seed(100 * index + epoch)
        video = torch.rand(self.num_frames + self.images, 3, self.size, self.size, generator=generator) * 2 - 1
        labels = [(index + place) % 10 for place in range(1 + self.images)]
        return {"video": video, "class_label": torch.tensor(labels) if self.images else labels[0]}


@pytest.fixture
def on_clips(trainer, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "clips", Clips)

    def build(output: str, arguments: str, *more: str) -> Trainer:
        data = ("data.name=clips", "data.precompute_latents=false", f"data.arguments={arguments}")
        return trainer(output, *data, *more)

    return build


def test_crops_are_new_in_each_epoch_whatever_the_workers(on_clips, tmp_path):
    on_clips("none", "{length: 4}").fit()
    on_clips("two", "{length: 4}", "data.num_workers=2").fit()
    assert_same_state(final(tmp_path / "none"), final(tmp_path / "two"))
    run = on_clips("seen", "{length: 4}", "max_steps=2")
    seen = []
    inner = run.losses._posterior
    run.losses._posterior = lambda batch: seen.append(batch["video"][:, 0, 0, 0, 0].sort().values) or inner(batch)
    run.fit()
    assert not torch.equal(seen[0], seen[1])


def test_unreadable_items_are_named_once_and_count_nothing(on_clips, tmp_path, capsys):
    run = on_clips("bad", "{length: 8, bad: [3]}", "max_steps=8")
    run.fit()
    printed = capsys.readouterr().out
    assert printed.count("clip3.mp4 cannot be read (it is empty); it is left out") == 1
    assert [entry["unreadable_files"] for entry in log_of(tmp_path / "bad")][-1] == 1
    assert run.unreadable == {"clip3.mp4"} and run.dropped == 0
    losses = run.losses(
        {"video": torch.zeros(2, 4, 3, 16, 16), "class_label": torch.tensor([1, 0]), "unreadable": {1: (3, "")}},
        0,
        range(2),
    )
    assert losses.valid.tolist() == [1, 0]
    torch.testing.assert_close(losses.objective, losses.items["loss"][0] / 2)


def test_the_first_item_may_be_unreadable_too(on_clips, tmp_path):
    on_clips("bad", "{bad: [0, 1]}", "max_steps=2").fit()
    assert log_of(tmp_path / "bad")[-1]["unreadable_files"] >= 1
    with pytest.raises(UserError, match="No item of the data can be read.*clip9.mp4"):
        on_clips("none", "{bad: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}")


def test_one_bad_file_behind_many_items_counts_once(on_clips, tmp_path, monkeypatch, capsys):
    """As a joint image is: each of three clips meets the same bad file."""

    def item(self, index, epoch):
        if index < 3:
            raise UnreadableError(Path("shared.mp4"), "it is empty")
        return whole(self, index, epoch)

    whole = Clips.item
    monkeypatch.setattr(Clips, "item", item)
    on_clips("bad", "{length: 8}", "max_steps=6").fit()  # three items would be more than max_bad_share of 8
    assert log_of(tmp_path / "bad")[-1]["unreadable_files"] == 1
    assert capsys.readouterr().out.count("shared.mp4 cannot be read") == 1


def test_too_many_unreadable_items_stop_the_run(on_clips):
    with pytest.raises(UserError, match="3 files of 8 items cannot be read .named above., more than .*max_bad_share"):
        on_clips("bad", "{length: 8, bad: [1, 3, 5]}").fit()


def test_joint_images_have_labels_of_their_own(on_clips):
    run = on_clips("joint", "{length: 8, images: 2}", "max_steps=1", "model.arguments.class_dropout_prob=0.5")
    seen = {}

    def note(module, inputs, keywords):
        seen.update(keywords, latents=inputs[0], labels=inputs[2])

    run.module.register_forward_pre_hook(note, with_kwargs=True)
    run.fit()
    assert seen["latents"].shape == (4, 4, 6, 8, 8) and seen["num_images"] == 2
    draws = next(iter(GlobalOrder(8, 4, 1, 0, 1, run.config.seed, 0, 1)))
    wanted = torch.tensor([[(draw.index + place) % 10 for place in range(3)] for draw in draws])
    dropped = draw_noise(run.config.seed, 0, range(4), (4, 6, 8, 8), labels=3).dropout < 0.5
    wanted = torch.where(dropped, 10, wanted)
    assert torch.equal(seen["labels"], wanted[:, 0]) and torch.equal(seen["image_class_labels"], wanted[:, 1:])


def test_random_crops_are_not_frozen(on_clips):
    with pytest.raises(UserError, match="would freeze the random crops of clips.*skipdit encode"):
        on_clips("frozen", "{}", "data.precompute_latents=true").fit()


# ---------------------------------------------------------------------- starting from other weights


def test_a_retrofit_trains_its_skips_first(trainer, tmp_path):
    trainer("vanilla", "model.arguments.skip=null").fit()
    start = f"init.from={tmp_path / 'vanilla' / 'pipeline'}"
    stages = ("init.skips_only_steps=3", "init.lr_scale=0.1", "model.arguments.skip=residual", "save_every=3")
    run = trainer("retrofit", start, *stages, "lr_schedule.warmup_steps=0")
    before = {name: value.detach().clone() for name, value in run.module.named_parameters()}
    run.fit()
    first, second = (
        load_file(checkpointing.checkpoint_folder(tmp_path / "retrofit", step) / "model.safetensors") for step in (3, 6)
    )
    for name, value in before.items():
        # The zero-initialised fusion passes no gradient to its norm in the first step, but does in later ones.
        assert torch.equal(first[name], value) != name.startswith("skip_"), name
        assert not torch.equal(second[name], first[name]), name
    rates = {(group["loaded"], group["skips"]): group["lr"] for group in run.optimizer.param_groups}
    assert rates[True, False] == pytest.approx(0.1 * rates[False, True])
    again = trainer(
        "again",
        f"resume={checkpointing.checkpoint_folder(tmp_path / 'retrofit', 3)}",
        *stages,
        "lr_schedule.warmup_steps=0",
    )
    again.fit()
    assert_same_state(final(tmp_path / "again"), final(tmp_path / "retrofit"))


def test_average_on_the_cpu_is_the_same(trainer, tmp_path):
    trainer("beside").fit()
    trainer("cpu", "ema.on_cpu=true").fit()
    assert_same_state(final(tmp_path / "beside"), final(tmp_path / "cpu"))


def test_a_v_objective_is_exported_with_its_sampler(trainer, tmp_path):
    words = ("objective.prediction=v_prediction", "objective.zero_terminal_snr=true", "objective.weighting=min_snr")
    trainer("v", *words, "max_steps=2").fit()
    scheduler = SkipLattePipeline.from_pretrained(tmp_path / "v" / "pipeline").scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr


def test_what_is_logged(trainer, tmp_path):
    deep = "model.arguments.depth=8"
    run = trainer("logged", deep, "diagnostics.every=3", "diagnostics.steps=4")
    run.fit()
    lines = [json.loads(line) for line in (tmp_path / "logged" / "log.jsonl").read_text().splitlines()]
    told = [line["diagnostics"] for line in lines if "diagnostics" in line]
    assert len(told) == 2 and set(told[0]) == {"skip_norm_0", "skip_norm_1", "feature_similarity"}
    weight = run.module.skip_linears[1].linear.weight
    assert told[1]["skip_norm_1"] == pytest.approx(torch.linalg.svdvals(weight.detach())[0].item(), rel=1e-4)
    assert 0 < told[1]["feature_similarity"] <= 1
    entries = log_of(tmp_path / "logged")
    assert sum(entries[0]["mse_by_timestep"].values()) > 0
    assert entries[0]["mfu"] == pytest.approx(entries[0]["tflops"] * 1e12 / run.speed.matrix_rate)
    assert entries[0]["tflops"] * 1e12 == pytest.approx(
        3 * count_operations(run.module, (1, 4, 4, 8, 8)).total * entries[0]["clips_per_second"]
    )


# ---------------------------------------------------------------------- what it hands over


def test_exported_pipeline_has_the_average_and_samples(trainer, tmp_path):
    trainer("run").fit()
    pipeline = SkipLattePipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.float16)
    averaged = load_file(final(tmp_path / "run") / "ema.safetensors")
    weights = pipeline.transformer.state_dict()
    assert all(torch.equal(weights[name], value.half()) for name, value in averaged.items())
    assert pipeline.class_names[3] == "three" and pipeline.vae.dtype == torch.float16
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    clips = pipeline(class_labels=["three"], num_inference_steps=2, output_type="np").frames
    assert clips.shape == (1, 4, 16, 16, 3)


def test_fvd_is_measured_while_it_trains(trainer, tmp_path):
    detector = write_detector(tmp_path / "detector.pt")
    longer = "{sample_size: 8, patch_size: 2, hidden_size: 32, depth: 4, num_heads: 2, num_frames: 9, num_classes: 10}"
    own = "num_frames: 9, size: 16, length: 7, seed: 3, digit_size: 6, speed: [2, 3], split: test"
    words = (f"model.arguments={longer}", f"data.arguments={{{own}}}", "max_steps=4")
    fvd = ("fvd.every=2", "fvd.clips=6", "fvd.real_clips=8", "fvd.steps=2", f"fvd.i3d={detector}", "fvd.batch_size=4")
    trainer("out", *words, *fvd, "export_dtype=float32").fit()
    found = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    found = {entry["step"]: entry["fvd"] for entry in found if "fvd" in entry}
    assert list(found) == [2, 4]
    # The same figure from the finished pipeline, the same noise and clips.
    pipeline = SkipLattePipeline.from_pretrained(tmp_path / "out/pipeline")
    assert pipeline.config.frame_interval is None  # digits have none
    real, generated = Moments.empty(400), Moments.empty(400)
    network = load_detector("i3d", detector)
    trained_on = MovingDigits(9, 16, 7, seed=3, digit_size=6, speed=(2, 3), split="test")
    for item in trained_on:
        real.update(network.features(to_bytes(item["video"])[None]))
    noise = sample_generators(0, range(6))
    frames = pipeline(list(range(6)), 2, 1.0, noise, output_type="pt").frames
    generated.update(network.features((frames * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)))
    assert found[4] == pytest.approx(frechet_distance(real, generated), rel=1e-3)
    trainer("plain", *words).fit()  # and the training does not notice
    assert_same_state(final(tmp_path / "out"), final(tmp_path / "plain"))


def test_fvd_that_cannot_be_had_is_refused(trainer, tmp_path):
    with pytest.raises(UserError, match="missing.pt"):
        trainer("out", "fvd.every=2", "fvd.i3d=missing.pt")
    words = ["out", "fvd.every=2", f"fvd.i3d={write_detector(tmp_path / 'detector.pt')}"]
    with pytest.raises(UserError, match="clips of 9 frames, this run has 4"):
        trainer(*words)
    arguments = "data.arguments={num_frames: 9, size: 16, length: 1}"
    with pytest.raises(UserError, match="2 real clips or more, this run has 1"):
        trainer(*words, "model.arguments.num_frames=9", arguments)


def test_unconditional_training(trainer, tmp_path):
    trainer("run", "model.arguments.num_classes=null", "preview.every=3", "preview.num_samples=2", "max_steps=3").fit()
    pipeline = SkipLattePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.null_class is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("preview.classes=[eleven]", "no class 'eleven'; choose 0..9 or one of zero"),
        ("preview.classes=[10]", "no class 10"),
        ("preview.cache=N2", "preview: "),
        ("preview.sampler=euler", "preview: No sampler 'euler'"),
        ("micro_batch_size=0", "micro_batch_size must be at least 1"),
        ("model.arguments.num_classes=11", "num_classes=11, but digits has 10 classes"),
        ("model.arguments.num_frames=8", "num_frames is 8, but the latents of digits have 4"),
        ("model.arguments.sample_size=16", "sample_size is (16, 16), but the latents of digits have (8, 8)"),
        ("model.arguments.in_channels=3", "in_channels is 3, but the latents of digits have 4"),
        ("output=/proc/nowhere", "Cannot write to /proc/nowhere"),
        ("resume=nowhere", "resume=nowhere is no complete checkpoint"),
    ],
)
def test_mistakes_are_named_before_any_work(trainer, word, message):
    with pytest.raises(UserError) as raised:
        trainer("run", *word.split())
    assert message in str(raised.value)
