"""From the features of two sets to one figure. No network and no file is known here."""

import torch
from torchmetrics.image.kid import poly_mmd

from .statistics import Moments

__all__ = ["expected_floor", "frechet_distance", "inception_score", "kernel_distance", "precision_recall"]

LEAST_IN_PART = 100
NEIGHBOURS = 3
"""k of precision and recall, as in the paper."""


def frechet_distance(one: Moments, other: Moments) -> float:
    """Frechet distance of the Gaussians with these moments (Dowson and Landau 1982): FVD, FID.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). That root's trace is the sum of the singular values of
    C1^(1/2) C2^(1/2), which stays accurate when a covariance is singular, where a matrix square root of the product
    does not.

    Raises:
        ValueError: Fewer than two vectors on a side, or vectors of different lengths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"Features of {len(one.mean)} and of {len(other.mean)} dimensions cannot be compared.")
    first, second = one.covariance, other.covariance
    overlap = torch.linalg.svdvals(_root(first) @ _root(second)).sum()
    distance = (one.mean - other.mean).square().sum() + first.trace() + second.trace() - 2 * overlap
    return max(0.0, distance.item())


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def expected_floor(real: Moments, count: int, seed: int = 0) -> float:
    """What `frechet_distance` gives even for a perfect generator, at least: the bias of finite sets.

    Two sets of `real.count` and `count` vectors are drawn from the Gaussian of the real side. With fewer of them than a
    few times the dimensions that Gaussian is itself too narrow, and the true floor higher (twice as high is common).

    Args:
        real: Of the real side.
        count: Vectors of the generated side.
        seed: Of the draws.
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    scales = values.clamp(min=0).sqrt()
    rng = torch.Generator().manual_seed(seed)

    def draw(many: int) -> Moments:
        moments = Moments.empty(len(scales))
        for first in range(0, many, 1024):
            noise = torch.randn(min(1024, many - first), len(scales), generator=rng, dtype=torch.float64)
            moments.update((noise * scales) @ vectors.T + real.mean)
        return moments

    return frechet_distance(draw(real.count), draw(count))


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subset_size: int = 1000, subsets: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018): KVD, KID.

    Unlike the Frechet distance it has no bias from the number of samples.

    Args:
        real, generated: Features [N, D] and [M, D].
        subset_size: Samples of each side in one estimate; at most the smaller side is taken.
        subsets: Estimates; a single one if it takes both sides whole.
        seed: Of the choice of subsets.

    Returns:
        Mean and standard deviation over the subsets (0 for one).

    Raises:
        ValueError: Fewer than two samples on a side.
    """
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise ValueError("A kernel distance needs at least 2 samples on each side.")
    if size == len(real) == len(generated):
        subsets = 1
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen = [side[torch.randperm(len(side), generator=rng)[:size]].double() for side in (real, generated)]
        values.append(poly_mmd(*chosen))
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def inception_score(probabilities: torch.Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean divergence of the class probabilities from their mean (Salimans et al. 2016).

    Args:
        probabilities: [N, classes], rows that sum to 1.
        splits: Parts it is computed on, random ones; fewer if these would hold fewer than `LEAST_IN_PART` samples.
        seed: Of the parts.

    Returns:
        Mean and standard deviation over the parts; between 1 and the number of classes.
    """
    scores = []
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    # A part of few samples cannot score more than their number.
    for part in probabilities.double()[order].chunk(max(1, min(splits, len(probabilities) // LEAST_IN_PART))):
        marginal = part.mean(dim=0, keepdim=True)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, marginal)
        scores.append(divergence.sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real: torch.Tensor, generated: torch.Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated samples near real ones, and of real ones near generated ones (Kynkaanniemi et al. 2019).

    A sample is near a set if it lies within the distance from some member of the set to that member's k-th neighbour.

    Args:
        real, generated: Features [N, D] and [M, D].
        neighbours: k.

    Returns:
        Precision and recall, 0..1.

    Raises:
        ValueError: A side has no k-th neighbour.
    """
    for side in (real, generated):
        if len(side) <= neighbours:
            raise ValueError(f"Precision and recall need more than {neighbours} samples on each side, not {len(side)}.")
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(samples: torch.Tensor, members: torch.Tensor, neighbours: int, at_once: int = 1024) -> float:
    members = members.double()
    radii = []
    for rows in members.split(at_once):  # the nearest is the member itself
        radii.append(torch.cdist(rows, members).kthvalue(neighbours + 1, dim=1).values)
    radii = torch.cat(radii)
    inside = [(torch.cdist(rows.double(), members) <= radii).any(dim=1) for rows in samples.split(at_once)]
    return torch.cat(inside).double().mean().item()
