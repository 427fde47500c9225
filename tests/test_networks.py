"""The feature networks: I3D against numpy, against another implementation and on real clips; Inception; bad files."""

import json
import os
import pickle
import zipfile
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import real

from skipdit.data.decoding import open_source
from skipdit.errors import UserError
from skipdit.evaluation.networks import load_detector
from skipdit.evaluation.networks.i3d import I3D, SameMaxPool, same_padding
from skipdit.evaluation.networks.inception import prepare, resize_as_tensorflow
from skipdit.evaluation.networks.weights import I3D_WEIGHTS, WeightFile, i3d_state_dict, read_arrays

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
# In the order of the network's outputs, which is alphabetical: the same in torchvision's table for its Kinetics
# models and in GluonCV's, and the real clips below agree.
KINETICS = (GOLDEN / "kinetics_400.txt").read_text().splitlines()
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the weights are TorchScript


def weights(name: str) -> Path:
    """A file of weights; the test is skipped where it is absent."""
    path = Path(os.environ.get("SKIPDIT_METRICS") or ROOT / "pretrained/metrics") / name
    if not path.is_file():
        fetch = f"python pretrained/download_ckpts.py metrics/{path.stem}"
        pytest.skip(f"needs {name}: fetch it with '{fetch}' or set SKIPDIT_METRICS")
    return path


@pytest.fixture(scope="module")
def i3d():
    return load_detector("i3d", weights("i3d-kinetics-400.ckpt"))


@pytest.fixture(scope="module")
def inception():
    return load_detector("inception", weights("inception-v3.pt"))


@pytest.fixture(scope="module")
def arrays():
    return read_arrays(weights("i3d-kinetics-400.ckpt").read_bytes())


def noise_clips(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


# ---------------------------------------------------------------------- I3D against numpy, layer by layer


def pad_as_tensorflow(x: np.ndarray, kernel, stride, value: float) -> np.ndarray:
    """[B, T, H, W, C] padded so that each axis gives ceil(size / stride) outputs; the odd one goes behind."""
    padding = [(0, 0)]
    for size, k, s in zip(x.shape[1:4], kernel, stride, strict=True):
        total = max((ceil(size / s) - 1) * s + k - size, 0)
        padding.append((total // 2, total - total // 2))
    return np.pad(x, [*padding, (0, 0)], constant_values=value)


def windows(x: np.ndarray, kernel, stride):
    """For each offset in the kernel: its index, and what all outputs see there."""
    outputs = [(size - k) // s + 1 for size, k, s in zip(x.shape[1:4], kernel, stride, strict=True)]
    for offset in np.ndindex(*kernel):
        cut = [slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, outputs, stride, strict=True)]
        yield offset, x[:, cut[0], cut[1], cut[2]]


def numpy_unit(arrays, layer: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
    """Convolution, batch norm and ReLU in float64 from the raw arrays, kernels in TensorFlow's order."""
    kernel = arrays[f"params/{layer}/Conv_0/kernel"].astype(np.float64)
    size, strides = kernel.shape[:3], (stride,) * 3
    x = sum(seen @ kernel[at] for at, seen in windows(pad_as_tensorflow(x, size, strides, 0), size, strides))
    mean, variance = (arrays[f"batch_stats/{layer}/BatchNorm_0/{name}"] for name in ("mean", "var"))
    return np.maximum((x - mean) / np.sqrt(variance + 0.001) + arrays[f"params/{layer}/BatchNorm_0/bias"], 0)


def numpy_pool(x: np.ndarray, kernel, stride) -> np.ndarray:
    return np.max([seen for _, seen in windows(pad_as_tensorflow(x, kernel, stride, -np.inf), kernel, stride)], axis=0)


def numpy_mixed(arrays, block: str, x: np.ndarray) -> np.ndarray:
    def unit(name, x):
        return numpy_unit(arrays, f"{block}/{name}", x)

    pooled = numpy_pool(x, (3, 3, 3), (1, 1, 1))
    branches = [
        unit("Branch_0/Conv3d_0a_1x1", x),
        unit("Branch_1/Conv3d_0b_3x3", unit("Branch_1/Conv3d_0a_1x1", x)),
        unit("Branch_2/Conv3d_0b_3x3", unit("Branch_2/Conv3d_0a_1x1", x)),
        unit("Branch_3/Conv3d_0b_1x1", pooled),
    ]
    return np.concatenate(branches, axis=-1)


def numpy_stem(arrays, x: np.ndarray) -> np.ndarray:
    x = numpy_unit(arrays, "Conv3d_1a_7x7", x, stride=2)
    x = numpy_pool(x, (1, 3, 3), (1, 2, 2))
    x = numpy_unit(arrays, "Conv3d_2c_3x3", numpy_unit(arrays, "Conv3d_2b_1x1", x))
    return numpy_pool(x, (1, 3, 3), (1, 2, 2))


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).float()


# Sizes that leave even and odd ones behind at every stage, so that both kinds of 'SAME' padding occur.
@pytest.mark.parametrize("size", [(9, 37, 30), (6, 26, 35)])
@torch.no_grad()
def test_stem_and_first_mixed_block_equal_numpy(i3d, arrays, size):
    clip = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3))
    expected = numpy_mixed(arrays, "Mixed_3b", numpy_stem(arrays, clip))
    assert expected.std() > 0.1
    actual = i3d.network.trunk[:6](channels_first(clip))
    torch.testing.assert_close(actual, channels_first(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_head_equals_numpy(i3d, arrays):
    deep = np.random.default_rng(0).uniform(0, 2, (2, 3, 7, 7, 1024))
    pooled = [deep[:, t : t + 2].mean(axis=(1, 2, 3)) for t in (0, 1)]
    kernel, bias = (arrays[f"params/Logits/Conv3d_0c_1x1/Conv_0/{name}"] for name in ("kernel", "bias"))
    expected = np.mean([x @ kernel[0, 0, 0].astype(np.float64) + bias for x in pooled], axis=0)
    actual = i3d.network.head(channels_first(deep))
    torch.testing.assert_close(actual, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "size, kernel, stride, expected",
    [
        (224, 7, 2, (2, 3)),
        (9, 7, 2, (3, 3)),
        (112, 3, 2, (0, 1)),
        (5, 3, 2, (1, 1)),
        (7, 2, 2, (0, 1)),
        (8, 2, 2, (0, 0)),
        (5, 3, 1, (1, 1)),
        (4, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


def test_max_pooling_never_picks_the_padding():
    pool = SameMaxPool((1, 3, 3), (1, 2, 2))
    pooled = pool(-1 - torch.arange(16.0).reshape(1, 1, 1, 4, 4))  # all negative: a zero of the padding would win
    assert pooled.flatten().tolist() == [-1, -3, -9, -11]


# ---------------------------------------------------------------------- the whole network


def wave(frames: int) -> torch.Tensor:
    """The clip of record_i3d_logits.py: float32 [1, 3, T, 224, 224]."""
    t, y, x, c = np.ogrid[:frames, :224, :224, :3]
    clip = 0.6 * np.sin(0.05 * x + 0.3 * t + c) + 0.4 * np.cos(0.11 * y - 0.2 * t + 2 * c + 0.0007 * x * y)
    return channels_first(clip[None])


# Recorded once by record_i3d_logits.py: written for JAX from the paper, sharing no code with skipdit.
@pytest.mark.parametrize("frames", [9, 16, 25])
@torch.no_grad()
def test_logits_equal_another_implementation(i3d, frames):
    expected = torch.tensor(json.loads((GOLDEN / "i3d_logits.json").read_text())["logits"][str(frames)])
    actual = i3d.network(wave(frames))[0]
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# Names of Kinetics for what these clips of UCF101 show.
SPORTS = {
    "HorseRiding/v_HorseRiding_g01_c03.mp4": "riding or walking with horse",
    "IceDancing/v_IceDancing_g02_c05.mp4": "ice skating",
    "Rowing/v_Rowing_g16_c03.avi": "canoeing or kayaking",
}


@pytest.fixture(scope="module")
def seen(i3d):
    """Real clips as the network was trained, 64 frames in a row and the middle square.

    Returns their probabilities and, for the first convolution of each block, what each clip's outputs are before
    ReLU: mean and deviation per channel.
    """
    moments: dict[str, list] = {}

    def watch(name):
        def hook(unit, inputs):
            outputs = torch.nn.functional.conv3d(inputs[0], unit.weight, unit.bias)
            moments.setdefault(name, []).append((outputs.mean((0, 2, 3, 4)), outputs.std((0, 2, 3, 4))))

        return hook

    named = i3d.network.trunk.named_children()
    units = {f"{name}/Branch_0/Conv3d_0a_1x1": block.Branch_0[0] for name, block in named if "Mixed" in name}
    hooks = [unit.register_forward_pre_hook(watch(name)) for name, unit in units.items()]
    probabilities = {}
    for clip in SPORTS:
        source = open_source(real("data/UCF101") / clip)
        start = (len(source) - 64) // 2
        frames = torch.from_numpy(source.read(range(start, start + 64)))
        height, width = frames.shape[1:3]
        square = frames[:, :, (width - height) // 2 :][:, :, :height]
        probabilities[clip] = i3d.class_probabilities(square[None])[0]
    for hook in hooks:
        hook.remove()
    return probabilities, moments


@pytest.mark.parametrize("clip", SPORTS, ids=lambda clip: clip.split("/")[0])
def test_real_clips_are_named(seen, clip):
    probabilities = seen[0][clip]
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert KINETICS[probabilities.argmax()] == SPORTS[clip]
    assert probabilities.max() > 0.5


def test_activations_on_real_clips_have_the_moments_of_training(seen, arrays):
    """A layer that is wrong (order, padding, scale of the input) leaves the statistics that batch norm recorded."""
    assert len(seen[1]) == 9
    for name, moments in seen[1].items():
        mean, deviation = (torch.stack(values).mean(0) for values in zip(*moments, strict=True))
        shift = torch.from_numpy(arrays[f"params/{name}/BatchNorm_0/bias"])
        assert (mean - shift).mean().abs() < 0.15, name
        assert 0.8 < deviation.median() < 1.2, name


def test_the_400_names_are_in_order():
    assert len(set(KINETICS)) == 400
    assert sorted(KINETICS) == KINETICS


# ---------------------------------------------------------------------- detectors


def test_i3d_features_repeat_and_do_not_depend_on_the_batch(i3d):
    clips = noise_clips(2, 9, 40, 60)
    together = i3d.features(clips)
    assert together.shape == (2, i3d.dim) == (2, 400)
    assert together.dtype == torch.float32
    torch.testing.assert_close(i3d.features(clips[1:])[0], together[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(i3d.features(clips), together)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_features_do_not_depend_on_the_callers_settings(i3d):
    clips = noise_clips(1, 9, 32, 32)
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        inside = i3d.features(clips)
    assert torch.equal(inside, i3d.features(clips))
    assert torch.backends.cudnn.allow_tf32 == before


@torch.no_grad()
def test_i3d_resizes_and_scales_as_the_protocol_says(i3d):
    ramp = torch.arange(0, 224, 2, dtype=torch.uint8)  # 112 wide: twice as wide halves the steps
    prepared = i3d.prepare(ramp.reshape(1, 1, 1, 112, 1).expand(2, 9, 112, 112, 3))
    assert prepared.shape == (2, 3, 9, 224, 224)
    pixels = (torch.arange(224.0) - 0.5).clamp(0, 222)  # half-pixel centres, edges repeated
    torch.testing.assert_close(prepared[1, 2, 8, 100], pixels / 127.5 - 1)
    kept = i3d.prepare(torch.full((1, 9, 224, 224, 3), 255, dtype=torch.uint8))
    assert kept.unique().tolist() == [1]


def test_fingerprints_tell_detectors_apart(i3d, inception):
    half = load_detector("i3d", weights("i3d-kinetics-400.ckpt"), dtype=torch.bfloat16)
    same = load_detector("i3d", weights("i3d-kinetics-400.ckpt"))
    assert same.fingerprint == i3d.fingerprint
    assert len({i3d.fingerprint, half.fingerprint, inception.fingerprint}) == 3
    assert all(len(detector.fingerprint) == 64 for detector in (i3d, half, inception))
    assert (i3d.name, i3d.minimum_frames) == ("i3d", 9)
    assert (inception.name, inception.dim, inception.minimum_frames) == ("inception", 2048, 1)


def test_bad_batches_are_refused_in_a_sentence(i3d, inception):
    with pytest.raises(UserError, match="at least 9 frames, these have 8"):
        i3d.features(noise_clips(1, 8, 32, 32))
    with pytest.raises(ValueError, match="takes uint8"):
        i3d.features(torch.zeros(1, 9, 32, 32, 3))
    with pytest.raises(ValueError, match=r"not torch.uint8 \[1, 3, 9, 32, 32\]"):
        i3d.features(torch.zeros(1, 3, 9, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"inception takes uint8 \[B, H, W, 3\]"):
        inception.features(noise_clips(1, 9, 32, 32))
    with pytest.raises(ValueError, match="does not classify"):
        inception.class_probabilities(noise_clips(1, 32, 32))
    with pytest.raises(ValueError, match="T >= 9"):
        I3D()(torch.zeros(1, 3, 8, 224, 224))


# ---------------------------------------------------------------------- Inception


def test_resize_equals_tensorflows_rule():
    images = torch.rand(2, 3, 5, 8, dtype=torch.float64)
    resized = resize_as_tensorflow(images, 7)
    for i, j in np.ndindex(7, 7):
        y, x = i * 5 / 7, j * 8 / 7
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 7)
        upper = images[:, :, top, left] * (1 - x + left) + images[:, :, top, right] * (x - left)
        lower = images[:, :, bottom, left] * (1 - x + left) + images[:, :, bottom, right] * (x - left)
        torch.testing.assert_close(resized[:, :, i, j], upper * (1 - y + top) + lower * (y - top))


def test_prepared_pictures_span_the_range_of_2015():
    picture = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 299, 299, 3)
    assert [float(x.unique()) for x in prepare(picture)] == [-1, 0, 127 / 128]


def test_inception_features_repeat_and_do_not_depend_on_the_batch(inception):
    pictures = noise_clips(2, 48, 64)
    together = inception.features(pictures)
    assert together.shape == (2, 2048)
    assert together.min() >= 0  # an average behind ReLU
    assert torch.equal(inception.features(pictures), together)
    alone = torch.cat([inception.features(picture[None]) for picture in pictures])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_real_pictures_have_the_moments_of_training(inception):
    """The first convolution gives what batch norm recorded in 2015, which another range of the input would not."""
    clips = sorted(real("data/UCF101").rglob("v_*"))
    frames = [torch.from_numpy(open_source(clip).read([40])[0, :240, :320]) for clip in clips]
    first = inception.network.net.layers.conv
    outputs = torch.nn.functional.conv2d(prepare(torch.stack(frames)), first.weight, stride=2)
    spread = first.var.sqrt()
    offset = (outputs.mean((0, 2, 3)) - first.mean) / spread
    assert offset.abs().max() < 0.6
    assert offset.mean().abs() < 0.1
    assert 0.7 < (outputs.std((0, 2, 3)) / spread).median() < 1.3


# ---------------------------------------------------------------------- files


def test_every_array_is_used_once(arrays):
    assert len(arrays) == 230  # 57 x (kernel, shift, mean, variance), then kernel and bias of the logits
    state = i3d_state_dict(arrays)
    assert state.keys() == I3D().state_dict().keys()
    assert len(state) == 116
    with pytest.raises(ValueError, match="1 arrays left over, the first is params/More/BatchNorm_0/bias"):
        i3d_state_dict({**arrays, "params/More/BatchNorm_0/bias": np.zeros(3)})
    name = "batch_stats/Mixed_4c/Branch_1/Conv3d_0b_3x3/BatchNorm_0/var"
    with pytest.raises(ValueError, match=f"no array {name}"):
        i3d_state_dict({key: value for key, value in arrays.items() if key != name})


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path):
    trap = tmp_path / "sprung"
    for content in (Malicious(trap), {"params": Malicious(trap)}, {"a": np.array([Malicious(trap)], dtype=object)}):
        with pytest.raises(ValueError, match="not a pickle of arrays .it asks for pathlib"):
            read_arrays(pickle.dumps(content))
    assert not trap.exists()


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a pickle of arrays"),
        (b"hello", "not a pickle of arrays"),
        (b"\x80\x04", "not a pickle of arrays"),
        (pickle.dumps([ONE]), "not a dict of arrays but list"),
        (pickle.dumps({"a": np.arange(3)}), "a is no float32 array"),
        (pickle.dumps({"a": {"b": ONE}, "a/b": ONE}), "a/b is there twice"),
    ],
)
def test_what_is_no_pickle_of_arrays_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_arrays(content)


def test_arrays_of_either_numpy_are_read():
    content = pickle.dumps({"a": {"b": np.ones((2, 3), np.float32)}}, protocol=4)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    for name in (old, new):
        renamed = content
        for other in (old, new):
            renamed = renamed.replace(bytes([0x8C, len(other)]) + other, bytes([0x8C, len(name)]) + name)
        renamed = renamed.replace(b"\x95" + content[3:11], b"")  # the frame's length, which is optional
        assert read_arrays(renamed)["a/b"].tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("name, known", [("i3d", "i3d-kinetics-400"), ("inception", "inception-v3")])
def test_missing_and_changed_files_are_refused_in_a_sentence(name, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = f"'python pretrained/download_ckpts.py metrics/{known}'"
    with pytest.raises(UserError, match=f"^No weights at pretrained/metrics/{known}[^ ]*: fetch them with {command}.$"):
        load_detector(name)
    changed = tmp_path / "changed"
    for content in (b"", b"<html>Not found</html>", pickle.dumps({"params": np.ones(3, np.float32)})):
        changed.write_bytes(content)
        with pytest.raises(UserError, match=f"^.* is not metrics/{known} .its SHA-256 .*fetch it with {command}.$"):
            load_detector(name, changed)
    with pytest.raises(UserError, match="Cannot read the weights .* .Is a directory"):
        load_detector(name, tmp_path)


def test_unknown_detectors_are_refused():
    with pytest.raises(UserError, match="no detector 'i4d': choose i3d or inception"):
        load_detector("i4d")


# ---------------------------------------------------------------------- StyleGAN-V's file


class Scripted(torch.nn.Module):
    """Stands for StyleGAN-V's file: its signature, but the mean of each clip as the logits of class 7."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert return_features and not rescale and not resize
        logits = torch.zeros(x.shape[0], 400)
        logits[:, 7] = x.mean(dim=(1, 2, 3, 4))
        return logits


class Other(torch.nn.Module):
    def forward(self, x):
        return x


def test_torchscript_of_stylegan_v_is_told_by_its_content(tmp_path):
    path = tmp_path / "file.ckpt"  # whatever it is called
    torch.jit.script(Scripted()).save(path)
    assert WeightFile(I3D_WEIGHTS, path).is_script
    detector = load_detector("i3d", path)
    clips = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1, 1).expand(3, 9, 20, 30, 3)
    features = detector.features(clips)
    torch.testing.assert_close(features[:, 7], torch.tensor([-1.0, -0.6, 1.0]))
    assert features.count_nonzero() == 3


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.jit.script(Other()).save(path)
    with pytest.raises(UserError, match="TorchScript, but not the I3D of StyleGAN-V"):
        load_detector("i3d", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/code/__torch__.py", "class")
    with pytest.raises(UserError, match="cannot be loaded as TorchScript"):
        load_detector("i3d", path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="is not metrics/i3d-kinetics-400"):
        load_detector("i3d", path)
