"""What is kept of a set's features: moments gathered batch by batch, and some of the features themselves."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..files import written_whole

__all__ = ["FeatureStatistics", "Moments", "load_statistics", "save_statistics"]

KEPT = 10_000
"""Features kept for metrics that compare samples."""


@dataclass
class Moments:
    """Count, mean and scatter of vectors, in float64, gathered in one pass (Chan, Golub and LeVeque 1983).

    Attributes:
        count: Vectors seen.
        mean: [D].
        scatter: Sum of the outer products of the deviations from the mean, [D, D].
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def empty(cls, dim: int) -> Self:
        """Of no vectors of that length."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: torch.Tensor) -> Self:
        """Of vectors [N, D]."""
        moments = cls.empty(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: torch.Tensor) -> None:
        """Take in vectors [n, D]."""
        if len(features) == 0:
            return
        values = features.double()
        mean = values.mean(dim=0)
        deviations = values - mean
        self.merge(Moments(len(values), mean, deviations.T @ deviations))

    def merge(self, other: "Moments") -> None:
        """Take in what another has gathered, such as another process."""
        total = self.count + other.count
        if total == 0:
            return
        step = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(step, step) * (self.count * other.count / total)
        self.mean = self.mean + step * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, [D, D]; singular if there are no more vectors than dimensions.

        Raises:
            ValueError: Fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 vectors, not {self.count}.")
        return self.scatter / (self.count - 1)


@dataclass
class FeatureStatistics:
    """Of one side of a comparison; its size does not grow with the number of clips beyond `KEPT` vectors.

    Attributes:
        moments: Of all features.
        features: `KEPT` of them, a random choice whatever their order (Vitter's algorithm R), float32 [n, D].
        keep: How many are kept.
    """

    moments: Moments
    features: torch.Tensor
    keep: int = field(default=KEPT)

    @classmethod
    def empty(cls, dim: int, keep: int = KEPT) -> Self:
        """Of no features of that length."""
        return cls(Moments.empty(dim), torch.zeros(0, dim), keep)

    def update(self, features: torch.Tensor) -> None:
        """Take in features [n, D].

        Raises:
            UserError: One of them is not finite.
        """
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            first = self.moments.count + int((~finite).nonzero()[0])
            raise UserError(f"The features of sample {first} are not finite numbers: look at it, or pass dtype=fp32.")
        seen = self.moments.count
        self.moments.update(features)
        room = max(0, self.keep - len(self.features))
        self.features = torch.cat([self.features, features[:room].float()]) if room else self.features
        for number, feature in enumerate(features[room:], seen + room):
            if (place := int(np.random.default_rng(number).integers(number + 1))) < self.keep:
                self.features[place] = feature


def save_statistics(path: Path, parts: dict[str, FeatureStatistics], about: dict[str, Any]) -> None:
    """Write the statistics of one side, by network, with what they depend on.

    Args:
        path: A .safetensors file, written whole or not at all.
        parts: Network's name -> statistics.
        about: Plain values; read back by `load_statistics`.
    """
    tensors, counts = {}, {}
    for name, part in parts.items():
        tensors |= {f"{name}.mean": part.moments.mean, f"{name}.scatter": part.moments.scatter}
        tensors[f"{name}.features"] = part.features.contiguous()
        counts[name] = {"count": part.moments.count, "keep": part.keep}
    metadata = {"about": json.dumps(about, sort_keys=True), "counts": json.dumps(counts)}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_statistics(path: Path) -> tuple[dict[str, FeatureStatistics], dict[str, Any]]:
    """What `save_statistics` wrote.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            counts = json.loads(metadata["counts"])
            parts = {}
            for name, many in counts.items():
                moments = Moments(many["count"], file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.scatter"))
                parts[name] = FeatureStatistics(moments, file.get_tensor(f"{name}.features"), many["keep"])
            return parts, json.loads(metadata["about"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} holds no statistics that can be read ({error}): delete it and run again.") from error
