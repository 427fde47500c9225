"""`skipdit train-vae`: trains the small AutoencoderKL that the digits pipeline works in."""

import argparse
import time
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..config import load_config
from ..data import MovingDigits
from ..errors import UserError
from ..files import check_writable, written_whole

__all__ = [
    "AutoencoderConfig",
    "build_autoencoder",
    "latent_statistics",
    "reconstruction_psnr",
    "train_autoencoder",
]


@dataclass
class AutoencoderConfig:
    """What `skipdit train-vae` reads; configs/digits/vae.yaml is one."""

    output: str = "outputs/digits-vae"  # folder to write, in diffusers' format; replaced when it exists
    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one, else cpu
    bf16: bool = True  # autocast in training; statistics and PSNR are always measured in float32

    size: int = 32  # side of the frames in pixels
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 32])  # each after the first halves
    layers_per_block: int = 1
    norm_num_groups: int = 8
    latent_channels: int = 4

    steps: int = 2200
    batch_size: int = 64  # frames
    learning_rate: float = 2e-3  # peak, of a cosine schedule that ends at zero
    warmup_steps: int = 100
    kl_weight: float = 1e-4  # of the KL per latent value, against the squared error per pixel value
    num_workers: int = 0  # a batch takes a tenth of a step to draw
    log_every: int = 100

    eval_clips: int = 256  # held-out clips over which the latents' statistics and the PSNR are measured

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "eval_clips", "log_every", "latent_channels", "layers_per_block")
        for name in (*positive, "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("seed", "learning_rate", "warmup_steps", "kl_weight", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, as {getattr(self, name)} is.")
        if not self.block_out_channels:
            raise ValueError("block_out_channels needs at least one entry, for example [16, 32, 32].")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"block_out_channels {self.block_out_channels} must all be multiples of "
                f"norm_num_groups ({self.norm_num_groups}): change one or the other."
            )
        if self.size < 8 or self.size % self.downsampling:
            raise ValueError(
                f"size must be at least 8 and a multiple of {self.downsampling}, the downsampling of "
                f"{len(self.block_out_channels)} entries of block_out_channels, not {self.size}."
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, not {self.device!r}.")


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """Returns an untrained autoencoder: frames [B, 3, H, W] to latents [B, C, H / f, W / f]."""
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        latent_channels=config.latent_channels,
        sample_size=config.size,
        mid_block_add_attention=False,  # convolutions see a whole digit as it is
        force_upcast=False,  # float16 suffices
        scaling_factor=1.0,  # until it is measured
    )


def train_autoencoder(config: AutoencoderConfig) -> dict[str, float]:
    """Trains, measures and saves an autoencoder.

    Returns:
        `psnr` in dB on held-out handwriting, `scaling_factor`, `parameters`, `seconds` of training.

    Raises:
        UserError: no such device, or an output folder that cannot be written.
    """
    device = _device(config.device)
    check_writable(config.output)
    torch.manual_seed(config.seed)
    vae = build_autoencoder(config).to(device)
    seconds = _fit(vae, config, device)

    vae.eval().requires_grad_(False)
    _standardise_latents(vae, *latent_statistics(vae, _eval_frames(config, "train")))
    vae.half().float()  # what is measured is what is saved
    held_out = _eval_frames(config, "test")
    _, std = latent_statistics(vae, held_out, per_channel=False)
    vae.register_to_config(scaling_factor=1 / std.item())
    result = {
        "psnr": reconstruction_psnr(vae, held_out),
        "scaling_factor": vae.config.scaling_factor,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seconds": seconds,
    }
    with written_whole(config.output) as folder:
        vae.half().save_pretrained(folder)
    return result


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for, but torch sees no CUDA device: use device=cpu.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _fit(vae: AutoencoderKL, config: AutoencoderConfig, device: torch.device) -> float:
    """Runs the training steps; returns their seconds."""
    # Clips of one frame: each frame has its own digit and place, so a batch repeats nothing.
    frames = MovingDigits(num_frames=1, size=config.size, length=config.steps * config.batch_size, seed=config.seed)
    loader = DataLoader(frames, config.batch_size, num_workers=config.num_workers)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.learning_rate)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps)
    noise = torch.Generator(device).manual_seed(config.seed)
    started = time.perf_counter()
    with tqdm(loader, desc="train-vae", unit="step") as bar:
        for step, batch in enumerate(bar, 1):
            clean = batch["video"][:, 0].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                posterior = vae.encode(clean).latent_dist
                decoded = vae.decode(posterior.sample(noise)).sample
            mse = (decoded.float() - clean).square().mean()
            kl = _kl(posterior)
            optimizer.zero_grad(set_to_none=True)
            (mse + config.kl_weight * kl).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % config.log_every == 0 or step == config.steps:
                rate = step * config.batch_size / (time.perf_counter() - started)
                bar.write(f"step {step}/{config.steps}  mse {mse:.5f}  kl {kl:.3f}  {rate:.0f} frames/s")
    return time.perf_counter() - started


def _kl(posterior) -> torch.Tensor:
    """Returns the posterior's KL divergence from a unit Gaussian, in nats per latent value."""
    return posterior.kl().float().mean() / posterior.mean[0].numel()


def _eval_frames(config: AutoencoderConfig, split: str) -> torch.Tensor:
    """Returns frames [N, 3, H, W] of clips that the training never saw."""
    clips = MovingDigits(size=config.size, length=config.eval_clips, seed=config.seed + 1, split=split)
    return torch.cat([clip["video"] for clip in clips])


def _batches(vae: AutoencoderKL, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(chunk.to(vae.device, vae.dtype) for chunk in frames.split(256))


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, frames: torch.Tensor, per_channel: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measures the unscaled latents (the posterior's means) of frames [N, 3, H, W] in [-1, 1].

    Returns:
        Their mean and standard deviation: [C] each, or scalars over all values with `per_channel=False`.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in _batches(vae, frames)])
    axes = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    return latents.mean(axes), latents.std(axes)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, frames: torch.Tensor) -> float:
    """Returns the PSNR of decoded posterior means in dB, averaged over frames [N, 3, H, W] in [-1, 1]."""
    errors = []
    for batch in _batches(vae, frames):
        decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - batch).float().square().mean((1, 2, 3)))
    peak = 2.0  # of values in [-1, 1]
    return (10 * torch.log10(peak**2 / torch.cat(errors))).mean().item()


@torch.no_grad()
def _standardise_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Folds the channels' mean [C] and standard deviation [C] into the 1x1 convolutions around the latents.

    The reconstruction is unchanged. A diffusion model then meets every channel centred and at the same scale,
    which one scaling factor alone cannot give.
    """
    into, out_of = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[channels:] -= 2 * std.log()  # the rows that give the posterior's log-variance
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std[None, :, None, None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `skipdit train-vae`."""
    parser.add_argument("--config", default="configs/digits/vae.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")


def run(args: argparse.Namespace) -> None:
    """Trains as the config says and prints what came out."""
    config = load_config(AutoencoderConfig, args.config, args.overrides)
    result = train_autoencoder(config)
    print(
        f"{config.output}: PSNR {result['psnr']:.1f} dB on held-out handwriting, scaling_factor "
        f"{result['scaling_factor']:.4f}, {result['parameters']:,} parameters, {result['seconds']:.0f} s"
    )
