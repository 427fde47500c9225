"""Latents written ahead: the same numbers as encoding on the way, whole after any interruption."""

import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from real_data import real
from safetensors import safe_open

from skipdit.config import load_config
from skipdit.data import ClipDataset, ImageDataset, LatentDataset
from skipdit.data.clips import Entry
from skipdit.data.latents import hash_weights, verify
from skipdit.errors import UserError
from skipdit.training.build import build_model, check_fit, load_vae
from skipdit.training.config import DataConfig, ModelConfig
from skipdit.training.data import build_data, encode
from skipdit.training.encoding import EncodeConfig, _check_room, encode_data
from skipdit.training.shards import Encoder, plan_batches, plan_shards

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


def picture(number: int) -> Image.Image:
    """A ramp of 32x32 pixels, unlike its mirror image, that moves with its number."""
    rows, columns = np.mgrid[:32, :32]
    return Image.fromarray(np.stack([columns * 8, rows * 8, (columns + 5 * number) % 32 * 8], -1).astype(np.uint8))


def write_clip(path: Path, frames: int, first: int) -> None:
    """A video, or without a suffix a folder of frames."""
    if not path.suffix:
        path.mkdir(parents=True)
        for number in range(frames):
            picture(first + number).save(path / f"frames_{number}.png")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(first + number))))
        container.mux(stream.encode(None))


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two classes: videos and folders of frames, of different lengths."""
    root = tmp_path / "clips"
    for number, frames in enumerate(FRAMES):
        write_clip(root / ("A" if number % 2 else "B") / f"clip{number}{'' if number > 2 else '.mp4'}", frames, number)
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


def test_clips_too_short_for_an_item_are_named_and_counted(written, caplog):
    with caplog.at_level(logging.WARNING, "skipdit.data"):
        latents = LatentDataset(written(), num_frames=4, frame_interval=2)
    ((path, reason),) = latents.rejected
    assert reason == "too short, 3 of 8 frames"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is left out: {reason}",
        "1 of 5 clips are left out.",
    ]


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
            mirrored = encode(vae, theirs["video"][None].flip(-1), 100)[0][0]
            assert (ours["mean"] - mirrored).abs().max() > 0.01  # so that a wrong flip would be seen
            flips.add(bool(theirs["video"][0, 0, 0, 0] > theirs["video"][0, 0, 0, -1]))
    assert flips == {True, False}


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
            picture(number).save(tmp_path / "set" / name / f"{number}.png")
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


def test_real_clips_through_a_published_autoencoder(tmp_path):
    root, vae = real("data/UCF101"), real("weights/taesd")
    arguments = f"{{root: {root}, num_frames: 1, size: 32, max_bad_share: 1.0}}"
    words = [f"vae={vae}", f"output={tmp_path / 'out'}", f"data.arguments={arguments}", "frames_per_shard=400"]
    only = tmp_path / "list.txt"
    only.write_text("\n".join(path.relative_to(root).as_posix() for path in sorted(root.rglob("v_*"))[:2]))
    words += [f"data.arguments.split={only}", "data.num_workers=0", "dtype=float32"]
    latents = LatentDataset(encode_data(load_config(EncodeConfig, None, words)), frame_interval=3)
    videos = ClipDataset(root, frame_interval=3, size=32, split=only, max_bad_share=1)
    assert [entry.frames for entry in latents.entries] == [entry.frames for entry in videos.entries]
    for index in range(len(videos)):
        ours, theirs = latents.item(index, 7), videos.item(index, 7)
        mean, _ = encode(load_vae(str(vae)), theirs["video"][None], 16)
        torch.testing.assert_close(ours["mean"], mean[0], atol=1e-4, rtol=1e-4)
        assert ours["class_label"] == theirs["class_label"]


def test_shards_and_batches_depend_on_the_clips_alone(clips):
    data = ClipDataset(clips, num_frames=1, size=16)
    assert [entry.frames for entry in data.entries] == [17, 12, 24, 9, 3]
    assert [indices for _, indices in plan_shards(data, 36)] == [[0, 1], [2, 3, 4]]
    assert [indices for _, indices in plan_shards(data, 1)] == [[0], [1], [2], [3], [4]]
    batches = list(plan_batches(data, [3, 4], 7))
    assert batches == [[(3, 0, 7)], [(3, 7, 9), (4, 0, 3)]]


def test_a_shard_is_few_tensors_of_one_row_a_frame(written):
    """A tensor for each of a million pictures would be read again by every worker."""
    folder = written()
    index = json.loads((folder / "index.json").read_text())
    for name in index["shards"]:
        frames = sum(clip["frames"] for clip in index["clips"] if clip["shard"] == name)
        with safe_open(folder / name, "pt") as shard:
            assert sorted(shard.keys()) == ["flip.mean", "flip.std", "mean", "std"]
            assert all(shard.get_slice(part).get_shape() == [frames, 4, 8, 8] for part in shard.keys())


def command(words: list[str]) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return {"args": [sys.executable, "-m", "skipdit", "encode", *words], "env": environment}


def test_a_killed_call_continues_to_the_same_files(words, written, tmp_path):
    """Killed while each of the first shards is being written."""
    whole, folder = content(written("whole")), tmp_path / "killed"
    for number in range(3):
        running = subprocess.Popen(**command(words("killed")), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and not list(folder.glob(f"*latents-{number:05d}.*")):
            time.sleep(0.0005)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
        assert not (folder / "index.json").exists()
        with pytest.raises(UserError, match="holds no complete latents"):
            LatentDataset(folder)
    written("killed")
    assert content(folder) == whole
    assert not list(folder.glob(".latents-*"))


@pytest.mark.parametrize("left", ["shard", "list", "half", "cut", "index"])
def test_whatever_a_kill_leaves_is_completed(left, written):
    folder = written()
    whole = content(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    if left == "shard":
        shard.with_suffix(".json").unlink()
    if left == "list":
        shard.unlink()
    if left == "cut":
        os.truncate(shard, 100)
    if left == "half":
        shard.unlink()
        (folder / f".{shard.name}.abcd_123").mkdir()
        (folder / f".{shard.name}.abcd_123" / shard.name).write_bytes(b"half")
    if left != "cut":
        (folder / "index.json").unlink()
    others = {path: path.stat().st_ino for path in folder.glob("*.safetensors") if path != shard}
    written()
    assert content(folder) == whole
    assert all(path.stat().st_ino == inode for path, inode in others.items()), "a finished shard was written again"
    assert not [path.name for path in folder.iterdir() if path.is_dir()]


def test_a_full_disk_leaves_nothing_half_written(words, written, tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (75_000, 75_000))  # bytes of a file; some shards are larger

    whole = content(written("whole"))
    done = subprocess.run(**command(words("out")), preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr and "finished shards are kept; make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(data == whole[name] for name, data in content(tmp_path / "out").items())
    assert not list((tmp_path / "out").glob(".latents-*"))
    written("out")
    assert content(tmp_path / "out") == whole


def test_too_little_room_is_told_before_any_work(clips, vae_folder, tmp_path):
    data = ClipDataset(clips, num_frames=1, size=16)
    data.entries = [Entry(entry.path, entry.class_label, 10**12) for entry in data.entries]
    encoder = Encoder(data, load_vae(str(vae_folder)), tmp_path, torch.float16, True, 7, 0)
    assert encoder.bytes_of_frame() == 4 * 8 * 8 * 2 * 2 * 2
    with pytest.raises(UserError, match="still to be written take 1.02e\\+07 GB, and .* GB free: choose an output"):
        _check_room(tmp_path, encoder, plan_shards(data, 20))


def test_one_call_a_folder(written):
    folder = written()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another skipdit encode is writing to"):
            written()
    written()


def test_latents_that_a_dtype_cannot_hold_are_refused(words, vae_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.quant_conv.weight.data *= 1e7
    vae.save_pretrained(tmp_path / "loud")
    loud = words("out", f"vae={tmp_path / 'loud'}")
    with pytest.raises(UserError, match="are not finite in float16: set dtype=float32"):
        encode_data(load_config(EncodeConfig, None, [*loud, "dtype=float16"]))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    encode_data(load_config(EncodeConfig, None, [*loud, "dtype=float32"]))  # the same folder, as nothing is in it yet


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


def test_unreadable_clips_are_left_out_or_stop_and_are_tried_again(written, clips, capsys):
    whole = (clips / "B" / "clip0.mp4").read_bytes()
    first, last = whole.index(b"mdat") + 8, whole.index(b"moov") - 4
    torn = clips / "A" / "torn.mp4"
    torn.write_bytes(whole[:first] + b"\0" * (last - first) + whole[last:])
    with pytest.raises(UserError, match="1 of 6 clips cannot be read.*torn.mp4.*then run the same command again"):
        written("out")
    folder = written("out", "data.arguments.max_bad_share=0.5")
    index = json.loads((folder / "index.json").read_text())
    assert [entry["path"] for entry in index["unreadable"]] == ["A/torn.mp4"] and len(index["clips"]) == 5
    assert len(LatentDataset(folder, num_frames=1)) == 5
    assert capsys.readouterr().out.count("torn.mp4 cannot be read") == 2  # once a call
    torn.write_bytes(whole)
    written("out")
    assert content(folder) == content(written("clean"))
    assert len(LatentDataset(folder, num_frames=1)) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["dtype=half"], "dtype must be one of float16"),
        (["data.name=digits"], "cannot be encoded: choose clips or images"),
        (["frames_per_shard=0"], "frames_per_shard must be at least 1"),
        (["vae=nowhere"], "No autoencoder in nowhere"),
        (["data.arguments.root=nowhere"], "nowhere is not a folder"),
        (["data.precompute_latents=true"], "are for training"),
        (["data.arguments.flip=false"], "data.arguments.flip is drawn in training: set flip="),
        (["data.arguments.images=8"], "data.arguments.images is for training: leave it out here"),
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


def test_training_refuses_latents_of_another_autoencoder(written, clips, vae_folder, tmp_path):
    sizes = {"sample_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_frames": 4, "num_classes": 2}
    model = build_model(ModelConfig("Latte", sizes))
    data = DataConfig(
        name="clips", latents=str(written()), arguments={"root": str(clips), "num_frames": 4, "images": 2}
    )
    latents, names = build_data(data, tmp_path)
    vae = load_vae(str(vae_folder))
    check_fit(model, vae, latents, names, data, "the same")
    vae.quant_conv.weight.data[0] += 1e-3
    with pytest.raises(UserError, match="was written by another autoencoder than vae=other: set vae to that one"):
        check_fit(model, vae, latents, names, data, "other")


def test_weights_have_one_hash_however_they_are_stored():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    assert hash_weights(state) == hash_weights({"b": torch.ones(2, 2).half(), "a": torch.arange(4.0)})
    assert hash_weights(state) != hash_weights({**state, "a": torch.arange(4.0) + 1})
