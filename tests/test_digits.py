"""The moving digits, and the classifier that reads them."""

import pytest
import torch
from torch.utils.data import DataLoader

from skipdit.data import DIGIT_NAMES, MovingDigits
from skipdit.data.digits import digit_images
from skipdit.evaluation.digits import NO_DIGIT, DigitClassifier, generated_accuracy


def ink(clip: torch.Tensor) -> torch.Tensor:
    """Returns the ink [T, H, W] in [0, 1] of a clip [T, 3, H, W] in [-1, 1]."""
    return (clip[:, 0] + 1) / 2


def centers(clip: torch.Tensor) -> torch.Tensor:
    """Returns the centre of mass (y, x) of each frame in pixels, [T, 2]."""
    frames = ink(clip).double()
    mass = frames.sum((1, 2))
    y, x = (torch.arange(n, dtype=torch.float64) for n in frames.shape[1:])
    return torch.stack([frames.sum(2) @ y / mass, frames.sum(1) @ x / mass], 1)


def test_item_is_a_clip_in_range_with_three_equal_channels():
    item = MovingDigits(length=3)[1]
    video = item["video"]
    assert video.shape == (16, 3, 32, 32) and video.dtype == torch.float32 and video.is_contiguous()
    assert video.min() == -1 and 0.9 < video.max() <= 1
    assert torch.equal(video[:, 0], video[:, 1]) and torch.equal(video[:, 0], video[:, 2])
    assert type(item["class_label"]) is int and DIGIT_NAMES[item["class_label"]]


def test_items_depend_on_seed_and_index_alone():
    digits = MovingDigits(length=8, num_frames=4, seed=7)
    backwards = [digits[i] for i in reversed(range(8))][::-1]
    for workers in (0, 2):
        (batch,) = DataLoader(digits, batch_size=8, num_workers=workers)
        assert torch.equal(batch["video"], torch.stack([item["video"] for item in backwards]))
        assert batch["class_label"].tolist() == [item["class_label"] for item in backwards]
    assert torch.equal(MovingDigits(length=99, num_frames=9, seed=7)[5]["video"][:4], digits[5]["video"])
    assert not torch.equal(MovingDigits(length=8, num_frames=4, seed=8)[5]["video"], digits[5]["video"])
    assert torch.equal(digits[-1]["video"], digits[7]["video"])
    assert len(list(digits)) == 8


@pytest.mark.parametrize(("size", "digit_size"), [(32, None), ((24, 40), 18), (20, 20), (64, 50)])
def test_the_whole_digit_stays_on_the_canvas(size, digit_size):
    # Where ink left the canvas, frames of a clip would lose some against the others.
    for item in MovingDigits(length=20, size=size, digit_size=digit_size, num_frames=40):
        mass = ink(item["video"]).sum((1, 2))
        assert (mass / mass.mean() - 1).abs().max() < 0.01


def test_speed_is_constant_between_bounces():
    # Sub-pixel interpolation clips its overshoot, so a centre is off by up to some hundredths of a pixel.
    for item in MovingDigits(length=30, speed=(1.0, 1.0)):
        steps = centers(item["video"]).diff(dim=0).abs()
        speed = steps.median(0).values
        assert speed.norm() == pytest.approx(1, abs=0.05)
        off = (steps - speed).abs() > 0.1
        assert off.sum(0).max() <= 2  # 15 pixels at most, in 12 of free space: two bounces on an axis
        assert (steps <= speed + 0.1).all()


def test_digit_bounces_off_every_wall():
    # With no room across, the motion is along one axis: the digit turns round at 0 and at 12 pixels.
    video = MovingDigits(length=1, size=(20, 32), digit_size=20, num_frames=200, speed=(1.5, 1.5))[0]["video"]
    path = centers(video)
    assert path[:, 0].max() - path[:, 0].min() < 0.05
    assert path[:, 1].max() - path[:, 1].min() == pytest.approx(12, abs=1.0)


def test_classes_are_balanced():
    digits = MovingDigits(length=4000, num_frames=1)
    counts = torch.bincount(torch.tensor([item["class_label"] for item in digits]), minlength=10)
    assert counts.sum() == 4000
    assert ((counts - 400).abs() < 4 * (4000 * 0.1 * 0.9) ** 0.5).all()  # four standard deviations


def test_splits_share_no_handwriting():
    train, test = ({image.tobytes() for group in digit_images(s) for image in group} for s in ("train", "test"))
    assert not train & test
    sizes = [sum(map(len, digit_images(split))) for split in ("train", "test")]
    assert sum(sizes) == 1797 and sizes[1] == pytest.approx(1797 / 5, abs=10)
    pair = (MovingDigits(length=1, split=split)[0]["video"] for split in ("train", "test"))
    assert not torch.equal(*pair)


@pytest.mark.parametrize(("size", "frames"), [((16, 48), 1), ((48, 16), 5), (8, 2), (96, 3)])
def test_any_size_and_length(size, frames):
    digits = MovingDigits(length=2, size=size, num_frames=frames)
    height, width = (size, size) if isinstance(size, int) else size
    assert digits[0]["video"].shape == (frames, 3, height, width)
    assert ink(digits[0]["video"]).max() > 0.4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"length": -1}, "length"),
        ({"seed": -1}, "seed"),
        ({"size": 4}, "height"),
        ({"size": (32, 32, 32)}, "size"),
        ({"split": "val"}, "split"),
        ({"digit_size": 33}, "digit_size"),
        ({"speed": (2, 1)}, "speed"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=f"^{word} must be"):
        MovingDigits(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="no item 3"):
        MovingDigits(length=3)[3]


def real_clips(count: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    digits = MovingDigits(length=count, num_frames=4, split="test", seed=seed)
    batch = next(iter(DataLoader(digits, batch_size=count)))
    return (batch["video"] + 1) / 2, batch["class_label"]


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return DigitClassifier.fit_on_real()


def test_classifier_reads_unseen_handwriting(classifier):
    clips, labels = real_clips(400)
    assert classifier.predict(clips).dtype == torch.int64
    assert classifier.accuracy(clips, labels) >= 0.97
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert classifier.accuracy(clips, shuffled) == pytest.approx(0.1, abs=0.05)


def test_classifier_reads_each_clip_alone_and_bytes_as_well(classifier):
    clips, _ = real_clips(12)
    together = classifier.predict(clips)
    assert together.tolist() == [classifier.predict(clip[None]).item() for clip in clips]
    assert torch.equal(classifier.predict((clips * 255).round().byte()), together)


def test_classifier_is_deterministic():
    clips, _ = real_clips(50)
    first, second = (DigitClassifier.fit_on_real(num_examples=300, seed=1).predict(clips) for _ in range(2))
    assert torch.equal(first, second)


def test_blank_clips_are_no_digit(classifier):
    clips, labels = real_clips(2)
    clips[0] = 0
    clips[1, 0] = 0  # one blank frame among four does not hide the digit
    assert classifier.predict(clips)[0] == NO_DIGIT
    assert classifier.predict(clips)[1] == labels[1]
    assert classifier.predict(clips[:0]).shape == (0,)


def test_classifier_refuses_what_it_cannot_read(classifier):
    clips, _ = real_clips(1)
    for bad in (clips[0], clips[..., :16], clips * 2 - 1, clips * float("nan")):
        with pytest.raises(ValueError, match="Clips must be"):
            classifier.predict(bad)


def test_generated_accuracy_overall_and_by_class():
    clips, labels = real_clips(60)
    clips[labels == 4] = 0
    result = generated_accuracy(clips, labels)
    assert result["clips"] == 60
    assert result["per_class"]["four"] == 0
    assert result["per_class"]["zero"] == 1
    share = [(labels == i).double().mean().item() * result["per_class"][DIGIT_NAMES[i]] for i in range(10)]
    assert result["accuracy"] == pytest.approx(sum(share))
    with pytest.raises(ValueError, match="One label for each clip"):
        generated_accuracy(clips, labels[:3])
