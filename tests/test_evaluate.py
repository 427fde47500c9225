"""Sides of a comparison, `skipdit evaluate` on real files, and what it refuses."""

import json
import os
import re

import numpy as np
import pytest
import torch
from painted import SIDE, numbers, painted, write_frames, write_video
from PIL import Image
from real_data import real
from scripted_detector import write_detector
from test_networks import weights
from tiny_pipelines import tiny_pipeline

from skipdit.cli import main
from skipdit.config import load_config
from skipdit.data import ClipDataset, MovingDigits
from skipdit.errors import UserError
from skipdit.evaluation.arrays import read_clips
from skipdit.evaluation.evaluate import EvaluateConfig, evaluate
from skipdit.evaluation.evaluate_config import SideConfig
from skipdit.evaluation.gathering import Gathering, gather_cached, pick_frames
from skipdit.evaluation.identity import describe_difference
from skipdit.evaluation.networks import Detector, load_detector
from skipdit.evaluation.sides import ArraySide, DigitsSide, FileSide, Frames, settings_of

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the stand-in network is TorchScript


@pytest.fixture
def detector(tmp_path):
    return write_detector(tmp_path / "detector.pt")


@pytest.fixture
def clips(tmp_path):
    """Three folders of painted frames, 12, 20 and 40 long."""
    for name, frames in (("a", 12), ("b", 20), ("c", 40)):
        write_frames(tmp_path / "clips" / name, frames)
    return tmp_path / "clips"


def side(folder, count, frames=12, **options) -> FileSide:
    data = ClipDataset(folder, frames, size=SIDE, flip=False, classes="none", max_bad_share=1.0)
    return FileSide(data, count, **options)


def shown(a_side, workers=0) -> list[list[int]]:
    """Frame numbers of its clips."""
    found = []
    for batch in a_side.batches(2, workers):
        found += [numbers(clip.permute(0, 3, 1, 2).float() / 127.5 - 1) for clip in batch]
    return found


def settings(detector, tmp_path, *words) -> EvaluateConfig:
    common = [f"i3d={detector}", f"cache_dir={tmp_path}/cache", "num_workers=0", "metrics=[fvd,kvd]", "clips=6"]
    return load_config(EvaluateConfig, None, [*common, *words])


# ---------------------------------------------------------------------- sides


def test_clips_are_drawn_without_repeats_every_file_before_any_again(clips):
    drawn = side(clips, 8).draws
    assert sorted(index for index, _ in drawn[:3]) == [0, 1, 2]
    assert len(set(drawn)) == 8
    assert [index for index, _ in drawn[3:]].count(0) == 0  # a file of 12 frames has one clip of 12
    everything = side(clips, 1000).draws  # 1 + 9 + 29 starts
    assert len(everything) == len(set(everything)) == 39


def test_what_is_drawn_depends_on_the_seed_alone(clips):
    assert shown(side(clips, 5), workers=0) == shown(side(clips, 5), workers=2)
    assert side(clips, 5, seed=1).draws != side(clips, 5, seed=2).draws


def test_frames_are_those_of_the_draw(clips):
    a_side = side(clips, 4)
    assert shown(a_side) == [list(range(start, start + 12)) for _, start in a_side.draws]


def test_pairs_are_in_the_order_of_the_files_from_their_first_frame(clips):
    assert shown(side(clips, None, in_order=True)) == [list(range(12))] * 3


def test_an_unreadable_clip_is_left_out_and_named(tmp_path):
    for name in "abc":
        write_video(tmp_path / "v" / f"{name}.mp4", 12)
    a_side = side(tmp_path / "v", 3)
    (tmp_path / "v" / "b.mp4").write_bytes(b"broken after the index was made")
    assert len(shown(a_side)) == 2
    assert [name for name, _ in a_side.skipped] == [str(tmp_path / "v" / "b.mp4")]


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt"])
def test_arrays_are_read_in_batches_with_stride_and_count(tmp_path, suffix):
    array = np.stack([[painted((3 * clip + frame) % 64) for frame in range(8)] for clip in range(5)])
    path = tmp_path / f"clips.{suffix}"
    if suffix == "npz":
        np.savez(path, arr_0=array)
    elif suffix == "npy":
        np.save(path, array)
    else:
        torch.save(torch.from_numpy(array), path)
    assert torch.equal(torch.cat(list(read_clips(path, 2))), torch.from_numpy(array))
    a_side = ArraySide([path], 3, Frames(3, stride=2), in_order=True)
    assert shown(a_side) == [[0, 2, 4], [3, 5, 7], [6, 8, 10]]
    chosen = ArraySide([path], 3, Frames(4, stride=2), seed=1)
    assert shown(chosen) == [[(3 * clip + frame) % 64 for frame in (0, 2, 4, 6)] for clip in chosen.chosen]
    assert shown(ArraySide([path], 5, Frames(8))) == [list(range(3 * clip, 3 * clip + 8)) for clip in range(5)]
    with pytest.raises(UserError, match="clips of 8 frames: too few for 5 at interval 2"):
        ArraySide([path], None, Frames(5, stride=2))


def test_arrays_that_do_not_fit_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 4, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "c.npz", arr_0=np.zeros((2, 4, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match="b.npz holds clips .*clips of one size"):
        ArraySide([tmp_path / "a.npz", tmp_path / "b.npz"])
    with pytest.raises(UserError, match="c.npz holds float32"):
        ArraySide([tmp_path / "c.npz"])
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(UserError, match="d.npz cannot be read"):
        ArraySide([tmp_path / "d.npz"])
    for suffix, reason in (("npy", "the magic string is not correct"), ("pt", "mmap can only be used")):
        (tmp_path / f"junk.{suffix}").write_bytes(b"no array of numbers")
        with pytest.raises(UserError, match=rf"junk.{suffix} cannot be read as an array of clips \({reason}"):
            ArraySide([tmp_path / f"junk.{suffix}"])


def test_frames_of_a_clip_are_evenly_spaced():
    clips = torch.arange(16)[None, :, None, None, None].expand(2, 16, 1, 1, 3)
    assert pick_frames(clips, 4)[:, 0, 0, 0].tolist() == [0, 5, 10, 15] * 2
    assert len(pick_frames(clips[:, :1], 4)) == 2  # pictures have one


@pytest.mark.parametrize(("interval", "stride"), [(1, 1), (3, 1), (1, 8), (2, 4)])
def test_frames_of_files_and_arrays_are_the_same(tmp_path, interval, stride):
    """Whatever the interval and the protocol's stride; with a stride alone it is exact."""
    write_frames(tmp_path / "clips" / "a", 48)
    np.save(tmp_path / "a.npy", np.stack([painted(number) for number in range(48)])[None])
    frames = Frames(6, interval, stride)
    data = ClipDataset(tmp_path / "clips", 6 * stride, interval, SIDE, flip=False, classes="none")
    of_files = shown(FileSide(data, None, frames, in_order=True))
    assert of_files == shown(ArraySide([tmp_path / "a.npy"], None, frames))
    if interval == 1:
        assert of_files == [list(range(0, 6 * stride, stride))]
    if stride == 1:  # as in training
        assert of_files == [np.linspace(0, 6 * interval - 1, 6, dtype=int).tolist()]


def test_the_hash_follows_names_and_every_frame_that_is_drawn(clips):
    def digest():
        data = ClipDataset(clips, 12, size=SIDE, flip=False, classes="none")
        return FileSide(data, 3).identity["files"]

    before = digest()
    assert digest() == before
    for name in ("x_frames_0.png", "x_frames_7.png"):
        file = clips / "a" / name
        kept = file.read_bytes()
        file.write_bytes((clips / "a" / "x_frames_1.png").read_bytes())
        assert digest() != before
        file.write_bytes(kept)
        assert digest() == before
    (clips / "b").rename(clips / "bb")
    assert digest() != before


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"num_frames": 8}, "frames of a clip 16 (real) and 8 (generated)"),
        ({"frame_interval": 1}, "frame interval 3 (real) and 1 (generated)"),
        ({"size": (64, 128)}, "width 64 (real) and 128 (generated)"),
        ({"codec": "mp4"}, "codec avi (real) and mp4 (generated)"),
        ({}, ""),
    ],
)
def test_differing_settings_are_named(changed, word):
    generated = {"num_frames": 16, "frame_interval": 3, "size": (64, 64), "codec": "lossless", **changed}
    assert describe_difference(settings_of(16, 3, (64, 64), "avi"), settings_of(**generated)) == word


# ---------------------------------------------------------------------- the command


def test_a_set_against_itself(detector, clips, tmp_path):
    report = evaluate(settings(detector, tmp_path, f"real.path={clips}", f"generated.path={clips}", "num_frames=12"))
    assert report["metrics"]["fvd"] == pytest.approx(0, abs=1e-6)
    assert report["metrics"]["kvd"] < 1e-6
    assert report["real"]["clips"] == 6 and any("too few for the 400" in warning for warning in report["warnings"])


def test_clips_too_short_for_the_network_are_refused_before_any_is_read(detector, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(FileSide, "batches", lambda *_: pytest.fail("a clip was read"))
    with pytest.raises(UserError, match="I3D needs clips of at least 9 frames, these have 8"):
        evaluate(settings(detector, tmp_path, f"real.path={clips}", f"generated.path={clips}", "num_frames=8"))


def test_the_distance_is_that_of_the_features(detector, tmp_path):
    """All clips of a side alike: the distance is that of two points, whatever the network."""
    for name, value in (("dark", 40), ("light", 140)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.full((4, 10, 32, 32, 3), value, np.uint8))
    words = [f"real.path={tmp_path}/dark.npz", f"generated.path={tmp_path}/light.npz"]
    report = evaluate(settings(detector, tmp_path, *words))
    assert report["metrics"]["fvd"] == pytest.approx(360 * (100 / 127.5) ** 2, rel=1e-3)


def test_statistics_of_the_real_side_are_kept_until_something_changes(detector, clips, tmp_path, capsys):
    words = [f"real.path={clips}", f"generated.path={clips}", "num_frames=12"]
    first = evaluate(settings(detector, tmp_path, *words))["metrics"]
    capsys.readouterr()
    assert evaluate(settings(detector, tmp_path, *words))["metrics"] == first
    assert "statistics of an earlier run" in capsys.readouterr().out
    for change in ("seed=1", "clips=5", "num_frames=10", "size=40"):
        evaluate(settings(detector, tmp_path, *words, change, "force=true"))
        assert "earlier run" not in capsys.readouterr().out, change
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 5


def test_sides_that_differ_are_refused_unless_forced(detector, clips, tmp_path):
    words = [f"real.path={clips}", f"generated.path={clips}", "real.frame_interval=2", "num_frames=6"]
    with pytest.raises(UserError, match=r"frame interval 2 \(real\) and 1 \(generated\).*force=true"):
        evaluate(settings(detector, tmp_path, *words))
    forced = evaluate(settings(detector, tmp_path, *words, "num_frames=10", "force=true", "real.max_bad_share=0.5"))
    assert any("Forced although" in warning for warning in forced["warnings"])
    made_at = evaluate(
        settings(detector, tmp_path, *words, "num_frames=9", "generated.made_at=2", "real.max_bad_share=.5")
    )
    assert made_at["generated"]["settings"]["frame_interval"] == 2


def test_more_unreadable_clips_than_allowed_stop_it(detector, tmp_path):
    for name in "abcd":
        write_video(tmp_path / "v" / f"{name}.mp4", 12)
    (tmp_path / "v" / "b.mp4").write_bytes(b"not a video")
    words = [f"real.path={tmp_path}/v", f"generated.path={tmp_path}/v", "num_frames=10", "generated.max_bad_share=0.5"]
    with pytest.raises(UserError, match=r"b\.mp4"):
        evaluate(settings(detector, tmp_path, *words))
    report = evaluate(settings(detector, tmp_path, *words, "real.max_bad_share=0.5"))
    assert report["real"]["skipped"][0][0].endswith("b.mp4")
    assert any("left out" in warning and "b.mp4" in warning for warning in report["warnings"])


def test_clips_that_break_while_they_are_read_count_against_the_share(detector, tmp_path):
    for name in "abcd":
        write_video(tmp_path / "v" / f"{name}.mp4", 12)
    words = [f"real.path={tmp_path}/v", "generated.path=digits", "num_frames=10", f"size={SIDE}", "clips=4"]
    evaluate(settings(detector, tmp_path, *words))  # counts the frames of each
    whole = (tmp_path / "v" / "b.mp4").read_bytes()
    stamp = (tmp_path / "v" / "b.mp4").stat()
    (tmp_path / "v" / "b.mp4").write_bytes(bytes(len(whole)))  # as long and as old as before, and empty
    os.utime(tmp_path / "v" / "b.mp4", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(UserError, match=r"1 of 4 clips cannot be read.*b\.mp4"):
        evaluate(settings(detector, tmp_path, *words))
    report = evaluate(settings(detector, tmp_path, *words, "real.max_bad_share=0.25"))
    assert [name for name, _ in report["real"]["skipped"]] == [str(tmp_path / "v" / "b.mp4")]


def test_a_pipeline_is_sampled_without_touching_the_disk(detector, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.register_to_config(num_frames=4)
    pipeline.save_pretrained(tmp_path / "pipeline")
    sampling = "{steps: 2, num_frames: 10, guidance_scale: 1}"
    words = [f"generated.path={tmp_path}/pipeline", f"generated.sampling={sampling}", "real.path=digits", "clips=4"]
    report = evaluate(settings(detector, tmp_path, *words))
    assert report["generated"]["clips"] == 4 and report["metrics"]["fvd"] > 1
    assert report["generated"]["settings"] == settings_of(10, 1, (16, 16))
    again = evaluate(settings(detector, tmp_path, *words))
    assert again["metrics"] == report["metrics"]


def test_a_set_of_samples_is_found_and_must_be_complete(detector, tmp_path):
    tiny_pipeline(num_frames=10).save_pretrained(tmp_path / "pipeline")
    words = [f"model={tmp_path}/pipeline", "total=4", "steps=2", "samples_per_shard=3", f"output={tmp_path}/set"]
    assert main(["sample", *words]) == 0
    common = ["real.path=digits", "clips=4"]
    found = evaluate(settings(detector, tmp_path, *common, f"generated.path={tmp_path}/set"))
    sampling = "generated.sampling={steps: 2}"  # the same clips without a file
    direct = evaluate(settings(detector, tmp_path, *common, f"generated.path={tmp_path}/pipeline", sampling))
    assert found["metrics"] == direct["metrics"] and found["generated"]["clips"] == 4
    about = tmp_path / "set/samples.json"
    about.write_text(about.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(UserError, match="not complete"):
        evaluate(settings(detector, tmp_path, *common, f"generated.path={tmp_path}/set"))


def test_damaged_weights_of_a_pipeline_are_told_before_the_real_side_is_read(detector, tmp_path, monkeypatch):
    tiny_pipeline(num_frames=10).save_pretrained(tmp_path / "pipeline")
    weights = tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(DigitsSide, "batches", lambda *_: pytest.fail("a clip was read"))
    with pytest.raises(UserError, match="pipeline cannot be read as a pipeline"):
        evaluate(settings(detector, tmp_path, "real.path=digits", f"generated.path={tmp_path}/pipeline"))


@pytest.mark.parametrize("side", ["real", "generated"])
@pytest.mark.parametrize("content", ['{"complete": tr', "[]"])
def test_a_set_that_does_not_say_what_it_is_is_refused(detector, tmp_path, side, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/samples.json").write_text(content)
    words = [f"{side}.path={tmp_path}/set", f"{'real' if side == 'generated' else 'generated'}.path=digits"]
    with pytest.raises(UserError, match=r"samples.json cannot be read \("):
        evaluate(settings(detector, tmp_path, *words))


def test_the_interval_of_the_training_data_is_recorded_or_asked_for(detector, clips, tmp_path):
    pipeline = tiny_pipeline(num_frames=10)
    common = [f"real.path={clips}", "clips=2", "size=16", "real.max_bad_share=1"]
    for interval in (None, 2):
        pipeline.register_to_config(frame_interval=interval)
        folder = tmp_path / f"pipeline{interval}"
        pipeline.save_pretrained(folder)
        words = [f"model={folder}", "total=2", "steps=1", f"output={tmp_path}/set{interval}"]
        assert main(["sample", *words]) == 0
    for path in (tmp_path / "pipeline2", tmp_path / "set2"):
        sampling = ["generated.sampling={steps: 1}"] if path.name == "pipeline2" else []
        words = [*common, f"generated.path={path}", *sampling]
        with pytest.raises(UserError, match=r"frame interval 1 \(real\) and 2 \(generated\)"):
            evaluate(settings(detector, tmp_path, *words))
        evaluate(settings(detector, tmp_path, *words, "real.frame_interval=2"))
    report = evaluate(settings(detector, tmp_path, *common, f"generated.path={tmp_path}/setNone"))
    assert any("not recorded and taken as 1" in warning for warning in report["warnings"])
    said = evaluate(settings(detector, tmp_path, *common, f"generated.path={tmp_path}/setNone", "generated.made_at=1"))
    assert not any("not recorded" in warning for warning in said["warnings"])


def test_generated_clips_of_several_sizes_or_resized_ones_are_refused(detector, clips, tmp_path):
    words = [f"real.path={clips}", f"generated.path={clips}", "num_frames=12"]
    with pytest.raises(UserError, match="generated clips of 48x48 resized to 32x32"):
        evaluate(settings(detector, tmp_path, *words, "size=32"))
    for frame in (clips / "b").iterdir():
        Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(frame)
    with pytest.raises(UserError, match="several sizes, .*48x48.*24x24|several sizes, .*24x24.*48x48"):
        evaluate(settings(detector, tmp_path, *words))


def test_the_protocol_of_128_frames_takes_every_eighth(detector, tmp_path):
    """The same clips as frames of files and as an array: no distance, and far from clips read one after the other."""
    for name in "ab":
        write_frames(tmp_path / "clips" / name, 128)
    whole = np.stack([[painted(number % 64) for number in range(128)]] * 2)
    np.save(tmp_path / "every.npy", whole)
    np.save(tmp_path / "first.npy", np.tile(whole[:, :16], (1, 8, 1, 1, 1)))
    words = [f"i3d={detector}", f"cache_dir={tmp_path}/cache", "num_workers=0", "metrics=[fvd]"]
    words += ["protocol=fvd2048_128f_subsample8f", f"real.path={tmp_path}/clips"]
    found = {}
    for name in ("every", "first"):
        config = load_config(EvaluateConfig, None, [*words, f"generated.path={tmp_path}/{name}.npy"])
        found[name] = evaluate(config)
    assert found["every"]["metrics"]["fvd"] == pytest.approx(0, abs=1e-4) and found["first"]["metrics"]["fvd"] > 1
    assert found["every"]["real"]["settings"]["frame_interval"] == 8
    assert found["every"]["real"]["settings"]["num_frames"] == 16
    assert any("2 clips, not 2048" in warning for warning in found["every"]["warnings"])


def test_a_share_is_kept_to_when_statistics_are_found_again(detector, tmp_path):
    for name in "abcd":
        write_video(tmp_path / "v" / f"{name}.mp4", 12)
    words = [f"real.path={tmp_path}/v", "generated.path=digits", "num_frames=10", f"size={SIDE}", "clips=4"]
    side(tmp_path / "v", 4, frames=10)
    whole, stamp = (tmp_path / "v" / "b.mp4").read_bytes(), (tmp_path / "v" / "b.mp4").stat()
    evaluate(settings(detector, tmp_path, *words))
    (tmp_path / "v" / "b.mp4").write_bytes(bytes(len(whole)))
    os.utime(tmp_path / "v" / "b.mp4", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    report = evaluate(settings(detector, tmp_path, *words, "real.max_bad_share=0.5"))
    assert report["real"]["clips"] == 3
    with pytest.raises(UserError, match="1 of 4 clips cannot be read"):
        evaluate(settings(detector, tmp_path, *words))


def test_clips_left_out_are_named_once_however_often_statistics_are_asked_for(detector, tmp_path):
    """As FVD does while a run trains."""
    for name in "abc":
        write_video(tmp_path / "v" / f"{name}.mp4", 12)
    a_side = side(tmp_path / "v", 3)
    (tmp_path / "v" / "b.mp4").write_bytes(b"broken after the index was made")
    how = Gathering([load_detector("i3d", detector)], max_bad_share=0.5)
    for _ in range(3):
        found = gather_cached(a_side, how, "real clips", tmp_path / "cache", lambda line: None)
        assert found["i3d"].moments.count == 2
        assert [name for name, _ in a_side.skipped] == [str(tmp_path / "v" / "b.mp4")]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"digit_size": 12}, {"speed": (0, 1)}, {"split": "test"}])
def test_digits_of_other_settings_are_another_set(changed):
    plain, other = DigitsSide(MovingDigits(length=5), 2), DigitsSide(MovingDigits(length=5, **changed), 2)
    assert len(plain) == 2 and plain.identity == DigitsSide(MovingDigits(length=2)).identity
    assert other.identity != plain.identity
    assert not torch.equal(*(torch.cat(list(each.batches(2, 0))) for each in (plain, other)))


def test_pairs_however_each_side_is_cut(tmp_path):
    clips = np.random.default_rng(0).integers(0, 200, (8, 5, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", arr_0=clips)
    (tmp_path / "shards").mkdir()
    for number, part in enumerate(np.array_split(clips + 20, 3)):
        np.savez(tmp_path / "shards" / f"{number}.npz", arr_0=part)
    words = [f"real.path={tmp_path}/one.npz", f"generated.path={tmp_path}/shards", "metrics=[psnr]"]
    found = evaluate(load_config(EvaluateConfig, None, words))["metrics"]
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 20), abs=1e-3)


def test_frames_and_pictures_through_inception(tmp_path):
    """FID and KID of a set to itself, and of light pictures to dark ones."""
    inception = weights("inception-v3.pt")
    for name, low in (("dark", 0), ("light", 120)):
        pictures = np.random.default_rng(0).integers(low, low + 100, (6, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures)
    found = {}
    for name in ("dark", "light"):
        words = [f"real.path={tmp_path}/dark.npz", f"generated.path={tmp_path}/{name}.npz", "metrics=[fid,kid]"]
        words += [f"inception={inception}", f"cache_dir={tmp_path}/cache", "clips=6"]
        found[name] = evaluate(load_config(EvaluateConfig, None, words))["metrics"]
    assert found["dark"]["fid"] == pytest.approx(0, abs=1e-4) and found["light"]["fid"] > 1
    assert found["light"]["kid"] > found["dark"]["kid"]


def test_pairs(tmp_path):
    clips = np.random.default_rng(0).integers(0, 200, (3, 5, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", arr_0=clips)
    np.savez(tmp_path / "other.npz", arr_0=clips + 20)
    config = load_config(
        EvaluateConfig,
        None,
        [f"real.path={tmp_path}/one.npz", f"generated.path={tmp_path}/other.npz", "metrics=[psnr,ssim,temporal]"],
    )
    found = evaluate(config)["metrics"]
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 20), abs=1e-3)
    assert 0.9 < found["ssim"] < 1 and abs(found["temporal"] - found["temporal_real"]) < 0.05
    np.savez(tmp_path / "other.npz", arr_0=clips[:2])
    with pytest.raises(UserError, match="3 and 2 clips"):
        evaluate(config)


def test_the_command_writes_a_table_and_figures(detector, clips, tmp_path, capsys):
    words = [
        f"i3d={detector}",
        f"real.path={clips}",
        f"generated.path={clips}",
        "clips=3",
        "num_workers=0",
        "num_frames=12",
    ]
    words += ["metrics=[fvd,is]", f"output={tmp_path}/out", f"cache_dir={tmp_path}/cache"]
    assert main(["evaluate", *words]) == 0
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| FVD |" in table and "Inception score" in table and table in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["real"]["clips"] == 3 and set(figures["networks"]) == {"i3d"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["real.path=a"], "generated.path is missing"),
        (["real.path=a", "generated.path=b", "metrics=[fdv]"], "No metric 'fdv'.*fvd"),
        (["real.path=a", "generated.path=b", "protocol=fvd2048"], "No protocol 'fvd2048'.*fvd2048_16f"),
        (["real.path=a", "generated.path=b", "metrics=[fvd,psnr]"], "two runs"),
        (["real.path=a", "generated.path=b", "clips=1"], "clips=1 must be 2 or more"),
        (["real.path=a", "generated.path=nowhere", "metrics=[psnr]"], "nowhere is not there"),
        (["real.path=a", "generated.path=b", "i3d=missing.pt"], "missing.pt"),
        (["real.path=digits", "real.split=all", "generated.path=digits", "metrics=[psnr]"], "split must be 'train'"),
        (["real.path=a", "generated.path=b", "dtype=fp64"], "dtype=fp64 must be fp32 or bf16"),
        (["real.path=a", "generated.path=b", "protocol=fvd2048_16f", "clips=4"], "leave these out"),
        (["real.path=a", "generated.path=b", "real.frame_interval=0"], "frame_interval=0 must be 1 or more"),
    ],
)
def test_mistakes_get_a_sentence(words, says, capsys, tmp_path):
    assert main(["evaluate", *words, f"output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("skipdit: ") and error.count("\n") == 1
    assert re.search(says, error), error


def test_metrics_of_pairs_and_of_sets_are_refused_by_the_config_itself():
    sides = {name: SideConfig(path="digits") for name in ("real", "generated")}
    assert EvaluateConfig(**sides, metrics=["psnr", "ssim"]).paired
    with pytest.raises(ValueError, match="fvd compares sets in random order.*two runs"):
        EvaluateConfig(**sides, metrics=["fvd", "psnr"])


@pytest.mark.parametrize("at", [1, 3, 5])  # of 6 batches: twice within the real side, once within the generated one
def test_after_ctrl_c_nothing_is_half_written_and_it_completes(detector, clips, tmp_path, monkeypatch, at):
    out = tmp_path / "out"
    sides = [f"real.path={clips}", f"generated.path={clips}", "clips=6", "num_workers=0", "num_frames=12"]
    words = [*sides, f"i3d={detector}", "batch_size=2", "metrics=[fvd]", f"output={out}", f"cache_dir={out}/cache"]
    seen, whole = [], Detector.features

    def features(self, batch):
        seen.append(len(batch))
        if len(seen) == at:
            raise KeyboardInterrupt
        return whole(self, batch)

    monkeypatch.setattr(Detector, "features", features)
    assert main(["evaluate", *words]) == 130
    left = sorted(path.suffix for path in out.rglob("*") if path.is_file())
    assert left == ([".json"] if at <= 3 else [".json", ".safetensors"])  # the frame counts; the real side's statistics
    assert main(["evaluate", *words]) == 0
    assert {"evaluation.md", "evaluation.json", "settings.yaml"} <= {path.name for path in out.iterdir()}


# ---------------------------------------------------------------------- with the real network


def test_the_distance_grows_with_noise(tmp_path):
    """Real clips through the real I3D; blur, shuffled and frozen frames are in docs/benchmarks.md."""
    path = weights("i3d-kinetics-400.ckpt")
    data = ClipDataset(real("data/weizmann"), 9, size=64, flip=False)
    videos = torch.stack([data.frames(index, list(range(9))) for index in range(0, 72, 24)])
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for level in (0.0, 0.1, 0.4):
        noisy = ((videos + level * noise).clamp(-1, 1) * 127.5 + 127.5).byte().permute(0, 1, 3, 4, 2).numpy()
        np.savez(tmp_path / f"{level}.npz", arr_0=noisy)
        words = [f"real.path={tmp_path}/0.0.npz", f"generated.path={tmp_path}/{level}.npz"]
        found.append(evaluate(settings(path, tmp_path, *words, "metrics=[fvd]"))["metrics"]["fvd"])
    assert found[0] == pytest.approx(0, abs=1e-6) and found[0] < found[1] < found[2]
