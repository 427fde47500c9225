"""What `train.py` and `skipdit train` read; every key is used by the trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diffusion import Objective
from ..errors import UserError

__all__ = [
    "DataConfig",
    "DiagnosticsConfig",
    "EMAConfig",
    "InitConfig",
    "LRScheduleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreviewConfig",
    "TrainConfig",
]


@dataclass
class ModelConfig:
    """The network."""

    name: str = "Latte"  # Latte, DiT, or a preset such as Latte-XL/2-skip
    arguments: dict[str, Any] = field(default_factory=dict)  # of the constructor; they replace the preset's own


@dataclass
class InitConfig:
    """Trained weights to start from; a resumed run has its own."""

    from_: str | None = None  # `init.from`: a diffusers folder, or a .pt or .safetensors file
    weights: str = "ema"  # of a training checkpoint: ema or model
    skips_only_steps: int = 0  # so many steps train the long skips alone, then everything
    lr_scale: float = 1.0  # learning rate of loaded weights, as a share of that of fresh ones


@dataclass
class DataConfig:
    """The clips or pictures."""

    name: str = "digits"  # a key of skipdit.training.data.DATA_SETS
    arguments: dict[str, Any] = field(default_factory=dict)  # of the data set's class
    latents: str | None = None  # folder that `skipdit encode` wrote, read instead of the files
    precompute_latents: bool = False  # encode the set once at the start and keep its latents in memory
    encode_batch: int = 256  # frames that the autoencoder encodes at once
    num_workers: int = 1  # decoding processes per training process


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019)."""

    name: str = "adamw"  # adamw (fused) or adamw8bit (of bitsandbytes)
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8


@dataclass
class LRScheduleConfig:
    """Learning rate by step."""

    name: str = "constant_with_warmup"  # a schedule of diffusers.optimization, for example cosine
    warmup_steps: int = 0


@dataclass
class EMAConfig:
    """Moving average of the weights: what is sampled and exported."""

    decay: float = 0.9999
    # At step s the decay is at most 1 - s ** -warmup_power; 0.75 suits short runs; null: the decay from the start on.
    warmup_power: float | None = 2 / 3
    on_cpu: bool = False  # keep it in the host's memory


@dataclass
class PreviewConfig:
    """Grids of samples written while it trains."""

    every: int = 1000  # steps; 0: never
    classes: list[Any] = field(default_factory=list)  # indices or names, repeats allowed; empty: one of each
    num_samples: int = 4  # of an unconditional model
    guidance_scale: float = 4.0
    sampler: str = "ddim"
    steps: int = 50
    cache: list[str] = field(default_factory=lambda: ["off"])  # a grid each: off, N2-900-50, N3-900-50-F2
    seed: int = 0


@dataclass
class DiagnosticsConfig:
    """What the long skips do, measured while it trains."""

    every: int = 0  # steps; 0: never
    clips: int = 4  # of the batch, at most
    steps: int = 50  # of the sampler whose neighbouring steps are compared


@dataclass
class FvdConfig:
    """Frechet video distance of the averaged weights to the training data, while it trains."""

    every: int = 0  # steps; 0: never
    clips: int = 256  # sampled each time, over all processes; labels take turns
    real_clips: int = 2048  # of the training data, at most; their statistics are kept in the output folder
    guidance_scale: float = 1.0
    steps: int = 50
    batch_size: int = 8  # clips at once on each process
    seed: int = 0
    i3d: str | None = None  # weights of I3D; null: as downloaded (metrics/i3d-kinetics-400)


@dataclass
class TrainConfig:
    """One training run. `batch_size` is global: the same run on more processes takes less on each."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: str = "pretrained/vae"  # folder of an AutoencoderKL in diffusers' format
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    objective: Objective = field(default_factory=Objective)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    fvd: FvdConfig = field(default_factory=FvdConfig)

    output: str = "outputs/train"
    max_steps: int = 100_000
    batch_size: int = 32  # clips per optimizer step, over all processes and accumulated passes
    micro_batch_size: int | None = None  # most clips that one process takes at once; null: its whole share
    max_grad_norm: float = 1.0  # 0: never clip
    clip_after_step: int = 0  # the published recipe clips only after a while
    max_dropped_steps: int = 100  # so many non-finite steps in a row stop the run
    seed: int = 3407

    mixed_precision: str = "no"  # no, bf16 or fp16
    tf32: bool = True  # float32 products on the matrix units of NVIDIA GPUs from Ampere on
    compile: bool = False
    # Attention, norm and gate kernels where they run: CUDA cards of compute capability 8.0 or more with Triton. Off by
    # default until they have been measured on one.
    kernels: bool = False
    gradient_checkpointing: bool = False

    log_every: int = 100
    save_every: int = 1000
    keep_last: int = 3  # checkpoints; 0: all
    keep_every: int = 0  # steps whose checkpoints stay for good; 0: none
    resume: str | None = None  # latest, the path of a checkpoint, or null for a new run
    export_dtype: str = "float16"  # of output/pipeline
    tracker: str | None = "tensorboard"  # tensorboard, wandb or null

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: One sentence that names the key.
        """
        for name in ("max_steps", "batch_size", "log_every", "save_every"):
            _at_least(1, name, getattr(self, name))
        for name in ("keep_last", "keep_every", "seed", "max_grad_norm", "clip_after_step"):
            _at_least(0, name, getattr(self, name))
        if self.micro_batch_size is not None:
            _at_least(1, "micro_batch_size", self.micro_batch_size)
        _at_least(0, "diagnostics.every", self.diagnostics.every)
        _at_least(1, "diagnostics.clips", self.diagnostics.clips)
        _at_least(2, "diagnostics.steps", self.diagnostics.steps)
        _at_least(0, "fvd.every", self.fvd.every)
        _at_least(0, "fvd.seed", self.fvd.seed)
        for name, least in (("clips", 2), ("real_clips", 2), ("steps", 1), ("batch_size", 1)):
            _at_least(least, f"fvd.{name}", getattr(self.fvd, name))
        _one_of("optimizer.name", self.optimizer.name, ("adamw", "adamw8bit"))
        _at_least(1, "max_dropped_steps", self.max_dropped_steps)
        _at_least(1, "data.encode_batch", self.data.encode_batch)
        _at_least(0, "data.num_workers", self.data.num_workers)
        _at_least(0, "lr_schedule.warmup_steps", self.lr_schedule.warmup_steps)
        _at_least(0, "preview.every", self.preview.every)
        _at_least(1, "preview.steps", self.preview.steps)
        _at_least(1, "preview.num_samples", self.preview.num_samples)
        _at_least(0, "init.skips_only_steps", self.init.skips_only_steps)
        _one_of("init.weights", self.init.weights, ("ema", "model"))
        if not self.init.lr_scale > 0:
            raise UserError(f"init.lr_scale must be above 0, not {self.init.lr_scale}.")
        if not self.optimizer.lr > 0:
            raise UserError(f"optimizer.lr must be above 0, not {self.optimizer.lr}.")
        _at_least(0, "optimizer.weight_decay", self.optimizer.weight_decay)
        _at_least(0, "optimizer.eps", self.optimizer.eps)
        if len(self.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise UserError(f"optimizer.betas must be two numbers in [0, 1), not {self.optimizer.betas}.")
        if not 0 <= self.ema.decay < 1:
            raise UserError(f"ema.decay must be in [0, 1), not {self.ema.decay}.")
        if self.ema.warmup_power is not None and not self.ema.warmup_power > 0:
            raise UserError(f"ema.warmup_power must be above 0 or null, not {self.ema.warmup_power}.")
        _one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _one_of("export_dtype", self.export_dtype, ("float32", "float16", "bfloat16"))
        _one_of("tracker", self.tracker, (None, "tensorboard", "wandb"))

    def passes(self, processes: int) -> int:
        """Forward passes of each process in one step: the fewest equal ones of at most `micro_batch_size` clips.

        Raises:
            UserError: The global batch does not divide.
        """
        if self.batch_size % processes:
            raise UserError(
                f"batch_size={self.batch_size} does not divide by {processes} process(es): choose a multiple of them."
            )
        share = self.batch_size // processes
        most = self.micro_batch_size or share
        return next(passes for passes in range(1, share + 1) if share % passes == 0 and share // passes <= most)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)


def _at_least(lowest: float, name: str, value: float) -> None:
    if not value >= lowest:
        raise UserError(f"{name} must be at least {lowest}, not {value}.")


def _one_of(name: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        words = ", ".join("null" if choice is None else choice for choice in choices)
        raise UserError(f"{name} must be one of {words}, not {value!r}.")
