"""The parts of a training run: settings, order, noise, checkpoints' bookkeeping."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from skipdit.config import load_config
from skipdit.errors import UserError
from skipdit.training import checkpointing
from skipdit.training.build import build_model, load_vae
from skipdit.training.config import TrainConfig
from skipdit.training.data import build_data
from skipdit.training.initial import load_initial
from skipdit.training.noise import draw_noise, generator_for
from skipdit.training.optimizing import lr_multiplier
from skipdit.training.order import GlobalOrder
from skipdit.training.stopping import StopRequest

ROOT = Path(__file__).resolve().parent.parent


def settings(*words: str) -> TrainConfig:
    return load_config(TrainConfig, None, words)


# ---------------------------------------------------------------------- settings


def test_the_shipped_config_fits_its_parts():
    config = load_config(TrainConfig, ROOT / "configs" / "digits" / "train.yaml", [])
    config.check()
    model = build_model(config.model)
    assert model.config.depth >= 12 and model.null_class == 10
    dataset, names = build_data(config.data, Path())
    assert len(names) == 10 and dataset[0]["video"].shape == (model.config.num_frames, 3, 32, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_steps=0"], "max_steps must be at least 1, not 0."),
        (["optimizer.lr=0"], "optimizer.lr must be above 0"),
        (["optimizer.betas=[0.9]"], "optimizer.betas must be two numbers"),
        (["ema.decay=1"], "ema.decay must be in"),
        (["mixed_precision=fp8"], "mixed_precision must be one of no, bf16, fp16"),
        (["export_dtype=half"], "export_dtype must be one of"),
        (["tracker=mlflow"], "tracker must be one of null, tensorboard, wandb"),
        (["preview.num_samples=0"], "preview.num_samples must be at least 1"),
    ],
)
def test_values_that_cannot_work(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        settings(*words).check()


def test_batch_size_is_global_and_accumulation_follows():
    assert [settings("batch_size=24").passes(processes) for processes in (1, 2, 4)] == [1, 1, 1]
    config = settings("batch_size=24", "micro_batch_size=5")
    assert [config.passes(processes) for processes in (1, 2, 4, 8)] == [6, 3, 2, 1]  # of 4, 4, 3 and 3 clips
    with pytest.raises(UserError, match="batch_size=24 does not divide by 5 process"):
        config.passes(5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.name=Late"], "did you mean 'Latte'"),
        (["model.arguments.num_head=4"], "No setting 'model.arguments.num_head': did you mean 'num_heads'"),
        (["model.arguments.depth=6"], "model.arguments: depth=6"),
    ],
)
def test_models_that_cannot_be_built(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_model(settings(*words).model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.name=digit"], "did you mean 'digits'"),
        (["data.arguments.frames=4"], "No setting 'data.arguments.frames' of digits"),
        (["data.arguments.num_frames=0"], "data.arguments: num_frames must be at least 1"),
        (["data.arguments.length=0"], "is empty"),
    ],
)
def test_data_sets_that_cannot_be_built(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_data(settings(*words).data, Path())


def test_missing_vae_names_the_command(tmp_path):
    with pytest.raises(UserError, match="skipdit train-vae"):
        load_vae(str(tmp_path / "vae"))


def test_learning_rate_is_a_function_of_the_step():
    constant = lr_multiplier(settings("lr_schedule.name=constant", "lr_schedule.warmup_steps=4"))
    assert [constant(step) for step in (0, 1, 4, 1000)] == [0, 0.25, 1, 1]
    cosine = lr_multiplier(settings("lr_schedule.name=cosine", "lr_schedule.warmup_steps=10", "max_steps=110"))
    assert [cosine(step) for step in (5, 10, 60, 110)] == pytest.approx([0.5, 1, 0.5, 0])
    with pytest.raises(UserError, match="lr_schedule.name='cosin'"):
        lr_multiplier(settings("lr_schedule.name=cosin"))


# ---------------------------------------------------------------------- starting from trained weights


TINY = (
    "model.arguments={hidden_size: 32, depth: 4, num_heads: 2, num_frames: 3, sample_size: 8, num_classes: 5, skip: %s}"
)


@pytest.fixture
def vanilla(tmp_path):
    """A vanilla model of two frames with random weights everywhere, saved."""
    torch.manual_seed(0)
    config = settings(TINY % "null", "model.arguments.num_frames=2").model
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "vanilla")
    return model.eval()


def initial(folder, *words):
    config = settings(*words, f"init.from={folder}")
    model = build_model(config.model)
    return model.eval(), load_initial(model, config.init)


@torch.no_grad()
def test_a_retrofit_starts_exactly_from_the_vanilla_model(vanilla, tmp_path):
    model, loaded = initial(tmp_path / "vanilla", TINY % "residual")
    inputs = torch.randn(2, 4, 2, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 5])
    assert torch.equal(model(*inputs).sample, vanilla(*inputs).sample)
    assert loaded == {name for name, _ in vanilla.named_parameters()}


def test_another_number_of_classes_keeps_its_own_label_table(vanilla, tmp_path):
    model, loaded = initial(tmp_path / "vanilla", TINY % "residual", "model.arguments.num_classes=7")
    assert "y_embedder.embedding_table.weight" not in loaded and len(loaded) == len(list(vanilla.parameters())) - 1
    assert model.y_embedder.embedding_table.weight.shape == (8, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([TINY % "linear"], "is a vanilla model, without long skips: set model.arguments.skip=residual"),
        ([TINY % "residual", "model.arguments.depth=8"], "is another kind of model: it has no blocks.4."),
        ([TINY % "residual", "model.arguments.hidden_size=64"], "give model.arguments the sizes of those weights"),
        ([TINY % "null", "init.skips_only_steps=1"], "init.skips_only_steps needs long skips"),
    ],
)
def test_weights_that_do_not_fit(vanilla, tmp_path, words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        initial(tmp_path / "vanilla", *words)


def test_a_learning_rate_of_loaded_weights_needs_weights():
    config = settings(TINY % "residual", "init.lr_scale=0.1")
    with pytest.raises(UserError, match="init.lr_scale=0.1 is for loaded weights: set init.from, or leave it out."):
        load_initial(build_model(config.model), config.init)


def test_weights_with_skips_do_not_fit_a_vanilla_model(tmp_path):
    build_model(settings(TINY % "linear").model).save_pretrained(tmp_path / "skips")
    with pytest.raises(UserError, match="has long skips: set model.arguments.skip=linear"):
        initial(tmp_path / "skips", TINY % "null")
    with pytest.raises(UserError, match="init.from=.*nowhere is not there"):
        initial(tmp_path / "nowhere", TINY % "null")


# ---------------------------------------------------------------------- order and noise


def orders(passes: int, processes: int, start: int = 0, stop: int = 9) -> list[list[list[int]]]:
    """Batches of each process."""
    return [list(GlobalOrder(10, 4, passes, rank, processes, 7, start, stop)) for rank in range(processes)]


def test_each_epoch_takes_every_item_once_in_a_new_order():
    [batches] = orders(1, 1, stop=10)
    draws = [draw for batch in batches for draw in batch]
    assert [draw.epoch for draw in draws] == [place // 10 for place in range(40)]
    stream = [draw.index for draw in draws]
    epochs = [stream[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(("passes", "processes"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_processes_and_passes_share_one_order(passes, processes):
    [alone] = orders(1, 1)
    shares = orders(passes, processes)
    for step, batch in enumerate(alone):
        joined = [
            item
            for accumulated in range(passes)
            for rank in range(processes)
            for item in shares[rank][step * passes + accumulated]
        ]
        assert joined == batch


def test_order_continues_where_a_run_stopped():
    assert orders(1, 1)[0][5:] == orders(1, 1, start=5)[0]


def test_noise_belongs_to_seed_step_and_place():
    whole = draw_noise(0, 3, range(6), (4, 2, 8, 8))
    part = draw_noise(0, 3, range(2, 4), (4, 2, 8, 8))
    for all_places, some in zip(whole, part, strict=True):
        assert torch.equal(all_places[2:4], some)
    for other in (draw_noise(1, 3, range(6), (4, 2, 8, 8)), draw_noise(0, 4, range(6), (4, 2, 8, 8))):
        assert not torch.equal(other.noise, whole.noise)
    assert whole.timestep.dtype == torch.long and whole.noise.shape == (6, 4, 2, 8, 8)
    assert not torch.equal(whole.noise, whole.posterior)


def test_noise_has_the_right_distribution():
    drawn = draw_noise(0, 0, range(4000), (4,))
    assert 0 <= drawn.timestep.min() < 5 and 995 <= drawn.timestep.max() < 1000
    assert abs(drawn.timestep.float().mean() - 499.5) < 4 * 289 / 4000**0.5
    assert abs((drawn.dropout < 0.1).float().mean() - 0.1) < 4 * 0.3 / 4000**0.5
    assert abs(drawn.noise.std() - 1) < 0.05 and abs(drawn.noise.mean()) < 0.04
    correlation = torch.corrcoef(torch.stack([drawn.noise[:-1, 0], drawn.noise[1:, 0]]))[0, 1]
    assert abs(correlation) < 0.08


def test_drawing_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    generator_for("anything", 1, 2).initial_seed()
    draw_noise(0, 0, range(2), (4,))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------- being asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_its_echo_does_no_harm(number):
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as a launcher passes on what the group got as well
        assert stop.requested
    assert signal.getsignal(number) is before


def test_a_later_interrupt_stops_at_once():
    stop = StopRequest()
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop._asked_at -= 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_end_of_the_launcher_asks_to_stop(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    alone = StopRequest()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launched = StopRequest()
    assert not alone.requested and not launched.requested
    others = os.getppid() + 1
    monkeypatch.setattr(os, "getppid", lambda: others)  # another process adopts it after that
    assert not alone.requested and launched.requested


# ---------------------------------------------------------------------- checkpoints


def save(output: Path, step: int, write=lambda folder: (folder / "weights").write_text("w")) -> Path:
    folder = checkpointing.checkpoint_folder(output, step)
    checkpointing.write_checkpoint(folder, {"step": step}, write, True, lambda: None)
    return folder


def test_an_interrupted_write_leaves_the_previous_checkpoint(tmp_path):
    good = save(tmp_path, 5)

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device.*older ones are intact"):
        save(tmp_path, 10, fail)
    killed = checkpointing.checkpoint_folder(tmp_path, 15).with_name(".step-0000015.partial")
    killed.mkdir()
    (tmp_path / "checkpoints" / "step-0000020").mkdir()  # someone's copy, cut short
    assert checkpointing.find_checkpoint("latest", tmp_path) == good
    checkpointing.remove_leftovers(tmp_path)
    assert not killed.exists() and good.exists()


def test_latest_is_by_number_and_a_rewrite_replaces(tmp_path):
    for step in (900, 1000, 20_000_000):
        save(tmp_path, step)
    assert checkpointing.find_checkpoint("latest", tmp_path).name == "step-20000000"
    again = save(tmp_path, 20_000_000, lambda folder: (folder / "weights").write_text("new"))
    assert (again / "weights").read_text() == "new"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_pruning(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpointing.prune(tmp_path, 0)
    assert len(checkpointing.list_checkpoints(tmp_path)) == 5
    checkpointing.prune(tmp_path, 3, keep_every=2)
    assert [step for step, _ in checkpointing.list_checkpoints(tmp_path)] == [2, 3, 4, 5]
    checkpointing.prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000004",
        "step-0000005",
    ]


def test_what_to_resume_from(tmp_path):
    assert checkpointing.find_checkpoint(None, tmp_path) is None
    assert checkpointing.find_checkpoint("latest", tmp_path) is None
    old, _ = save(tmp_path, 1), save(tmp_path, 2)
    with pytest.raises(UserError, match="already holds checkpoints up to step 2.*resume=latest"):
        checkpointing.find_checkpoint(None, tmp_path)
    with pytest.raises(UserError, match="is no complete checkpoint"):
        checkpointing.find_checkpoint(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="newer checkpoints than step-0000001"):
        checkpointing.find_checkpoint(str(old), tmp_path)
    assert checkpointing.find_checkpoint(str(old), tmp_path / "other") == old


def test_resume_compares_the_settings(tmp_path):
    saved = dataclasses.asdict(settings("batch_size=8", "optimizer.lr=1e-3", "log_every=5"))
    checkpointing.check_same_run(saved, settings("batch_size=8"), tmp_path)
    assert checkpointing.changed_settings(saved, settings("batch_size=8")) == ["optimizer.lr was 0.001, is 0.0001"]
    other = settings("batch_size=4", "model.arguments.depth=8", "data.num_workers=0")
    with pytest.raises(UserError) as raised:
        checkpointing.check_same_run(saved, other, tmp_path)
    assert "batch_size was 8 and is 4; model.arguments.depth was None and is 8)" in str(raised.value)
