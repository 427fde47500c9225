"""PSNR and SSIM against closed forms."""

import math

import pytest
import torch

from skipdit.errors import UserError
from skipdit.evaluation.fidelity import fidelity, lpips, psnr, ssim, temporal_consistency


def test_psnr_of_a_constant_error_is_its_decibels():
    clips = torch.zeros(3, 4, 3, 8, 8)
    errors = torch.tensor([0.1, 0.01, 0.5])
    found = psnr(clips + errors[:, None, None, None, None], clips)
    torch.testing.assert_close(found, -20 * torch.log10(errors), atol=1e-4, rtol=0)


@pytest.mark.parametrize("data_range", [2.0, 255.0])
def test_both_know_the_data_range(data_range):
    clips, others = torch.rand(2, 2, 3, 16, 16), torch.rand(2, 2, 3, 16, 16)
    for metric in (psnr, ssim):
        scaled = metric(clips * data_range, others * data_range, data_range=data_range)
        torch.testing.assert_close(scaled, metric(clips, others), atol=1e-4, rtol=1e-4)


def test_psnr_is_over_all_frames_of_a_clip():
    """An error e in one of four frames: MSE e^2 / 4, so 20 log10(2 / e)."""
    clips = torch.zeros(1, 4, 3, 8, 8)
    others = clips.clone()
    others[:, 2] = 0.2
    assert psnr(clips, others).item() == pytest.approx(20 * math.log10(2 / 0.2), abs=1e-4)


def test_equal_clips():
    clips = torch.rand(2, 3, 3, 16, 16)
    assert psnr(clips, clips).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(clips, clips), torch.ones(2))


def test_ssim_of_constant_frames_is_the_luminance_term():
    """Without variance SSIM = (2ab + C1) / (a^2 + b^2 + C1) with C1 = 0.01^2; a clip has its frames' mean."""
    a, b = 0.3, 0.7
    clips = torch.full((1, 2, 3, 16, 16), a)
    others = clips.clone()
    others[:, 1] = b
    luminance = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(clips, others).item() == pytest.approx((1 + luminance) / 2, abs=1e-6)


def test_pictures_are_clips_of_one_frame():
    pictures, others = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(pictures, others), metric(pictures[:, None], others[:, None]))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        psnr(torch.rand(1, 3, 16, 16), torch.rand(2, 3, 16, 16))


def test_temporal_consistency_is_one_for_a_still_and_that_of_neighbours_else():
    still = torch.rand(1, 1, 3, 16, 16).expand(1, 4, 3, 16, 16)
    assert temporal_consistency(still).item() == pytest.approx(1)
    clips = torch.rand(1, 3, 3, 16, 16)
    pairs = [ssim(clips[:, i], clips[:, i + 1]).item() for i in range(2)]
    assert temporal_consistency(clips).item() == pytest.approx(sum(pairs) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="no two frames"):
        temporal_consistency(clips[:, :1])


def test_fidelity_gives_what_is_asked_for():
    clips, others = torch.rand(2, 3, 3, 16, 16), torch.rand(2, 3, 3, 16, 16)
    found = fidelity(clips, others, ["psnr", "temporal"])
    assert set(found) == {"psnr", "temporal", "temporal_real"}
    assert torch.equal(found["temporal_real"], temporal_consistency(others))


def test_lpips_says_what_it_needs():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install torchvision"):
            lpips(torch.rand(1, 2, 3, 64, 64), torch.rand(1, 2, 3, 64, 64))
    else:
        pytest.skip("torchvision is here; its weights may not be")
