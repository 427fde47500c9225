"""What `skipdit compare` can be told; read without importing torch, so that its help is quick."""

import math
from dataclasses import dataclass, field

from ...config import setting
from ..evaluate_config import SideConfig

__all__ = ["CompareConfig"]


@dataclass
class CompareConfig:
    """Settings of `skipdit compare`."""

    model: str = setting("pretrained/digits", "folder of a pipeline of clips with long skips")
    twin: str | None = setting(None, "pipeline of the same network without skips, for the rival caches; null: none")
    caches: list[str] = setting(
        ["N2", "N3", "N4", "N6"], "Skip-Cache settings of the model, N2, N2-900-50, N2-900-50-F2"
    )
    peers: list[str] = setting(
        ["pab:2", "taylorseer:3", "fbcache:0.05", "magcache:0.06"], "diffusers' caches on the twin, <name>:<strength>"
    )
    equal_time: bool = setting(True, "beside each cache, as many steps without one as take the same time")
    equal_operations: bool = setting(
        False, "as many as take the same operations instead, for a machine that is not quiet"
    )
    real: SideConfig = field(default_factory=SideConfig)
    real_clips: int = setting(2048, "of the real side, at most")
    clips: int = setting(64, "of each setting; labels take turns")
    steps: int = setting(50, "sampler steps")
    sampler: str | None = setting(None, "ddim, ddpm, dpm++ or unipc; null: the pipeline's")
    guidance_scale: float | None = setting(None, "1: no guidance; null: the pipeline's 7")
    seed: int = setting(0, "of the noise, the same for all settings")
    batch_size: int = setting(8, "clips at once")
    lpips: bool = setting(False, "LPIPS too; needs torchvision with its AlexNet weights")
    made_at: int | None = setting(None, "frame interval of the model's training data; null: recorded or 1")
    force: bool = setting(False, "measure distances to real clips although their settings differ")
    i3d: str | None = setting(None, "weights of I3D; null: as downloaded")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("fp32", "fp32, bf16 or fp16")
    cache_dir: str = setting("outputs/statistics", "folder for the statistics of real sides")
    output: str = setting("outputs/compare", "folder for compare.md, compare.csv, compare.json and pictures")

    def __post_init__(self) -> None:
        for name, least in {"clips": 2, "real_clips": 2, "steps": 2, "seed": 0, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be finite and 0 or more; 1: no guidance.")
        if self.steps > 1000:
            raise ValueError(f"steps={self.steps} must be 1000 or less, the steps of training.")
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"dtype={self.dtype} must be fp32, bf16 or fp16.")
        if not self.caches and not (self.peers and self.twin):
            raise ValueError("caches=[] leaves nothing to compare: give a cache, or a twin with peers.")
