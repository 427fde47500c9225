"""`skipdit compare`: cache settings, rival caches and fewer steps on the same noise: time, operations, quality."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import describe, load_config, save_config
from ...errors import UserError
from ...files import check_writable
from ..evaluate_config import EvaluateConfig, SideConfig
from .config import CompareConfig

if TYPE_CHECKING:
    import torch

    from ...pipelines import SkipPipeline
    from ..networks.detectors import Detector
    from ..sides import Side
    from ..statistics import FeatureStatistics
    from .measure import Contender

__all__ = ["CompareConfig", "add_arguments", "compare", "run"]

PAIRS = ("psnr", "ssim")
CALIBRATION_SEED = 1_000_003  # other noise than what is compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = describe(CompareConfig)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, and say where it is."""
    from .report import to_markdown, write_report

    config = load_config(CompareConfig, args.config, args.settings)
    folder = check_writable(config.output)
    report = compare(config)
    files = write_report(report, folder)
    save_config(config, folder / "settings.yaml")
    print(f"{to_markdown(report)}\n{folder.resolve()}: {', '.join(files)}, settings.yaml")
    return 0


def compare(config: CompareConfig) -> dict[str, Any]:
    """Sample all clips under each setting and compare.

    Returns:
        "rows": one a setting, in plain values (and "shown", its first clips); "notes"; "about".

    Raises:
        UserError: Something is missing or does not fit, before any clip is sampled.
    """
    from tqdm import tqdm

    from ..fidelity import check_networks
    from .measure import count_flops, measure

    metrics = [*PAIRS, *(["lpips"] if config.lpips else [])]
    _check_words(config)
    check_networks(metrics)
    pipelines = {"skip": _load(config.model, config, with_skips=True)}
    if config.twin is not None:
        pipelines["vanilla"] = _load(config.twin, config, with_skips=False)
        _check_twins(pipelines)
    notes: list[str] = []
    detector, side = _open_real(config, pipelines["skip"], notes)
    sample, decode = _sampling(config, pipelines)
    contenders = _contenders(config, pipelines, sample, notes)  # samples, to calibrate MagCache
    real = _gather_real(config, detector, side)
    batches = [
        list(range(first, min(first + config.batch_size, config.clips)))
        for first in range(0, config.clips, config.batch_size)
    ]
    flops = [count_flops(contender, sample) for contender in contenders]
    _warm_up(contenders, sample, batches[0])
    if config.equal_operations or config.equal_time:
        costs = flops if config.equal_operations else _pilot(contenders, sample, batches[0])
        contenders = contenders + _fewer_steps(contenders, costs)
        flops += [count_flops(contender, sample) for contender in contenders[len(flops) :]]
    with tqdm(total=len(contenders) * len(batches), desc="Comparing", disable=None) as bar:
        found = measure(contenders, sample, decode, batches, detector, metrics, lambda *_: bar.update())
    for measured, count in zip(found, flops, strict=True):
        measured.flops = count
    from .report import make_report

    return make_report(config, contenders, found, real, notes, pipelines)


def _check_words(config: CompareConfig) -> None:
    """Caches and peers, before anything is read."""
    from ...cache import SkipCacheConfig
    from .peers import parse_peer

    try:
        for word in config.caches:
            SkipCacheConfig.parse(word)
    except ValueError as error:
        raise UserError(f"caches: {error}") from error
    for word in config.peers:
        parse_peer(word)


def _load(folder: str, config: CompareConfig, with_skips: bool) -> "SkipPipeline":
    from ...sampling.config import SampleConfig
    from ...sampling.loading import check_dtype, choose_device, find_model
    from ...schedulers import make_scheduler

    if config.sampler is not None:
        try:
            make_scheduler(config.sampler)
        except ValueError as error:
            raise UserError(str(error)) from error
    source = find_model(SampleConfig(model=folder))
    if not source.is_video:
        raise UserError(f"{folder} makes pictures: the comparison is of clips.")
    if bool(source.model.config.skip) != with_skips:
        wanted = "has no long skips, which model= needs" if with_skips else "has long skips, which twin= must not have"
        raise UserError(f"{folder} {wanted}.")
    if source.num_classes is None and (config.guidance_scale or 1) > 1:
        raise UserError(f"guidance_scale={config.guidance_scale:g}: {folder} is unconditional; leave it out.")
    device = choose_device(config.device)
    check_dtype(config.dtype, device)
    pipeline = source.load(device, config.dtype, config.sampler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_twins(pipelines: dict[str, "SkipPipeline"]) -> None:
    from ...data.latents import hash_weights

    one, other = (dict(pipeline.transformer.config) for pipeline in pipelines.values())
    for key in ("sample_size", "num_frames", "num_classes", "in_channels", "hidden_size", "depth", "patch_size"):
        if one[key] != other[key]:
            raise UserError(f"twin= is no twin of model=: {key} is {other[key]} there and {one[key]} here.")
    samplers = [type(pipeline.scheduler).__name__ for pipeline in pipelines.values()]
    hashes = [hash_weights(pipeline.vae.state_dict()) for pipeline in pipelines.values()]
    if samplers[0] != samplers[1]:
        raise UserError(f"twin= samples with {samplers[1]}, model= with {samplers[0]}: pass sampler= for both.")
    if hashes[0] != hashes[1]:
        raise UserError("twin= has another autoencoder than model=: their clips cannot be compared.")


def _sampling(config: CompareConfig, pipelines: dict[str, "SkipPipeline"]) -> tuple[Any, Any]:
    """The two functions that `measure` needs."""
    import torch

    from ...sampling.streaming import sample_generators
    from ..sides import to_bytes

    num_classes = pipelines["skip"].transformer.config.num_classes
    wishes = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}

    def sample(pipeline: "SkipPipeline", steps: int, indices: Sequence[int], seed: int = config.seed) -> "torch.Tensor":
        labels = None if num_classes is None else [index % num_classes for index in indices]
        return pipeline(
            class_labels=labels,
            num_samples=len(indices) if labels is None else None,
            num_inference_steps=steps,
            generator=sample_generators(seed, indices),
            output_type="latent",
            **wishes,
        ).frames

    def decode(pipeline: "SkipPipeline", latents: "torch.Tensor") -> "torch.Tensor":
        clips = [pipeline._decode(one.transpose(0, 1), config.batch_size) for one in latents]
        return torch.stack([to_bytes(clip) for clip in clips])

    return sample, decode


def _open_real(
    config: CompareConfig, pipeline: "SkipPipeline", notes: list[str]
) -> tuple["Detector | None", "Side | None"]:
    """The detector and the real clips, seen to fit, or None and None; what speaks against them is noted."""
    if not config.real.path:
        return None, None
    from ..identity import describe_difference
    from ..networks.detectors import load_detector
    from ..opening import open_side
    from ..sides import settings_of

    cfg = pipeline.transformer.config
    detector = load_detector("i3d", config.i3d, pipeline.device)
    sides = cfg.sample_size if not isinstance(cfg.sample_size, int) else (cfg.sample_size,) * 2
    size = tuple(side * pipeline.vae_scale_factor for side in sides)
    settings = EvaluateConfig(
        real=config.real,
        generated=SideConfig(path=config.model),
        clips=config.real_clips,
        seed=config.seed,
        device=config.device,
        cache_dir=config.cache_dir,
    )
    check_writable(config.cache_dir)
    side = open_side(config.real, settings, num_frames=cfg.num_frames, size=size)
    detector.check_frames(cfg.num_frames)
    if len(side) < 2:
        raise UserError(f"{config.real.path} holds {len(side)} clip: FVD and KVD need 2 or more.")
    made_at = config.made_at or pipeline.config.get("frame_interval")
    if made_at is None:
        notes.append("The frame interval of the model's training is not recorded and taken as 1: say it with made_at=.")
    if found := describe_difference(side.settings, settings_of(cfg.num_frames, made_at or 1, size)):
        if not config.force:
            raise UserError(f"Real and generated clips differ: {found}. Make them alike, or pass force=true.")
        notes.append(f"Forced although real and generated clips differ: {found}.")
    return detector, side


def _gather_real(config: CompareConfig, detector: "Detector | None", side: "Side | None") -> "FeatureStatistics | None":
    """Statistics of the real clips, if there are any."""
    if side is None:
        return None
    from ..gathering import Gathering, gather_cached

    how = Gathering([detector], batch_size=config.batch_size, max_bad_share=config.real.max_bad_share)
    return gather_cached(side, how, "real clips", Path(config.cache_dir), print)["i3d"]


def _contenders(
    config: CompareConfig, pipelines: dict[str, "SkipPipeline"], sample: Any, notes: list[str]
) -> list["Contender"]:
    """All settings but the fewer steps; those that cannot be had are noted."""
    from ...cache import SkipCacheConfig
    from .measure import Contender, attached
    from .peers import parse_peer, peer_config

    contenders = []
    model = pipelines["skip"]
    contenders.append(Contender("no cache", "no cache", "skip", model, config.steps))
    for word in config.caches:
        cache = SkipCacheConfig.parse(word)
        family = f"Skip-Cache, forecast of order {cache.forecast}" if cache.forecast else "Skip-Cache"
        contenders.append(Contender(f"Skip-Cache {cache}", family, "skip", model, config.steps, cache))
    if "vanilla" not in pipelines:
        return contenders
    twin = pipelines["vanilla"]
    contenders.append(Contender("vanilla, no cache", "no cache", "vanilla", twin, config.steps))
    for word in config.peers:
        name, _ = parse_peer(word)
        cache = peer_config(word, twin, config.steps, lambda steps: sample(twin, steps, [0, 1], CALIBRATION_SEED))
        contender = Contender(word, name, "vanilla", twin, config.steps, cache)
        try:
            with attached(contender):
                pass
        except ValueError as error:
            notes.append(f"{word} cannot be attached: {error}")
            continue
        contenders.append(contender)
    return contenders


def _warm_up(contenders: list["Contender"], sample: Any, batch: list[int]) -> None:
    from .measure import attached

    for contender in contenders:
        with attached(contender):
            sample(contender.pipeline, min(2, contender.steps), batch)


def _pilot(contenders: list["Contender"], sample: Any, batch: list[int]) -> list[float]:
    """Seconds of each contender for one batch."""
    from .measure import attached, timed

    seconds = []
    for contender in contenders:
        with attached(contender):
            seconds.append(timed(contender, sample, batch)[1])
    return seconds


def _fewer_steps(contenders: list["Contender"], costs: list[float]) -> list["Contender"]:
    """For each cache, its network without one, with the steps that cost as much, in seconds or in operations."""
    whole = {c.network: (c, cost) for c, cost in zip(contenders, costs, strict=True) if c.cache is None}
    fewer: dict[tuple[str, int], Any] = {}
    for contender, cost in zip(contenders, costs, strict=True):
        plain, base = whole[contender.network]
        steps = max(1, round(plain.steps * cost / base))
        if contender.cache is not None and steps < plain.steps:
            name = f"{'' if plain.network == 'skip' else 'vanilla, '}{steps} steps"
            fewer[plain.network, steps] = replace(plain, name=name, family="fewer steps", steps=steps)
    return [fewer[key] for key in sorted(fewer, key=lambda key: (key[0], -key[1]))]
