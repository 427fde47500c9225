"""What `train.py` and `skipdit train` read; every key is used by the trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = [
    "DataConfig",
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
    precompute_latents: bool = False  # encode the set once at the start and keep its latents in memory
    encode_batch: int = 256  # frames that the autoencoder encodes at once
    num_workers: int = 1  # decoding processes per training process


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), in its fused form."""

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
    warmup_power: float = 2 / 3  # at step s the decay is at most 1 - s ** -warmup_power; 0.75 suits short runs


@dataclass
class PreviewConfig:
    """Grids of samples written while it trains."""

    every: int = 1000  # steps; 0: never
    classes: list[Any] = field(default_factory=list)  # indices or names, repeats allowed; empty: one of each
    num_samples: int = 4  # of an unconditional model
    guidance_scale: float = 4.0
    sampler: str = "ddim"
    steps: int = 50
    cache: str = "off"  # Skip-Cache as N<interval>-<start>-<stop>, for example N2-900-50
    seed: int = 0


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
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    output: str = "outputs/train"
    max_steps: int = 100_000
    batch_size: int = 32  # clips per optimizer step, over all processes and accumulated passes
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0  # 0: never clip
    clip_after_step: int = 0  # the published recipe clips only after a while
    max_dropped_steps: int = 100  # so many non-finite steps in a row stop the run
    seed: int = 3407

    mixed_precision: str = "no"  # no, bf16 or fp16
    compile: bool = False
    gradient_checkpointing: bool = False

    log_every: int = 100
    save_every: int = 1000
    keep_last: int = 3  # checkpoints; 0: all
    resume: str | None = None  # latest, the path of a checkpoint, or null for a new run
    export_dtype: str = "float16"  # of output/pipeline
    tracker: str | None = None  # tensorboard or null

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: One sentence that names the key.
        """
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "save_every"):
            _at_least(1, name, getattr(self, name))
        for name in ("keep_last", "seed", "max_grad_norm", "clip_after_step"):
            _at_least(0, name, getattr(self, name))
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
        if len(self.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise UserError(f"optimizer.betas must be two numbers in [0, 1), not {self.optimizer.betas}.")
        if not 0 <= self.ema.decay < 1:
            raise UserError(f"ema.decay must be in [0, 1), not {self.ema.decay}.")
        _one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _one_of("export_dtype", self.export_dtype, ("float32", "float16", "bfloat16"))
        _one_of("tracker", self.tracker, (None, "tensorboard"))

    def per_pass(self, processes: int) -> int:
        """Clips that one process takes in one forward pass.

        Raises:
            UserError: The global batch does not divide.
        """
        passes = processes * self.gradient_accumulation_steps
        if self.batch_size % passes:
            raise UserError(
                f"batch_size={self.batch_size} does not divide by {processes} process(es) times "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: choose a multiple of "
                f"{passes}."
            )
        return self.batch_size // passes

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
