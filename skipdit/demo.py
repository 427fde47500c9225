"""`skipdit demo`: the carried digits pipeline with and without cache from one noise: clips, a picture and a table."""

import argparse
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .files import check_writable, written_whole

if TYPE_CHECKING:
    from .evaluation.comparison import Run
    from .media import Pixels
    from .pipelines import SkipPipeline

__all__ = ["add_arguments", "run", "run_demo"]

CACHES = {"N=2": (2, 0), "N=3": (3, 0), "N=3 forecast": (3, 2), "N=5": (5, 0)}
"""Name -> interval of Skip-Cache, order of its forecast."""
MOST_CLASSES, DIGITS_IN_PICTURE, FRAMES_IN_PICTURE = 10, 3, 8
CARRIED = Path("pretrained/digits")
FPS = 8
BUDGET = 90.0
"""Seconds within which repeats are begun: the whole should stay below three minutes on two cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", type=Path, default=CARRIED, help=f"folder of a pipeline ({CARRIED})")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (outputs/demo)")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (50)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="1: no guidance (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each speed; the median counts (3)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")


def run(args: argparse.Namespace) -> int:
    """Compare, write the files, and print the table and where they are."""
    table = run_demo(args.model, args.output, args.steps, args.guidance_scale, args.seed, args.repeats, args.device)
    print(table)
    print(f"Clips (mp4, GIF), comparison.png and the table are in {args.output.resolve()}")
    return 0


def run_demo(
    model: Path = CARRIED,
    output: Path = Path("outputs/demo"),
    steps: int = 50,
    guidance_scale: float = 4.0,
    seed: int = 0,
    repeats: int = 3,
    device: str = "auto",
) -> str:
    """Sample ten classes without cache and with each of `CACHES`, and compare.

    Args:
        model: Folder of a class-to-video pipeline with long skips.
        output: Folder for no-cache.mp4, n2.mp4, ... (and .gif), comparison.png, results.md and results.json.
        steps: Sampler steps.
        guidance_scale: 1: no guidance.
        seed: Of the start noise, the same for all runs.
        repeats: Timed runs of each setting, fewer if they take long.
        device: As `choose_device` reads it.

    Returns:
        The table, in Markdown, under a line that says what was measured.

    Raises:
        UserError: The pipeline is not there or of another kind, or a number is out of range.
    """
    for name, value, least, most in (
        ("--steps", steps, 1, 1000),
        ("--repeats", repeats, 1, 100),
        ("--seed", seed, 0, 2**63),
    ):
        if not least <= value <= most:
            raise UserError(f"{name} {value} must be {least} to {most}.")
    if not math.isfinite(guidance_scale):
        raise UserError(f"--guidance-scale {guidance_scale} must be finite; 1 is without guidance.")
    from .sampling.config import SampleConfig
    from .sampling.loading import choose_device, find_model

    source = find_model(SampleConfig(model=str(_locate(model))))
    if not source.is_video or not source.num_classes or not source.model.config.skip:
        raise UserError(f"{model} is not a class-to-video pipeline with long skips, which the demo needs.")
    where = choose_device(device)
    check_writable(output)
    print(f"Loading {model} on {where} ...", flush=True)
    pipeline = source.load(where)
    runs, labels = _compare(pipeline, steps, guidance_scale, seed, repeats)
    captions = [source.class_names[label] if source.class_names else str(label) for label in labels]
    about = _describe(pipeline, runs, steps, guidance_scale)
    _write(runs, captions, output, about)
    return _table(runs, about)


def _locate(model: Path) -> Path:
    """The folder as given, else in the checkout that this package is installed from."""
    in_checkout = Path(__file__).resolve().parents[1] / model
    for folder in (model, in_checkout):
        if (folder / "model_index.json").is_file():
            return folder
    raise UserError(
        f"{model} holds no pipeline: run this in a clone of the repository, which carries one, or pass "
        "--model with the folder of a trained one."
    )


def _compare(
    pipeline: "SkipPipeline", steps: int, guidance_scale: float, seed: int, repeats: int
) -> tuple[list["Run"], list[int]]:
    import torch

    from .cache import SkipCacheConfig
    from .evaluation.comparison import compare_caches
    from .sampling.streaming import sample_generators

    labels = list(range(min(MOST_CLASSES, pipeline.transformer.config.num_classes)))
    pipeline.set_progress_bar_config(disable=True)

    def sample(steps: int = steps) -> torch.Tensor:
        return pipeline(
            class_labels=labels,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=sample_generators(seed, labels),
            output_type="pt",
        ).frames

    caches = {"no cache": None}
    published = SkipCacheConfig.preset("class-to-video")
    caches |= {name: replace(published, interval=n, forecast=order) for name, (n, order) in CACHES.items()}
    sample(min(2, steps))  # a first call pays for memory and kernels; it must not weigh on the first run
    pipeline.set_progress_bar_config(disable=None, leave=False, desc="Sampling")

    def tell(name: str, seconds: float) -> None:
        print(f"  {name:<12} {seconds:7.2f} s", flush=True)

    return compare_caches(pipeline.transformer, caches, sample, repeats, BUDGET, tell), labels


def _write(runs: list["Run"], captions: list[str], output: Path, about: str) -> None:
    from .evaluation.comparison import to_json
    from .media import make_grid, to_uint8, write_gif, write_mp4, write_png

    clips = [to_uint8(run.samples.permute(0, 1, 3, 4, 2).numpy()) for run in runs]
    for run, pixels in zip(runs, clips, strict=True):
        name = run.name.replace(" ", "-").replace("=", "").lower()
        grid = make_grid(pixels, captions, columns=5)
        write_mp4(output / f"{name}.mp4", grid, FPS)
        write_gif(output / f"{name}.gif", grid, FPS)
    write_png(output / "comparison.png", _picture(runs, clips, captions))
    for file, text in (("results.md", _table(runs, about)), ("results.json", to_json(runs))):
        with written_whole(output / file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _picture(runs: list["Run"], clips: list["Pixels"], captions: list[str]) -> "Pixels":
    """Rows: runs; columns: frames; a block for each of a few classes."""
    import numpy as np

    from .media import make_sheet, viewing_factor

    length, height, width = clips[0].shape[1:4]
    frames = np.unique(np.linspace(0, length - 1, FRAMES_IN_PICTURE).round().astype(int))
    names = [run.name if index == 0 else f"{run.name}  {run.speedup:.2f}x" for index, run in enumerate(runs)]
    spread = np.linspace(0, len(captions) - 1, DIGITS_IN_PICTURE + 2).round().astype(int)
    blocks = [
        make_sheet(
            [(name, pixels[index, frames]) for name, pixels in zip(names, clips, strict=True)],
            title=captions[index],
            columns=[f"frame {frame + 1}" for frame in frames],
            scale=viewing_factor(height, width, least=80),
        )
        for index in np.unique(spread[1:-1])
    ]
    return np.concatenate(blocks)


def _describe(pipeline: "SkipPipeline", runs: list["Run"], steps: int, guidance_scale: float) -> str:
    """What was measured and on what, in a line."""
    import torch

    device = pipeline.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    sampler = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
    times = f"median of {runs[0].repeats} runs" if runs[0].repeats > 1 else "one run each"
    return (
        f"{len(runs[0].samples)} clips at once, {steps} steps of {sampler}, guidance {guidance_scale:g}; "
        f"{name}; {times}, decoding included; PSNR and SSIM against no cache, mean over clips."
    )


def _processor() -> str:
    import torch

    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def _table(runs: list["Run"], about: str) -> str:
    from .evaluation.comparison import to_markdown

    return f"{to_markdown(runs)}\n{about}\n"
