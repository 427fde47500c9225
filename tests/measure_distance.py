"""FVD and KVD of real clips against distorted ones, and of two halves of one set: do they grow with the damage?

python tests/measure_distance.py data/clips --size 64 --clips 48
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from tqdm import tqdm

from skipdit.data import ClipDataset
from skipdit.evaluation.metrics import expected_floor, frechet_distance, kernel_distance
from skipdit.evaluation.networks import Detector, load_detector
from skipdit.evaluation.sides import FileSide
from skipdit.evaluation.statistics import FeatureStatistics

Distort = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def noise(level: float) -> Distort:
    return lambda clips, rng: clips + level * 255 * torch.randn(clips.shape, generator=rng)


def blur(pixels: float) -> Distort:
    """Gaussian of that standard deviation."""
    reach = int(3 * pixels + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / pixels) ** 2)
    kernel = (kernel / kernel.sum())[None, None]

    def apply(clips: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        count, frames, height, width, channels = clips.shape
        rows = clips.permute(0, 1, 4, 2, 3).reshape(-1, 1, width)
        rows = F.conv1d(F.pad(rows, (reach, reach), mode="replicate"), kernel)
        columns = rows.view(-1, height, width).transpose(1, 2).reshape(-1, 1, height)
        columns = F.conv1d(F.pad(columns, (reach, reach), mode="replicate"), kernel)
        return columns.view(count, frames, channels, width, height).permute(0, 1, 4, 3, 2)

    return apply


def shuffle(share: float) -> Distort:
    """That share of the frames of each clip, at least two, change places among themselves."""

    def apply(clips: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        clips = clips.clone()
        for clip in clips:
            places = torch.randperm(len(clip), generator=rng)[: max(2, round(share * len(clip)))]
            clip[places] = clip[places.roll(1)].clone()
        return clips

    return apply


def freeze(share: float) -> Distort:
    """The last share of the frames repeat the one before them."""

    def apply(clips: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        still = round(share * clips.shape[1])
        clips = clips.clone()
        clips[:, -still:] = clips[:, -still - 1 : -still]
        return clips

    return apply


DISTORTIONS: dict[str, list[tuple[str, Distort]]] = {
    "noise (standard deviation, share of white)": [(f"{level:g}", noise(level)) for level in (0.02, 0.08, 0.3)],
    "blur (pixels)": [(f"{pixels:g}", blur(pixels)) for pixels in (0.5, 1, 2)],
    "frames shuffled": [(f"{share:.0%}", shuffle(share)) for share in (0.125, 0.5, 1)],
    "frames frozen": [(f"{share:.1%}", freeze(share)) for share in (0.25, 0.5, 0.9375)],
}


def gather(detector: Detector, batches: Iterator[torch.Tensor], distort: Distort | None = None) -> FeatureStatistics:
    statistics, rng = FeatureStatistics.empty(detector.dim), torch.Generator().manual_seed(0)
    for clips in batches:
        values = clips if distort is None else distort(clips.float(), rng).round().clamp(0, 255).to(torch.uint8)
        statistics.update(detector.features(values))
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--clips", type=int, default=48)
    args = parser.parse_args()
    data = ClipDataset(args.root, 16, args.interval, args.size, flip=False, classes="none")
    detector = load_detector("i3d")
    runs = sum(map(len, DISTORTIONS.values())) + 1
    bar = tqdm(total=runs, unit="set", disable=None)

    def batches() -> Iterator[torch.Tensor]:
        yield from FileSide(data, args.clips).batches(4, 0)
        bar.update()

    clean = gather(detector, batches())
    print("| distortion | level | FVD | KVD |\n|---|--:|--:|--:|")
    for title, levels in DISTORTIONS.items():
        for level, distort in levels:
            found = gather(detector, batches(), distort)
            distance = frechet_distance(clean.moments, found.moments)
            print(f"| {title} | {level} | {distance:.1f} | {kernel_distance(clean.features, found.features)[0]:.2f} |")
    halves = [FeatureStatistics.empty(detector.dim) for _ in range(2)]
    for half, features in zip(halves, (clean.features[::2], clean.features[1::2]), strict=True):
        half.update(features)
    distance = frechet_distance(*(half.moments for half in halves))
    kernel = kernel_distance(*(half.features for half in halves))[0]
    floor = expected_floor(halves[0].moments, halves[1].moments.count)
    print(f"| one half against the other | {len(halves[0].features)} clips each | {distance:.1f} | {kernel:.2f} |")
    print(f"\n{args.clips} clips; expected of two such halves: {floor:.1f}")


if __name__ == "__main__":
    main()
