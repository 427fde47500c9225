"""Loss curves and similarity of deep features of a vanilla run and one with skips, from their output folders.

python tests/plot_skips.py outputs/small-vanilla outputs/small --latents outputs/small-latents --out skips.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from skipdit.config import load_config
from skipdit.data import LatentDataset
from skipdit.pipelines import SkipLattePipeline
from skipdit.training.config import TrainConfig
from skipdit.training.diagnostics import feature_similarity

NAMES = ("vanilla", "with long skips")


def curve(run: Path) -> tuple[list[int], list[float]]:
    """Steps and squared errors of the log."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "mse" in entry]
    return [entry["step"] for entry in entries], [entry["mse"] for entry in entries]


def similarity(run: Path, latents: Path, clips: int) -> list[float]:
    """Of the averaged weights, on real clips."""
    config = load_config(TrainConfig, run / "train.yaml")
    pipeline = SkipLattePipeline.from_pretrained(run / "pipeline").to(torch.float32)
    arguments = {name: config.data.arguments[name] for name in ("num_frames", "frame_interval")}
    data = LatentDataset(latents, flip=False, **arguments)
    items = [data[index * len(data) // clips] for index in range(clips)]
    clean = torch.stack([item["mean"] for item in items]) * pipeline.vae.config.scaling_factor
    labels = None
    if pipeline.transformer.null_class is not None:
        labels = torch.tensor([item["class_label"] for item in items])
    return feature_similarity(pipeline.transformer, clean, labels, config.objective)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, help="output folders: vanilla, then with skips")
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    timesteps = torch.linspace(999, 0, 50).round().long().tolist()
    for name, run in zip(NAMES, args.runs, strict=True):
        steps, errors = curve(run)
        values = similarity(run, args.latents, args.clips)
        left.plot(steps, errors, label=name)
        right.plot(timesteps[1:], values, label=f"{name} (mean {sum(values) / len(values):.4f})")
        last = errors[-4:]
        print(
            f"{name}: mse {sum(last) / len(last):.4f} over the last {len(last)} lines; similarity "
            f"{sum(values) / len(values):.4f}, least {min(values):.4f}"
        )
    left.set(xlabel="training step", ylabel="squared error of the noise", yscale="log")
    right.set(xlabel="timestep", ylabel="cosine similarity to the step before")
    right.invert_xaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
