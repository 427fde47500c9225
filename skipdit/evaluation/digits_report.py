"""`skipdit evaluate-digits`: how many generated digits a classifier of real ones reads, by cache setting."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..pipelines import SkipLattePipeline

__all__ = ["add_arguments", "evaluate_digits", "run"]

BATCH = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", type=Path, default=Path("pretrained/digits"), help="folder (%(default)s)")
    parser.add_argument("--clips", type=int, default=200, help="generated clips, ten classes in turn (%(default)s)")
    parser.add_argument("--caches", nargs="+", default=["off", "N2-900-50", "N3-900-50"], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table."""
    print(evaluate_digits(**{name: value for name, value in vars(args).items() if name != "command"}))
    return 0


def evaluate_digits(
    model: Path, clips: int, caches: list[str], steps: int = 50, guidance_scale: float = 4.0, seed: int = 0
) -> str:
    """Sample clips of the ten digits under each cache setting, from the same noise, and let a classifier read them.

    Args:
        model: Folder of a `SkipLattePipeline` of moving digits.
        clips: Generated clips for each setting; classes take turns.
        caches: "off", or such as "N2-900-50".
        steps: Sampler steps.
        guidance_scale: 1: no guidance.
        seed: Of the noise.

    Returns:
        A Markdown table; the accuracy on real held-out clips stands beside it as the most that can be asked.

    Raises:
        UserError: No such pipeline, or a value out of range.
    """
    from ..cache import SkipCacheConfig

    for name, value in (("--clips", clips), ("--steps", steps)):
        if value < 1:
            raise UserError(f"{name} {value} must be 1 or more.")
    try:
        settings = {word: None if word == "off" else SkipCacheConfig.parse(word) for word in caches}
    except ValueError as error:
        raise UserError(f"--caches: {error}") from error
    pipeline = _load(model)
    labels = [index % 10 for index in range(clips)]
    lines = [f"| clips ({clips} each) | read as the class asked for | the least recognised |", "|---|--:|---|"]

    def add(name: str, found: dict) -> None:
        worst = min(found["per_class"], key=found["per_class"].get)
        lines.append(f"| {name} | {found['accuracy']:.1%} | {worst} ({found['per_class'][worst]:.0%}) |")

    for word, cache in settings.items():
        found = _accuracy(pipeline, cache, labels, steps, guidance_scale, seed)
        add("generated, no cache" if cache is None else f"generated, {word}", found)
    real = _of_real_clips(pipeline)
    add(f"real, held out ({real['clips']})", real)
    return "\n".join(lines)


def _load(model: Path) -> "SkipLattePipeline":
    from diffusers.utils import logging

    from ..pipelines import SkipLattePipeline

    if not (model / "model_index.json").is_file():
        raise UserError(f"{model} holds no pipeline: pass --model with the folder of one.")
    logging.disable_progress_bar()  # of the files: over in a moment
    try:
        pipeline = SkipLattePipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} cannot be read as a pipeline of clips ({str(error).splitlines()[0]}).") from error
    if pipeline.transformer.config.num_classes != 10:
        raise UserError(f"{model} is not a pipeline of the ten digits.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _accuracy(pipeline, cache, labels: list[int], steps: int, guidance_scale: float, seed: int) -> dict:
    import torch
    from tqdm import tqdm

    from .digits import generated_accuracy

    if cache is not None:
        pipeline.transformer.enable_cache(cache)
    parts: list[torch.Tensor] = []
    for first in tqdm(
        range(0, len(labels), BATCH), desc=str(cache or "no cache"), unit="batch", disable=None, leave=False
    ):
        some = labels[first : first + BATCH]
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + first + place) for place in range(len(some))]
        output = pipeline(
            some, num_inference_steps=steps, guidance_scale=guidance_scale, generator=noise, output_type="pt"
        )
        parts.append(output.frames)
    if cache is not None:
        pipeline.transformer.disable_cache()
    return generated_accuracy(torch.cat(parts), labels)


def _of_real_clips(pipeline) -> dict:
    import torch

    from ..data import MovingDigits
    from .digits import generated_accuracy

    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    real = MovingDigits(num_frames=pipeline.transformer.config.num_frames, size=side, length=500, seed=1, split="test")
    items = [real[index] for index in range(len(real))]
    clips = torch.stack([item["video"] for item in items]) / 2 + 0.5
    return generated_accuracy(clips.clamp(0, 1), [item["class_label"] for item in items])
