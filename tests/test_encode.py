"""Latents written ahead: the same numbers as encoding on the way, whole after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from real_data import real
from test_data_sets import painted, write_frames, write_video

from skipdit.config import load_config
from skipdit.data import ClipDataset, ImageDataset, LatentDataset
from skipdit.data.latents import hash_weights, verify
from skipdit.errors import UserError
from skipdit.training.build import load_vae
from skipdit.training.config import DataConfig
from skipdit.training.data import build_data, encode
from skipdit.training.encoding import EncodeConfig, encode_data

ROOT = Path(__file__).resolve().parent.parent
FRAMES = (24, 17, 9, 12, 3)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """16x16 pixels to 4x8x8 latents."""
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
def clips(tmp_path) -> Path:
    """Two classes: videos and folders of frames, of different lengths."""
    root = tmp_path / "clips"
    for number, frames in enumerate(FRAMES):
        name = root / ("A" if number % 2 else "B") / f"clip{number}"
        write_frames(name, frames) if number > 2 else write_video(name.with_suffix(".mp4"), frames)
    return root


@pytest.fixture
def words(clips, vae_folder, tmp_path):
    def build(output: str, *more: str) -> list[str]:
        arguments = f"{{root: {clips}, num_frames: 1, size: 16}}"
        base = {"vae": vae_folder, "output": tmp_path / output, "data.name": "clips", "data.arguments": arguments}
        base |= {"data.num_workers": 0, "data.encode_batch": 7, "frames_per_shard": 20, "dtype": "float32"}
        return [f"{key}={value}" for key, value in base.items()] + list(more)

    return build


@pytest.fixture
def written(words, tmp_path):
    def write(output: str = "latents", *more: str) -> Path:
        return encode_data(load_config(EncodeConfig, None, words(output, *more)))

    return write


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_items_are_what_encoding_the_clip_gives(written, clips, vae_folder):
    folder = written()
    settings = {"num_frames": 4, "frame_interval": 2, "seed": 3}
    latents = LatentDataset(folder, **settings)
    videos = ClipDataset(clips, size=16, max_bad_share=1, **settings)
    assert len(latents) == len(videos) == 4  # one is too short
    assert latents.class_names == videos.class_names == ["A", "B"]
    vae = load_vae(str(vae_folder))
    flips = set()
    for index in range(4):
        for epoch in range(3):
            ours, theirs = latents.item(index, epoch), videos.item(index, epoch)
            mean, std = encode(vae, theirs["video"][None], 100)
            torch.testing.assert_close(ours["mean"], mean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours["std"], std[0], atol=1e-5, rtol=1e-5)
            assert ours["class_label"] == theirs["class_label"]
            flips.add(tuple(theirs["video"].shape))
    assert flips == {(4, 3, 16, 16)}


def test_joint_images_come_from_other_clips(written, clips, vae_folder):
    latents = LatentDataset(written(), num_frames=4, images=3, seed=1)
    videos = ClipDataset(clips, size=16, max_bad_share=1, num_frames=4, images=3, seed=1)
    ours, theirs = latents.item(2, 5), videos.item(2, 5)
    mean, _ = encode(load_vae(str(vae_folder)), theirs["video"][None], 100)
    assert ours["mean"].shape == (4, 7, 8, 8)
    torch.testing.assert_close(ours["mean"], mean[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours["class_label"], theirs["class_label"])


def test_pictures(tmp_path, vae_folder):
    for name in ("n1", "n2"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(painted(number + 1)).save(tmp_path / "set" / name / f"{number}.png")
    words = [
        f"vae={vae_folder}",
        f"output={tmp_path / 'out'}",
        "data.name=images",
        "dtype=float32",
        "frames_per_shard=2",
    ]
    words += [f"data.arguments={{root: {tmp_path / 'set'}, size: 16}}", "data.num_workers=0"]
    folder = encode_data(load_config(EncodeConfig, None, words))
    latents, pictures = LatentDataset(folder), ImageDataset(tmp_path / "set", size=16)
    assert len(latents) == 6 and len(list(folder.glob("*.safetensors"))) == 3
    for index in range(6):
        mean, _ = encode(load_vae(str(vae_folder)), pictures.item(index, 1)["video"][None], 9)
        torch.testing.assert_close(latents.item(index, 1)["mean"], mean[0], atol=1e-5, rtol=1e-5)
        assert latents[index]["class_label"] == index // 3


def test_half_precision_is_close(written):
    one, other = (LatentDataset(written(kind, f"dtype={kind}"), num_frames=4) for kind in ("float32", "float16"))
    for part in ("mean", "std"):
        torch.testing.assert_close(one[0][part], other[0][part], atol=1e-3, rtol=1e-3)
    assert other[0]["mean"].dtype == torch.float32


def test_a_tiny_autoencoder_has_no_spread(clips, tmp_path):
    vae = real("weights/taesd")
    words = [f"vae={vae}", f"output={tmp_path / 'out'}", f"data.arguments={{root: {clips}, num_frames: 1, size: 32}}"]
    folder = encode_data(load_config(EncodeConfig, None, [*words, "data.num_workers=0", "flip=false"]))
    item = LatentDataset(folder, num_frames=4, flip=False)[0]
    assert item["mean"].shape == (4, 4, 4, 4) and item["std"].count_nonzero() == 0


def test_a_killed_call_continues_to_the_same_files(words, written, tmp_path):
    whole = content(written("whole"))
    command = [sys.executable, "-m", "skipdit", "encode", *words("killed", "data.encode_batch=7")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    kills = 0
    for _ in range(3):
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "killed").glob("*.safetensors")))
        while running.poll() is None and len(list((tmp_path / "killed").glob("*.safetensors"))) == before:
            time.sleep(0.001)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        running.wait()
    assert kills and not (tmp_path / "killed" / "index.json").exists() or content(tmp_path / "killed") == whole
    written("killed")
    assert content(tmp_path / "killed") == whole


def test_two_processes_write_the_same_files(words, written, tmp_path):
    whole = content(written("one"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", "-m", "skipdit", "encode", *words("two")],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == whole
    assert done.stdout.count("Train from them: data.latents=") == 1


def test_damage_is_found(written):
    folder = written()
    assert verify(folder) == []
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert verify(folder) == [shard.name]
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is missing or cut short: run 'skipdit encode' again"):
        LatentDataset(folder)


def test_unreadable_clips_are_left_out_or_stop(written, clips, capsys):
    whole = (clips / "B" / "clip0.mp4").read_bytes()
    first, last = whole.index(b"mdat") + 8, whole.index(b"moov") - 4
    (clips / "A" / "torn.mp4").write_bytes(whole[:first] + b"\0" * (last - first) + whole[last:])
    with pytest.raises(UserError, match="1 of 6 clips cannot be read.*torn.mp4"):
        written("strict")
    arguments = "data.arguments.max_bad_share=0.5"
    folder = written("lenient", arguments)
    index = json.loads((folder / "index.json").read_text())
    assert [entry["path"] for entry in index["unreadable"]] == ["A/torn.mp4"] and len(index["clips"]) == 5
    assert "torn.mp4 cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["dtype=half"], "dtype must be one of float16"),
        (["data.name=digits"], "cannot be encoded: choose clips or images"),
        (["frames_per_shard=0"], "frames_per_shard must be at least 1"),
        (["vae=nowhere"], "No autoencoder in nowhere"),
        (["data.arguments.root=nowhere"], "nowhere is not a folder"),
        (["data.precompute_latents=true"], "are for training"),
    ],
)
def test_mistakes_are_named_before_any_work(words, more, message):
    with pytest.raises(UserError, match=message):
        encode_data(load_config(EncodeConfig, None, words("out", *more)))


def test_other_settings_do_not_mix(written):
    folder = written()
    before = content(folder)
    with pytest.raises(UserError, match="holds latents of another flip, dtype: choose another output"):
        written("latents", "flip=false", "dtype=float16")
    assert content(folder) == before


def test_what_latents_cannot_give(written):
    folder = written("plain", "flip=false")
    with pytest.raises(UserError, match="holds no mirrored latents: set data.arguments.flip=false"):
        LatentDataset(folder)
    with pytest.raises(UserError, match="No clip in .* has 32 frames"):
        LatentDataset(folder, num_frames=16, frame_interval=2, flip=False)
    with pytest.raises(UserError, match="holds no complete latents"):
        LatentDataset(folder / "none")
    data = DataConfig(
        name="clips", latents=str(folder), arguments={"root": "x", "size": 32, "flip": False, "num_frames": 4}
    )
    with pytest.raises(UserError, match=r"holds latents of \(16, 16\), not of data.arguments.size=32"):
        build_data(data, Path())
    data.arguments = {"split": "list.txt", "flip": False}
    with pytest.raises(UserError, match="data.arguments.split cannot be applied to latents"):
        build_data(data, Path())


def test_weights_have_one_hash_however_they_are_stored():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    assert hash_weights(state) == hash_weights({"b": torch.ones(2, 2).half(), "a": torch.arange(4.0)})
    assert hash_weights(state) != hash_weights({**state, "a": torch.arange(4.0) + 1})
