"""Frames by number: exactly those that were asked for, of every kind of file, and damage told."""

import pickle
from pathlib import Path

import av
import numpy as np
import pytest
from painted import SIDE, numbers, painted, write_frames, write_video
from PIL import Image
from real_data import real

from skipdit.data import decoding
from skipdit.data.decoding import open_source
from skipdit.data.transforms import fit
from skipdit.errors import UnreadableError


@pytest.fixture
def without_decord(monkeypatch):
    monkeypatch.setattr(decoding, "_DECORD", [None])


KINDS = {  # (file, codec, options of the codec, of the file format): whether decord is to be trusted
    ("a.avi", "mpeg4", "bf=0", ""): True,
    ("a.avi", "mpeg4", "bf=2", ""): False,
    ("a.mp4", "mpeg4", "bf=0", ""): True,
    ("a.mp4", "mpeg4", "bf=2", ""): False,
    ("a.mkv", "mpeg4", "bf=2", ""): False,
    ("a.mp4", "libx264", "bf=3 x264-params=scenecut=0:b-adapt=0", ""): True,
    ("a.mp4", "libx264", "bf=3 x264-params=scenecut=0:b-adapt=0", "movflags=frag_keyframe+empty_moov"): True,
    ("a.mkv", "libx264", "bf=3 x264-params=scenecut=0:b-adapt=0", ""): True,
    ("a.avi", "libx264", "bf=2 x264-params=scenecut=0:b-adapt=0", ""): False,
    ("a.mp4", "libx264", "bf=3 x264-params=open-gop=1:scenecut=0:b-adapt=0", ""): False,
    ("a.mkv", "libx264", "bf=3 x264-params=open-gop=1:scenecut=0:b-adapt=0", ""): False,
    ("a.webm", "libvpx-vp9", "", ""): True,
    ("a.mpg", "mpeg2video", "bf=2", ""): False,
    ("a.mpeg", "mpeg1video", "bf=2", ""): False,
    ("a.wmv", "wmv2", "", ""): False,
    ("a.flv", "flv", "", ""): False,
}


def options_of(words: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words.split())


@pytest.mark.parametrize(
    ("kind", "trusted"),
    KINDS.items(),
    ids=lambda value: "-".join(value[:3]).replace(" ", "-") if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_exactly_the_frames_that_were_asked_for(tmp_path, kind, trusted, reader, monkeypatch):
    """Of the kinds that are not trusted, decord gives neighbouring frames without a word."""
    if reader == "pyav":
        monkeypatch.setattr(decoding, "_DECORD", [None])
    name, codec, options, container = kind
    try:
        path = write_video(tmp_path / name, 40, codec, options_of(container), **options_of(options))
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    source = open_source(path)
    assert len(source) == 40 and source.packets.decord_is_exact == trusted
    for wanted in ([0], [39], [5, 6, 30], [30, 6, 6], list(range(40))):
        assert numbers(fit(source.read(wanted), (SIDE, SIDE))) == wanted


def test_frame_folders_are_ordered_by_their_trailing_number(tmp_path):
    source = open_source(write_frames(tmp_path / "clip", 12))
    assert numbers(fit(source.read([0, 2, 10, 11]), (SIDE, SIDE))) == [0, 2, 10, 11]


def test_real_videos_agree_with_decoding_all_of_them(without_decord):
    """PyAV's picks and decord's, on every real clip, against the frames counted from the start."""
    clips = sorted(real("data/UCF101").rglob("v_*"))
    assert len(clips) == 12
    for path in clips:
        with av.open(str(path)) as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        source = open_source(path)
        picks = [0, 1, len(every) // 2, len(every) - 2, len(every) - 1]
        assert len(source) == len(every)
        assert np.array_equal(source.read(picks), np.stack([every[pick] for pick in picks])), path
        try:
            import decord

            reader = decoding._DecordReader(decord)
        except ImportError:
            continue
        try:
            frames = reader.read(path, picks, len(every))
        except UnreadableError:
            continue  # nine of them carry no frame count, which decord wants
        assert np.array_equal(frames, np.stack([every[pick] for pick in picks])), path


def damaged(tmp_path: Path) -> dict[str, Path]:
    whole = write_video(tmp_path / "whole.mp4", 40)
    data = whole.read_bytes()
    paths = {name: tmp_path / f"{name}.mp4" for name in ("empty", "cut", "noise", "text", "start")}
    paths["empty"].write_bytes(b"")
    paths["cut"].write_bytes(data[: len(data) // 2])
    front = write_video(tmp_path / "front.mp4", 40, container={"movflags": "faststart"}).read_bytes()
    paths["start"].write_bytes(front[: len(front) * 3 // 4])  # the table of frames is whole, frames are not
    paths["noise"].write_bytes(np.random.default_rng(0).bytes(5000))
    paths["text"].write_text("<html>not found</html>")
    (tmp_path / "folder").mkdir()
    picture = tmp_path / "torn" / "1.jpg"
    picture.parent.mkdir()
    Image.fromarray(painted(1)).save(picture)
    picture.write_bytes(picture.read_bytes()[:300])
    return {**paths, "folder": tmp_path / "folder", "torn": picture.parent, "missing": tmp_path / "no.mp4"}


@pytest.mark.parametrize("name", ["empty", "cut", "noise", "text", "start", "folder", "torn", "missing"])
def test_damaged_files_are_named(tmp_path, name):
    path = damaged(tmp_path)[name]
    with pytest.raises(UnreadableError) as raised:
        source = open_source(path)
        source.read(range(min(20, len(source))))
    assert str(path) in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value) and again.reason == raised.value.reason


def test_a_frame_that_is_not_there(tmp_path, without_decord):
    with pytest.raises(UnreadableError, match="it has 8 frames, and number 8 was asked for"):
        open_source(write_video(tmp_path / "a.mp4", 8)).read([3, 8])


def test_a_video_cut_off_is_seen_without_decoding(tmp_path):
    with pytest.raises(UnreadableError, match=r"start.mp4 cannot be read \(it is cut off after \d+ frames\)"):
        open_source(damaged(tmp_path)["start"])


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = write_video(tmp_path / "a.mp4", 8)
    assert len(open_source(path)) == 8
    assert len(open_source(write_video(path, 12))) == 12
