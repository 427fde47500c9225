"""What `skipdit evaluate` can be told; read without importing torch, so that its help is quick."""

from dataclasses import dataclass, field
from typing import Any

from ..config import nearest, setting

__all__ = ["METRICS", "PAIRED", "PROTOCOLS", "EvaluateConfig", "SideConfig"]

OF_CLIPS = ("fvd", "kvd", "precision", "recall", "is")
OF_FRAMES = ("fid", "kid")
PAIRED = ("psnr", "ssim", "temporal", "lpips")
METRICS = (*OF_CLIPS, *OF_FRAMES, *PAIRED)

PROTOCOLS = {
    "fvd2048_16f": {"clips": 2048, "num_frames": 16, "stride": 1},
    "fvd2048_128f": {"clips": 2048, "num_frames": 128, "stride": 1},
    "fvd2048_128f_subsample8f": {"clips": 2048, "num_frames": 16, "stride": 8},
}
"""Of StyleGAN-V (Skorokhodov et al. 2022), under their names there."""


@dataclass
class SideConfig:
    """One side of the comparison."""

    path: str = setting("", "folder of videos, frames, pictures or arrays; array file; pipeline; or digits")
    split: str | None = setting(None, "list of files relative to path, such as trainlist01.txt; null: all")
    frame_interval: int = setting(1, "every how many-th frame is taken")
    made_at: int | None = setting(None, "of generated clips: frame interval of the training data; null: recorded or 1")
    pictures: bool = setting(False, "every picture below path is a sample by itself, as in ImageNet")
    sampling: dict[str, Any] = setting({}, "of a pipeline: settings of skipdit sample, {steps: 50, cache: N2}")
    max_bad_share: float = setting(0.05, "of unreadable clips, 0..1; more are refused")

    def __post_init__(self) -> None:
        for key in ("frame_interval", "made_at"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value} must be 1 or more.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} must be in [0, 1].")


@dataclass
class EvaluateConfig:
    """Settings of `skipdit evaluate`."""

    real: SideConfig = field(default_factory=SideConfig)
    generated: SideConfig = field(default_factory=SideConfig)
    metrics: list[str] = setting(["fvd", "kvd", "precision", "recall"], f"of {', '.join(METRICS)}")
    protocol: str | None = setting(None, f"clips, num_frames and stride of {', '.join(PROTOCOLS)}")
    clips: int = setting(2048, "of each side, at most")
    num_frames: int | None = setting(None, "of a clip; null: the generated side's own, 16 for videos")
    size: int | None = setting(None, "pixels of a side; null: the generated side's own")
    frames_per_clip: int = setting(4, "evenly spaced frames of a clip that FID and KID see")
    seed: int = setting(0, "of the order and the starts of clips, and of random subsets")
    force: bool = setting(False, "compare two sides although their settings differ")
    i3d: str | None = setting(None, "weights of I3D: .ckpt, or StyleGAN-V's i3d_torchscript.pt; null: as downloaded")
    inception: str | None = setting(None, "TorchScript Inception-v3; null: as downloaded")
    batch_size: int = setting(8, "clips at once")
    num_workers: int = setting(2, "processes that decode and resize while the network computes; 0: none")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("fp32", "of the networks: fp32, or bf16 (faster, not for published figures)")
    cache_dir: str = setting("outputs/statistics", "folder for the statistics of real sides")
    output: str = setting("outputs/evaluation", "folder for evaluation.md and evaluation.json")

    def __post_init__(self) -> None:
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ValueError(f"No protocol {self.protocol!r}: {nearest(self.protocol, list(PROTOCOLS))}")
        for word in self.metrics:
            if word not in METRICS:
                raise ValueError(f"No metric {word!r}: {nearest(word, list(METRICS))}")
        if self.protocol is not None and (self.clips != 2048 or self.num_frames is not None):
            raise ValueError(f"protocol={self.protocol} says how many clips and frames: leave these out.")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype={self.dtype} must be fp32 or bf16.")
        if self.paired and (sets := [word for word in self.metrics if word not in PAIRED]):
            raise ValueError(
                f"metrics=[{', '.join(self.metrics)}]: {sets[0]} compares sets in random order, the others pairs in "
                "the order of the files: ask for them in two runs."
            )
        if not self.metrics:
            raise ValueError(f"metrics=[] asks for nothing: choose from {', '.join(METRICS)}.")
        for name, least in {"clips": 2, "frames_per_clip": 1, "seed": 0, "batch_size": 1, "num_workers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        for name in ("num_frames", "size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        for name in ("real", "generated"):
            if not getattr(self, name).path:
                raise ValueError(f"{name}.path is missing: pass {name}.path=<folder or file of clips>.")

    @property
    def paired(self) -> bool:
        """Whether clips are compared one with one."""
        return any(word in PAIRED for word in self.metrics)
