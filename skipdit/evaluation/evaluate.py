"""`skipdit evaluate`: FVD and its relatives between two sets of clips, or fidelity between pairs."""

import argparse
import json
import math
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import describe, load_config, save_config
from ..errors import UserError
from ..files import check_writable, written_whole
from .evaluate_config import OF_CLIPS, OF_FRAMES, PROTOCOLS, EvaluateConfig

if TYPE_CHECKING:
    from .gathering import Gathering
    from .sides import Side
    from .statistics import FeatureStatistics

__all__ = ["EvaluateConfig", "add_arguments", "evaluate", "run", "set_metrics", "to_markdown"]

LEAST = {"fvd": 2, "kvd": 2, "fid": 2, "kid": 2, "precision": 4, "recall": 4, "is": 2}
"""Clips of a side that a metric needs."""
NAMES = {
    "fvd": "FVD",
    "kvd": "KVD",
    "precision": "precision",
    "recall": "recall",
    "is": "Inception score (I3D, Kinetics-400)",
    "fid": "FID of frames",
    "kid": "KID of frames",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "temporal": "temporal consistency (SSIM of neighbouring frames)",
    "temporal_real": "temporal consistency of the real side",
    "lpips": "LPIPS (AlexNet)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = describe(EvaluateConfig)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file, such as configs/digits/evaluate.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and say where it is."""
    config = load_config(EvaluateConfig, args.config, args.settings)
    folder = check_writable(config.output)
    report = evaluate(config)
    table = to_markdown(report)
    for name, text in (("evaluation.md", table), ("evaluation.json", to_json(report))):
        with written_whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    save_config(config, folder / "settings.yaml")
    print(f"{table}\n{folder.resolve()}: evaluation.md, evaluation.json, settings.yaml")
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Compare the two sides.

    Returns:
        Plain values: "metrics" (name -> value; kvd, kid and is have a "..._std" beside them), "floor" (what a perfect
        generator would get from as many clips), "warnings", "real" and "generated" (settings, clips, skipped),
        "protocol".

    Raises:
        UserError: Something is missing, the sides do not fit together, or too many clips cannot be read.
    """
    from .fidelity import check_networks
    from .gathering import gather, gather_cached
    from .opening import open_sides

    stride, name = 1, config.protocol
    if name is not None:
        protocol = dict(PROTOCOLS[name])
        stride = protocol.pop("stride")
        config = replace(config, protocol=None, **protocol)
    check_networks(config.metrics)
    how = _gathering(config)
    check_writable(config.cache_dir)
    real, generated, warnings = open_sides(config, stride)
    _check_enough(config, real, generated)
    for detector in how.detectors:
        detector.check_frames(real.settings["num_frames"])
    values: dict[str, float] = {}
    floors: dict[str, float] = {}
    if config.paired:
        values = _paired_metrics(config, real, generated)
    else:
        bad = config.real.max_bad_share
        parts = gather_cached(real, replace(how, max_bad_share=bad), "real clips", Path(config.cache_dir), print)
        bad = config.generated.max_bad_share
        made = gather(generated, replace(how, max_bad_share=bad), "generated clips")
        _check_left(config, parts, made)
        values, floors = set_metrics(config.metrics, parts, made, config.seed)
        warnings += _doubts(parts, made, floors)
    used = {"real": len(real), "generated": len(generated)}
    if not config.paired:
        per_clip = min(config.frames_per_clip, real.settings["num_frames"])
        for title, found in (("real", parts), ("generated", made)):
            network, part = next(iter(found.items()))
            used[title] = part.moments.count // (1 if network == "i3d" else per_clip)
    for title, side in (("real", real), ("generated", generated)):
        if len(side) < config.clips:
            warnings.append(f"The {title} side has {len(side)} clips, not {config.clips}.")
        if side.skipped:
            named = ", ".join(name for name, _ in side.skipped[:5])
            warnings.append(f"{len(side.skipped)} clips of the {title} side cannot be read and are left out: {named}.")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "protocol": name,
        "metrics": values,
        "floor": floors,
        "warnings": warnings,
        "networks": {detector.name: detector.fingerprint for detector in how.detectors},
        "real": _about(config.real, real, used["real"]),
        "generated": _about(config.generated, generated, used["generated"]),
    }


def _check_enough(config: EvaluateConfig, real: "Side", generated: "Side") -> None:
    """Raise UserError if a metric cannot be had of so few clips or frames."""
    for name, side in (("real", real), ("generated", generated)):
        least = max(LEAST.get(metric, 1) for metric in config.metrics)
        if len(side) < least:
            wanted = f"{', '.join(config.metrics)} can be had of {least} or more"
            raise UserError(f"The {name} side has too few clips, {len(side)}: {wanted}.")
    if "temporal" in config.metrics and generated.settings["num_frames"] < 2:
        raise UserError("temporal compares neighbouring frames: leave it out for pictures.")


def _check_left(config: EvaluateConfig, *sides: dict[str, "FeatureStatistics"]) -> None:
    """The same when unreadable clips have been left out."""
    least = max(LEAST.get(metric, 1) for metric in config.metrics)
    left = min(part.moments.count for side in sides for part in side.values())
    if left < least:
        raise UserError(f"Only {left} clips of a side can be read: {', '.join(config.metrics)} need at least {least}.")


def _gathering(config: EvaluateConfig) -> "Gathering":
    """Read the networks that the metrics need."""
    from ..sampling.loading import choose_device
    from ..weights import DTYPES
    from .gathering import Gathering
    from .networks.detectors import load_detector

    device, dtype = choose_device(config.device), DTYPES[config.dtype]
    detectors = []
    if set(config.metrics) & set(OF_CLIPS):
        detectors.append(load_detector("i3d", config.i3d, device, dtype))
    if set(config.metrics) & set(OF_FRAMES):
        detectors.append(load_detector("inception", config.inception, device, dtype))
    return Gathering(detectors, config.frames_per_clip, config.batch_size, config.num_workers)


def set_metrics(
    metrics: list[str], real: dict[str, "FeatureStatistics"], generated: dict[str, "FeatureStatistics"], seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics between two sets, from their statistics by network ("i3d", "inception").

    Returns:
        Name -> value, and for the Frechet distances name -> what a perfect generator would get.
    """
    from . import metrics as arithmetic

    values: dict[str, float] = {}
    floors: dict[str, float] = {}
    for distance, kernel, network in (("fvd", "kvd", "i3d"), ("fid", "kid", "inception")):
        if distance in metrics:
            pair = real[network].moments, generated[network].moments
            values[distance] = arithmetic.frechet_distance(*pair)
            floors[distance] = arithmetic.expected_floor(pair[0], pair[1].count, seed)
        if kernel in metrics:
            pair = real[network].features, generated[network].features
            values[kernel], values[f"{kernel}_std"] = arithmetic.kernel_distance(*pair, seed=seed)
    if {"precision", "recall"} & set(metrics):
        both = arithmetic.precision_recall(real["i3d"].features, generated["i3d"].features)
        values |= {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in metrics}
    if "is" in metrics:
        probabilities = generated["i3d"].features.softmax(dim=1)
        values["is"], values["is_std"] = arithmetic.inception_score(probabilities)
    return values, floors


def _doubts(real: dict, generated: dict, floors: dict[str, float]) -> list[str]:
    """What speaks against taking the figures at face value."""
    doubts = []
    for name, network in (("fvd", "i3d"), ("fid", "inception")):
        if name not in floors:
            continue
        dim = len(real[network].moments.mean)
        for title, side in (("real", real), ("generated", generated)):
            if (count := side[network].moments.count) <= dim:
                doubts.append(
                    f"{NAMES[name]}: {count} {title} samples are too few for the {dim} dimensions of its features (the "
                    f"covariance is singular): even a perfect generator would get {floors[name]:.1f} or more. "
                    "Compare it only between sets of this size; the kernel distance has no such bias."
                )
    return doubts


def _paired_metrics(config: EvaluateConfig, real: "Side", generated: "Side") -> dict[str, float]:
    import torch

    from .fidelity import fidelity
    from .gathering import paired_batches

    found: dict[str, list[torch.Tensor]] = {}
    for reference, clips in paired_batches(real, generated, config.batch_size):
        both = [side.permute(0, 1, 4, 2, 3).float() / 255 for side in (clips, reference)]
        for name, values in fidelity(*both, config.metrics).items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(parts).double().mean().item() for name, parts in found.items()}


def _about(side_config: Any, side: "Side", clips: int) -> dict[str, Any]:
    skipped = [list(item) for item in side.skipped]
    return {**asdict(side_config), "clips": clips, "settings": side.settings, "skipped": skipped}


def to_json(report: dict[str, Any]) -> str:
    """All of it, unrounded; an infinite PSNR (equal clips) becomes null."""
    metrics = {name: value if math.isfinite(value) else None for name, value in report["metrics"].items()}
    return json.dumps({**report, "metrics": metrics}, indent=2, allow_nan=False) + "\n"


def to_markdown(report: dict[str, Any]) -> str:
    """A table of the figures, with all that they depend on below it."""
    lines = ["| metric | value | |", "|---|--:|---|"]
    values, floors = report["metrics"], report["floor"]
    for key, value in values.items():
        if key.endswith("_std"):
            continue
        spread = f" ± {values[f'{key}_std']:.4g}" if values.get(f"{key}_std") else ""
        note = f"so many clips of a perfect generator get at least about {floors[key]:.1f}" if key in floors else ""
        lines.append(f"| {NAMES.get(key, key)} | {value:.4g}{spread} | {note} |")
    lines.append("")
    for title in ("real", "generated"):
        side = report[title]
        own = side["settings"]
        lines.append(
            f"- {title}: {side['path']}, {side['clips']} clips of {own['num_frames']} frames, interval "
            f"{own['frame_interval']}, {own['height']}x{own['width']}, {own['codec']}"
        )
    lines += [f"- note: {warning}" for warning in report["warnings"]]
    return "\n".join(lines) + "\n"
