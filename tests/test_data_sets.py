"""Clips and pictures: the right frames of the right files, the same whatever the workers, and bad files told."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import numbers, painted, write_frames, write_video
from PIL import Image
from real_data import real
from torch.utils.data import DataLoader

from skipdit.data import ClipDataset, ImageDataset
from skipdit.data.clips import draw_clip, generator
from skipdit.data.decoding import open_source
from skipdit.data.index import count_frames
from skipdit.data.transforms import fit
from skipdit.errors import UserError


@pytest.fixture
def ucf(tmp_path) -> Path:
    """Two classes in UCF101's layout."""
    for name, clips in (("Archery", 3), ("Biking", 2)):
        for clip in range(clips):
            write_video(tmp_path / "UCF101" / name / f"v_{name}_g01_c{clip:02d}.avi", 24)
    return tmp_path / "UCF101"


# ---------------------------------------------------------------------- what is random


def test_the_first_and_the_last_start_are_reached():
    starts = {draw_clip(generator(0, 0, index), 50, 16, 3, False).indices[0] for index in range(100)}
    assert starts == {0, 1, 2}
    drawn = draw_clip(generator(0, 0, 0), 48, 16, 3, False).indices
    assert drawn == np.linspace(0, 47, 16, dtype=int).tolist() and drawn[-1] == 47


def test_flips_are_half_and_as_the_set_says():
    flips = [draw_clip(generator(0, 0, index), 40, 4, 2, True).flip for index in range(400)]
    assert 160 < sum(flips) < 240
    assert not any(draw_clip(generator(0, 0, index), 40, 4, 2, False).flip for index in range(50))


def test_items_depend_on_seed_epoch_and_index_alone(ucf):
    data = ClipDataset(ucf, num_frames=4, size=16)
    first = [data.item(index, 0)["video"] for index in range(5)]
    for workers in (0, 2):
        loaded = [batch["video"][0] for batch in DataLoader(data, batch_size=1, num_workers=workers)]
        assert all(torch.equal(one, other) for one, other in zip(first, loaded, strict=True))
    assert [data.item(3, epoch)["video"].equal(first[3]) for epoch in (0, 1, 2)] == [True, False, False]
    other = ClipDataset(ucf, num_frames=4, size=16, seed=1)
    assert not all(torch.equal(other[index]["video"], first[index]) for index in range(5))


def test_resizing_covers_and_crops_the_centre():
    wide = np.zeros((1, 20, 40, 3), np.uint8)
    wide[:, :, 10:30] = 255
    square = fit(wide, (10, 10))
    assert square.shape == (1, 3, 10, 10) and square[..., 1:-1].min() > 0.99  # but for the edges' blur
    half = np.zeros((1, 8, 8, 3), np.uint8)
    half[:, :, 4:] = 255
    assert fit(half, (8, 8))[0, 0, 0].tolist() == [-1] * 4 + [1] * 4
    assert fit(half, (8, 8), flip=True)[0, 0, 0].tolist() == [1] * 4 + [-1] * 4
    assert fit(half, (4, 8)).shape == (1, 3, 4, 8)


# ---------------------------------------------------------------------- layouts


def test_class_folders(ucf):
    data = ClipDataset(ucf, num_frames=4, frame_interval=2, size=16, flip=False)
    assert data.class_names == ["Archery", "Biking"] and len(data) == 5
    assert [entry.class_label for entry in data.entries] == [0, 0, 0, 1, 1]
    item = data.item(4, 3)
    seen = numbers(item["video"])
    assert item["class_label"] == 1 and item["video"].shape == (4, 3, 16, 16)
    assert seen == np.linspace(seen[0], seen[0] + 7, 4, dtype=int).tolist()


@pytest.mark.parametrize("label", [" 1", ""])
def test_split_lists_with_any_line_ends_and_with_or_without_labels(ucf, label):
    split = ucf.parent / "trainlist01.txt"
    names = ["Biking/v_Biking_g01_c01.avi", "Archery/v_Archery_g01_c00.avi"]
    split.write_bytes("".join(f"{name}{label}\r\n" for name in names).encode())
    data = ClipDataset(ucf, num_frames=4, size=16, split=split)
    assert [(entry.path.name, entry.class_label) for entry in data.entries] == [(names[0][7:], 1), (names[1][8:], 0)]


def test_trees_of_frame_folders_without_classes(tmp_path):
    for video, part, frames in (("video00", "video00_1", 12), ("video01", "video01_0", 9)):
        write_frames(tmp_path / video / part, frames)
    data = ClipDataset(tmp_path, num_frames=4, frame_interval=2, size=16, flip=False, classes="none")
    assert data.class_names is None and [entry.frames for entry in data.entries] == [12, 9]
    assert data[0]["class_label"] == 0 and numbers(data[1]["video"])[0] in (0, 1)


def test_joint_images_of_other_clips(ucf):
    data = ClipDataset(ucf, num_frames=4, size=16, images=3)
    item = data.item(0, 0)
    assert item["video"].shape == (7, 3, 16, 16)
    assert item["class_label"].tolist()[0] == 0 and set(item["class_label"].tolist()) <= {0, 1}
    labels = torch.stack([data.item(0, epoch)["class_label"][1:] for epoch in range(40)])
    assert 0.2 < labels.double().mean() < 0.6  # 2 of 5 clips are of class 1


def test_joint_images_of_a_list(ucf, tmp_path):
    frames = tmp_path / "frames"
    for name, number in (("v_Biking_g01_c00", 7), ("v_Archery_g02_c00", 9)):
        (frames / name).mkdir(parents=True)
        Image.fromarray(painted(number)).save(frames / name / "000012.png")
    listed = tmp_path / "train_list.txt"
    listed.write_text("v_Biking_g01_c00/000012.png\nv_Archery_g02_c00/000012.png\n")
    data = ClipDataset(ucf, num_frames=4, size=16, images=8, image_list=listed, image_root=frames)
    item = data[1]
    seen, labels = numbers(item["video"])[4:], item["class_label"].tolist()[1:]
    assert {(7, 1), (9, 0)} == set(zip(seen, labels, strict=True))
    listed.write_text("w/000012.png\n")
    (frames / "w").mkdir()
    shutil.copy(frames / "v_Biking_g01_c00" / "000012.png", frames / "w")
    with pytest.raises(UserError, match="no class folder is called as the second '_' field of 'w'"):
        ClipDataset(ucf, num_frames=4, size=16, images=8, image_list=listed, image_root=frames)


def test_pictures_in_class_folders(tmp_path):
    for name, number in (("n01", 3), ("n02", 8)):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.fromarray(painted(number)).save(tmp_path / name / "images" / f"{name}.JPEG", quality=95)
    data = ImageDataset(tmp_path, size=16)
    assert data.class_names == ["n01", "n02"] and data[1]["class_label"] == 1
    assert data[1]["video"].shape == (3, 16, 16) and numbers(data[1]["video"][None]) == [8]
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 255
    Image.fromarray(half).save(tmp_path / "n01" / "half.png")
    data = ImageDataset(tmp_path, size=16)
    left = [data.item(0, epoch)["video"][0, 0, 0].item() for epoch in range(20)]
    assert set(left) == {-1.0, 1.0}
    assert {
        ImageDataset(tmp_path, size=16, flip=False).item(0, epoch)["video"][0, 0, 0].item() for epoch in range(9)
    } == {-1}


@pytest.mark.parametrize(
    ("name", "settings", "length", "classes"),
    [
        ("UCF101", {"frame_interval": 3}, 12, 11),
        ("SkyTimelapse/sky_train", {"classes": "none", "frame_interval": 2, "flip": False}, 48, None),
        ("Taichi-HD/taichi_train", {"classes": "none", "frame_interval": 3}, 2, None),
        ("FaceForensics", {"classes": "none", "frame_interval": 3}, 4, None),
        ("weizmann", {}, 72, 4),
    ],
)
def test_real_sets(name, settings, length, classes):
    data = ClipDataset(real("data") / name, size=64, **settings)
    assert len(data) == length and (data.class_names and len(data.class_names)) == classes and not data.rejected
    video = data[length - 1]["video"]
    assert video.shape == (16, 3, 64, 64) and video.min() >= -1 and video.max() <= 1
    assert 0.05 < video.std() < 1 and 0 < (video[1:] - video[:-1]).abs().mean() < 0.3  # it moves, and not by jumps


def test_real_pictures():
    data = ImageDataset(real("data/tiny-imagenet/train"), size=64)
    assert len(data) == 5000 and len(data.class_names) == 20
    assert data[4999]["class_label"] == 19 and data[4999]["video"].shape == (3, 64, 64)


# ---------------------------------------------------------------------- bad files and wrong folders


def test_bad_clips_are_left_out_and_named_once(ucf, caplog):
    (ucf / "Archery" / "v_bad.avi").write_bytes(b"")
    write_video(ucf / "Biking" / "v_short.avi", 3)
    with caplog.at_level(logging.WARNING, "skipdit.data"):
        data = ClipDataset(ucf, num_frames=4, size=16, max_bad_share=0.5)
    assert len(data) == 5
    assert [(path.name, reason) for path, reason in data.rejected] == [
        ("v_bad.avi", "it is empty"),
        ("v_short.avi", "too short, 3 of 4 frames"),
    ]
    told = [record.getMessage() for record in caplog.records]
    assert [line.count("is left out") for line in told] == [1, 1, 0] and told[2] == "2 of 7 clips are left out."
    with pytest.raises(
        UserError, match=r"2 of 7 clips cannot be used.*max_bad_share=0.05.*v_bad.avi: it is empty; .*v_short"
    ):
        ClipDataset(ucf, num_frames=4, size=16)


def test_all_bad_is_too_bad_whatever_the_share(ucf):
    with pytest.raises(UserError, match=r"5 of 5 clips cannot be used \(.*too short, 24 of 25 frames"):
        ClipDataset(ucf, num_frames=25, size=16, max_bad_share=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "nowhere"}, "nowhere is not a folder: set data.arguments.root"),
        ({"root": "hollow"}, "hollow holds neither video files nor folders of frames"),
        ({"root": "flat"}, "lies in no class folder of .*classes=none"),
        ({"split": "no.txt"}, "no.txt is not there: split must name a list"),
        ({"split": "blank.txt"}, "blank.txt is empty"),
        ({"split": "binary.txt"}, "binary.txt is no text"),
        ({"split": "out.txt"}, r"names 1 of 1 files that are not below .*\(\.\./flat/a.avi\)"),
        (
            {"split": "wrong.txt"},
            r"names 4 of 5 files that are not below .*\(A/1.avi, A/2.avi, A/3.avi, ...\)",
        ),
    ],
)
def test_mistakes_are_named_before_any_work(ucf, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("hollow").mkdir()
    write_video(Path("flat/a.avi"), 5)
    Path("binary.txt").write_bytes(bytes(range(256)))
    Path("out.txt").write_text("../flat/a.avi\n")
    Path("blank.txt").write_text("\n\r\n")
    Path("wrong.txt").write_text("".join(f"A/{n}.avi 1\n" for n in range(1, 5)) + "Biking/v_Biking_g01_c01.avi 2\n")
    with pytest.raises(UserError, match=message):
        ClipDataset(**{"root": ucf, "num_frames": 4, "size": 16, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"classes": "yes"}, "classes must be one of folders, none"),
        ({"max_bad_share": 5}, "max_bad_share must be in"),
        ({"image_list": "x.txt"}, "image_list needs images"),
        ({"size": 0}, "size must be one side"),
    ],
)
def test_arguments_out_of_range(ucf, settings, message):
    with pytest.raises(ValueError, match=message):
        ClipDataset(ucf, **settings)


# ---------------------------------------------------------------------- the index


def test_counts_are_kept_and_counted_again_for_what_changed(ucf, tmp_path, monkeypatch):
    clips, store = sorted(ucf.rglob("*.avi")), tmp_path / "run" / "index.json"
    counted = []
    monkeypatch.setattr("skipdit.data.index.open_source", lambda path: counted.append(path) or open_source(path))
    first = count_frames(ucf, clips, store)
    assert set(first.values()) == {24} and sorted(counted) == clips
    assert store.is_file()
    counted.clear()
    assert count_frames(ucf, clips, store) == first and not counted
    write_video(clips[2], 9)
    clips[4].write_bytes(b"")
    again = count_frames(ucf, clips, store)
    assert sorted(counted) == [clips[2], clips[4]]
    assert again[clips[2]] == 9 and again[clips[4]] == "it is empty" and again[clips[0]] == 24
    store.write_text(json.dumps({"format": 0}))
    counted.clear()
    assert count_frames(ucf, clips, store) == again and len(counted) == 5
    for other in ("{half", "[]", "7"):
        store.write_text(other)
        assert count_frames(ucf, clips, store) == again


def test_counts_of_one_process_do_not_displace_anothers(ucf, tmp_path, monkeypatch):
    clips, store = sorted(ucf.rglob("*.avi")), tmp_path / "index.json"

    def while_another_counts(path):
        monkeypatch.setattr("skipdit.data.index.open_source", open_source)
        count_frames(ucf, clips[3:], store)
        return open_source(path)

    monkeypatch.setattr("skipdit.data.index.open_source", while_another_counts)
    count_frames(ucf, clips[:1], store)
    assert set(json.loads(store.read_text())["clips"]) == {
        path.relative_to(ucf).as_posix() for path in clips if path not in clips[1:3]
    }


def test_where_the_index_is_kept(ucf, tmp_path):
    ClipDataset(ucf, num_frames=4, cache_dir=tmp_path / "run")
    [store] = (tmp_path / "run").iterdir()
    assert store.match("frames-????????????.json") and len(json.loads(store.read_text())["clips"]) == 5
    ClipDataset(ucf, num_frames=4, index=tmp_path / "mine.json", cache_dir=tmp_path / "other")
    assert json.loads((tmp_path / "mine.json").read_text()) == json.loads(store.read_text())
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="Cannot write .*: set data.arguments.index"):
        ClipDataset(ucf, num_frames=4, index=tmp_path / "mine.json" / "below.json")


def test_an_empty_picture_leaves_its_clip_out(tmp_path, caplog):
    for name in "abc":
        write_frames(tmp_path / name, 6)
    (tmp_path / "b" / "x_frames_4.png").write_bytes(b"")
    data = ClipDataset(tmp_path, num_frames=4, size=16, classes="none", max_bad_share=0.4)
    assert [entry.path.name for entry in data.entries] == ["a", "c"]
    assert data.rejected == [(tmp_path / "b", "x_frames_4.png is empty")]
