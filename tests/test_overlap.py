"""Sampling, decoding and writing beside each other."""

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_pipeline

from skipdit.errors import UserError
from skipdit.sampling import streaming
from skipdit.sampling.collection import Collection
from skipdit.sampling.config import SampleConfig
from skipdit.sampling.gallery import Gallery
from skipdit.sampling.generate import generate
from skipdit.sampling.overlap import overlapped
from skipdit.sampling.streaming import sample_indices

PATIENCE = 30  # seconds until a thread that waits in vain gives up


def running() -> int:
    return threading.active_count()


def test_results_are_those_of_map():
    assert list(overlapped(lambda x: x * x, range(7))) == [x * x for x in range(7)]
    assert list(overlapped(abs, [])) == []
    assert list(overlapped(abs, [-3])) == [3]


def test_an_item_is_worked_on_while_the_next_is_made():
    """Each waits for the other, so one after the other would never end."""
    working, made = threading.Event(), threading.Event()

    def items():
        yield 0
        assert working.wait(PATIENCE), "the work on the first item did not begin"
        made.set()
        yield 1

    def work(item):
        working.set()
        assert made.wait(PATIENCE), "the second item was not being made"
        return item, threading.current_thread() is threading.main_thread()

    assert list(overlapped(work, items())) == [(0, False), (1, False)]


def test_no_more_than_two_items_are_ahead_of_the_consumer():
    made = []
    results = overlapped(lambda x: x, (made.append(i) or i for i in range(9)))
    for index in range(9):
        assert next(results) == index
        assert len(made) <= index + 2


def test_what_the_work_raises_comes_in_its_place_and_the_thread_ends():
    before, done = running(), []
    with pytest.raises(ZeroDivisionError):
        for result in overlapped(lambda x: 6 // x, [3, 2, 0, 1, 1]):
            done.append(result)
    assert done == [2, 3] and running() == before


def test_what_the_making_raises_comes_through_and_the_thread_ends():
    before, worked = running(), []

    def items():
        yield 1
        yield 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(overlapped(worked.append, items()))
    assert worked[:1] == [1] and running() == before


def test_a_consumer_that_stops_leaves_no_thread():
    before = running()
    results = overlapped(abs, range(100))
    next(results)
    results.close()
    assert running() == before


def test_nested_ones_end_together_without_the_collector():
    before = running()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            list(overlapped(lambda x: 1 // x, overlapped(lambda x: x - 2, iter(range(100)))))
        assert running() == before
    finally:
        gc.enable()


# ---------------------------------------------------------------------- in the sampling command


def config_of(**changes) -> SampleConfig:
    return SampleConfig(**{"model": "given", "total": 4, "batch_size": 2, "steps": 2, "seed": 1} | changes)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_pixels_are_those_of_one_thread(kind, monkeypatch):
    pipeline = tiny_pipeline(kind)
    found = []
    for overlaps in (("cpu",), ()):
        monkeypatch.setattr(streaming, "OVERLAPS", overlaps)
        found.append(list(sample_indices(pipeline, range(4), lambda index: index % 3, config_of())))
    assert [indices for indices, _ in found[0]] == [indices for indices, _ in found[1]] == [[0, 1], [2, 3]]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(*found, strict=True))


def test_a_batch_is_decoded_while_the_next_one_takes_its_steps(monkeypatch):
    pipeline = tiny_pipeline()
    decode, predict = pipeline.decode, pipeline._predict
    decoding, next_began, steps = threading.Event(), threading.Event(), []

    def decode_once_the_next_is_on_its_way(latents, kind, *args):
        if kind != "latent":
            decoding.set()
            assert len(steps) > 4 or next_began.wait(PATIENCE), "the next batch waited for the decoding"
        return decode(latents, kind, *args)

    def count_steps(*args, **kwargs):
        steps.append(1)
        if len(steps) == 5:  # two samples of two steps are a batch
            assert decoding.wait(PATIENCE)
            next_began.set()
        return predict(*args, **kwargs)

    monkeypatch.setattr(pipeline, "decode", decode_once_the_next_is_on_its_way)
    monkeypatch.setattr(pipeline, "_predict", count_steps)
    samples = list(sample_indices(pipeline, range(4), lambda index: 0, config_of()))
    assert len(samples) == 2 and len(steps) == 8 and next_began.is_set()


def test_an_autoencoder_that_does_not_fit_is_told_before_a_step(monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(pipeline, "_predict", lambda *args: pytest.fail("a step was taken"))
    pipeline.vae.register_to_config(latent_channels=8)
    with pytest.raises(UserError, match="The transformer's latents have 4 channels, the autoencoder's 8"):
        list(sample_indices(pipeline, range(4), lambda index: 0, config_of()))


def test_a_failure_of_decoding_is_told_in_one_sentence(monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(pipeline, "_show", lambda *args: np.full((1, 4, 16, 16, 3), np.nan))
    with pytest.raises(UserError, match="The samples are not finite numbers"):
        list(sample_indices(pipeline, range(4), lambda index: 0, config_of()))


def test_a_shard_that_fails_half_way_is_not_there(tmp_path, monkeypatch):
    """The second shard's second sample cannot be written; the first shard is whole, of the second nothing is left."""
    model, output = tmp_path / "model", tmp_path / "output"
    tiny_pipeline().save_pretrained(model)
    wishes = {"model": str(model), "output": str(output), "samples_per_shard": 2, "format": ["shards", "frames"]}
    write = Collection.write_files

    def fail(self, index, sample):
        if index == 3:
            raise OSError(28, "No space left on device")
        write(self, index, sample)

    monkeypatch.setattr(Collection, "write_files", fail)
    with pytest.raises(UserError, match="takes no more files"):
        generate(config_of(**wishes))
    assert [path.name for path in sorted(Path(output, "shards").iterdir())] == ["00000.npz"]
    monkeypatch.undo()
    generate(config_of(**wishes))
    assert [path.name for path in sorted(Path(output, "shards").iterdir())] == ["00000.npz", "00001.npz"]


def test_the_seconds_told_are_those_that_passed(tmp_path, monkeypatch):
    """Writing to look at counts too: what is decoded meanwhile must not be taken off with it."""
    model, add = tmp_path / "model", Gallery.add
    tiny_pipeline().save_pretrained(model)

    def add_slowly(self, samples):
        time.sleep(1)
        add(self, samples)

    monkeypatch.setattr(Gallery, "add", add_slowly)
    config = config_of(model=str(model), output=str(tmp_path / "out"), total=None, num_samples=3, batch_size=1)
    assert generate(config).seconds >= 3
