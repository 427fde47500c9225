"""Statistics and metrics against closed forms, other arithmetic and invariants."""

import math

import pytest
import scipy.linalg
import torch

from skipdit.errors import UserError
from skipdit.evaluation.metrics import (
    expected_floor,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from skipdit.evaluation.statistics import FeatureStatistics, Moments, load_statistics, save_statistics


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 100) -> Moments:
    return Moments(count, mean.double(), covariance.double() * (count - 1))


def some_covariance(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    factor = torch.randn(dim, rank or dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


# ---------------------------------------------------------------------- statistics


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_moments_are_those_of_the_whole_set_whatever_the_batches(batch):
    values = torch.randn(50, 6) * torch.arange(1, 7) + 1e4  # far from zero: sums of squares would lose all digits
    moments = Moments.empty(6)
    for part in values.split(batch):
        moments.update(part)
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, values.double().mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, values.double().T.cov(), rtol=1e-9, atol=1e-9)


def test_moments_of_two_processes_merge():
    values = torch.randn(40, 5)
    whole, first, second = Moments.of(values), Moments.of(values[:13]), Moments.of(values[13:])
    first.merge(second)
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.covariance, whole.covariance)
    empty = Moments.empty(5)
    empty.merge(whole)
    assert torch.equal(empty.mean, whole.mean)


def test_a_covariance_needs_two_vectors():
    with pytest.raises(ValueError, match="at least 2"):
        _ = Moments.of(torch.randn(1, 3)).covariance


@pytest.mark.parametrize("batch", [1, 4, 12])
def test_kept_features_are_a_bounded_random_choice_and_the_moments_are_of_all(batch):
    gathered = FeatureStatistics.empty(1, keep=5)
    for part in torch.arange(12.0)[:, None].split(batch):
        gathered.update(part)
    kept = gathered.features[:, 0].tolist()
    assert gathered.moments.count == 12 and len(set(kept)) == 5
    if batch == 1:
        assert kept != [0, 1, 2, 3, 4]
    assert gathered.moments.mean.item() == 5.5


def test_late_samples_are_as_likely_to_be_kept_as_early_ones():
    gathered = FeatureStatistics.empty(1, keep=500)
    gathered.update(torch.arange(2000.0)[:, None])
    share = (gathered.features < 1000).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(500)


def test_features_that_are_not_finite_are_named():
    gathered = FeatureStatistics.empty(2)
    gathered.update(torch.zeros(3, 2))
    with pytest.raises(UserError, match="sample 4 are not finite"):
        gathered.update(torch.tensor([[0.0, 0.0], [1.0, math.nan]]))


def test_statistics_survive_a_file(tmp_path):
    gathered = FeatureStatistics.empty(3)
    gathered.update(torch.randn(7, 3))
    path = tmp_path / "side.safetensors"
    save_statistics(path, {"i3d": gathered}, {"clips": 7})
    parts, about = load_statistics(path)
    assert about == {"clips": 7} and parts["i3d"].moments.count == 7
    for one, other in (
        (parts["i3d"].moments.scatter, gathered.moments.scatter),
        (parts["i3d"].features, gathered.features),
    ):
        assert torch.equal(one, other)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="delete it and run again"):
        load_statistics(path)


# ---------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_axis_aligned_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for standard deviations s."""
    one = gaussian(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 4.0, 9.0]).diag())
    other = gaussian(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([4.0, 4.0, 0.25]).diag())
    assert frechet_distance(one, other) == pytest.approx(1 + 9 + 1 + 0 + 2.5**2, abs=1e-9)


def test_frechet_distance_of_any_gaussians_agrees_with_the_matrix_root_of_scipy():
    one, other = some_covariance(12, 0), some_covariance(12, 1)
    root = scipy.linalg.sqrtm((one @ other).numpy()).real
    expected = (one + other).trace().item() - 2 * root.trace()
    mean = torch.zeros(12)
    assert frechet_distance(gaussian(mean, one), gaussian(mean, other)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances():
    """Along one line each: s1^2 + s2^2 - 2 s1 s2 |cos| of the angle between the lines."""
    angle, first, second = 0.7, 3.0, 2.0
    lines = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    covariances = [scale**2 * torch.outer(line, line) for scale, line in zip((first, second), lines, strict=True)]
    sides = [gaussian(torch.zeros(2), covariance) for covariance in covariances]
    expected = first**2 + second**2 - 2 * first * second * math.cos(angle)
    assert frechet_distance(*sides) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_is_zero_for_one_set_symmetric_and_blind_to_rotation():
    values, others = torch.randn(60, 8).double(), (torch.randn(60, 8) * 1.5 + 0.3).double()
    one, other = Moments.of(values), Moments.of(others)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(8, 8).double()).Q
    turned = frechet_distance(Moments.of(values @ turn), Moments.of(others @ turn))
    assert turned == pytest.approx(frechet_distance(one, other), rel=1e-9)


def test_features_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        frechet_distance(Moments.of(torch.randn(5, 3)), Moments.of(torch.randn(5, 4)))


def test_the_floor_is_what_finite_sets_of_one_gaussian_give():
    real = gaussian(torch.zeros(10), some_covariance(10, 3) / 10, count=40)
    scales = torch.linalg.cholesky(real.covariance)

    def draw(count: int, seed: int) -> Moments:
        noise = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Moments.of(noise @ scales.T)

    drawn = [frechet_distance(draw(40, 2 * seed), draw(25, 2 * seed + 1)) for seed in range(100, 140)]
    floors = [expected_floor(real, 25, seed) for seed in range(40)]
    assert sum(floors) / 40 == pytest.approx(sum(drawn) / 40, rel=0.15)
    assert expected_floor(gaussian(torch.zeros(10), some_covariance(10, 3) / 10, 50_000), 50_000) < 0.02


# ---------------------------------------------------------------------- the others


def test_kernel_distance_by_hand():
    real, generated = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])

    def kernel(one, other):
        return (torch.dot(one, other).item() / 2 + 1) ** 3

    within = 2 * kernel(real[0], real[1]) / 2 + 2 * kernel(generated[0], generated[1]) / 2
    across = sum(kernel(one, other) for one in real for other in generated)
    value, spread = kernel_distance(real, generated)
    assert value == pytest.approx(within - 2 * across / 4) and spread == 0


def test_kernel_distance_has_no_bias_and_sees_a_shift():
    rng = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 30, 4, generator=rng) for _ in range(60)]
    values = torch.tensor([kernel_distance(one, other)[0] for one, other in pairs])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(60)
    assert kernel_distance(pairs[0][0], pairs[0][1] + 2)[0] > 10 * values.std()


def test_kernel_distance_of_subsets_repeats_with_its_seed():
    one, other = torch.randn(50, 3), torch.randn(40, 3)
    found = kernel_distance(one, other, subset_size=20, subsets=5, seed=1)
    assert found == kernel_distance(one, other, subset_size=20, subsets=5, seed=1) and found[1] > 0
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(one[:1], other)


def test_inception_score_is_one_for_one_answer_and_the_number_of_classes_for_sure_and_even_ones():
    assert inception_score(torch.full((20, 5), 0.2))[0] == pytest.approx(1)
    assert inception_score(torch.eye(5).repeat(8, 1), splits=4) == pytest.approx((5, 0))


def test_precision_and_recall_of_points_on_a_line():
    """With k = 1 the real points reach 1 to each side; of the generated ones 0.5 and 1.5 are inside, 9 is not."""
    real = torch.tensor([[0.0], [1.0], [2.0]])
    generated = torch.tensor([[0.5], [1.5], [9.0], [20.0]])
    precision, recall = precision_recall(real, generated, neighbours=1)
    assert precision == 0.5
    assert recall == 1.0  # 0.5 and 1.5 reach 1 to each side, so 0, 1 and 2 are all inside
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(real, generated)
