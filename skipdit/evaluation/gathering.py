"""Features of a side: its clips pass the networks once, and what is gathered of a real side is kept on disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import UserError
from .identity import fingerprint
from .networks.detectors import Detector
from .sides import Side
from .statistics import KEPT, FeatureStatistics, load_statistics, save_statistics

__all__ = ["Gathering", "gather", "gather_cached", "pick_frames"]

VERSION = 1  # of what is stored


@dataclass(frozen=True)
class Gathering:
    """How features are made.

    Attributes:
        detectors: Networks; "i3d" sees whole clips, "inception" single frames.
        frames_per_clip: Evenly spaced frames of each clip that "inception" sees.
        batch_size: Clips at once.
        num_workers: Processes that decode while the networks compute.
        max_bad_share: Of unreadable clips.
    """

    detectors: Sequence[Detector]
    frames_per_clip: int = 4
    batch_size: int = 8
    num_workers: int = 0
    max_bad_share: float = 0.05


def pick_frames(clips: torch.Tensor, count: int) -> torch.Tensor:
    """Evenly spaced frames of clips [n, T, H, W, 3] -> [n * min(count, T), H, W, 3]."""
    frames = clips.shape[1]
    places = torch.linspace(0, frames - 1, min(count, frames)).round().long()
    return clips[:, places].flatten(0, 1)


def gather(side: Side, how: Gathering, title: str) -> dict[str, FeatureStatistics]:
    """Statistics of a side by network, in one pass over its clips; memory does not grow with their number.

    Raises:
        UserError: Too many clips cannot be read, or a feature is not a finite number.
    """
    parts = {detector.name: _Gatherer(detector) for detector in how.detectors}
    before = len(side.skipped)
    with tqdm(total=len(side), desc=title, unit="clip", disable=None) as bar:
        for clips in side.batches(how.batch_size, how.num_workers):
            for name, part in parts.items():
                part.take(clips if name == "i3d" else pick_frames(clips, how.frames_per_clip))
            bar.update(len(clips))
    _check_skipped(side.skipped[before:], len(side), how.max_bad_share, title)
    return {name: part.statistics for name, part in parts.items()}


class _Gatherer:
    def __init__(self, detector: Detector):
        self.detector, self.statistics = detector, FeatureStatistics.empty(detector.dim)

    def take(self, batch: torch.Tensor) -> None:
        self.statistics.update(self.detector.features(batch))


def _check_skipped(bad: list[tuple[str, str]], known: int, max_bad_share: float, title: str) -> None:
    if len(bad) > max_bad_share * known or (bad and len(bad) >= known):
        named = "; ".join(f"{name} ({reason})" for name, reason in bad[:5])
        raise UserError(
            f"{title}: {len(bad)} of {known} clips cannot be read, more than max_bad_share={max_bad_share:g} allows: "
            f"{named}{' ...' if len(bad) > 5 else ''}"
        )


def gather_cached(side: Side, how: Gathering, title: str, folder: Path, say: Callable[[str], None]) -> dict:
    """`gather`, or what an earlier run gathered of the same clips in the same way.

    Args:
        folder: For the files; a file's name is the fingerprint of all that the features depend on.
        say: Told whether they were found.
    """
    if side.identity is None:
        return gather(side, how, title)
    about: dict[str, Any] = {
        "version": VERSION,
        "settings": side.settings,
        "clips": side.identity,
        "networks": {detector.name: detector.fingerprint for detector in how.detectors},
        "frames_per_clip": how.frames_per_clip,
        "kept": KEPT,
    }
    about = json.loads(json.dumps(about))  # as it is read again
    path = Path(folder) / f"{fingerprint(about)[:32]}.safetensors"
    if path.is_file():
        parts, stored = load_statistics(path)
        if stored["about"] != about:
            raise UserError(f"{path} is of other clips than its name says: delete it and run again.")
        bad = [tuple(item) for item in stored["skipped"]]
        _check_skipped(bad, len(side), how.max_bad_share, title)
        side.skipped += [item for item in bad if item not in side.skipped]  # those of an earlier call are there
        say(f"{title}: statistics of an earlier run ({path})")
        return parts
    before = len(side.skipped)
    parts = gather(side, how, title)
    save_statistics(path, parts, {"about": about, "skipped": [list(item) for item in side.skipped[before:]]})
    return parts


def paired_batches(real: Side, generated: Side, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Clips of both sides side by side, uint8 [n, T, H, W, 3] each, however either side is cut into batches.

    Raises:
        UserError: One side has more clips than the other, or one of them cannot be read.
    """
    if len(real) != len(generated):
        raise UserError(f"{len(real)} and {len(generated)} clips: metrics of pairs need as many on both sides.")
    pairs = zip(_single(real, batch_size), _single(generated, batch_size), strict=True)
    while some := list(islice(pairs, batch_size)):
        yield torch.stack([one for one, _ in some]), torch.stack([other for _, other in some])


def _single(side: Side, batch_size: int) -> Iterator[torch.Tensor]:
    if side.skipped:
        raise UserError(f"{side.skipped[0][0]} cannot be used ({side.skipped[0][1]}): its pair is missing.")
    for batch in side.batches(batch_size, 0):
        yield from batch
        if side.skipped:
            raise UserError(f"{side.skipped[-1][0]} cannot be read ({side.skipped[-1][1]}): its pair is missing.")
