"""Pipelines of the real classes with random weights, small enough for a test of a second."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from skipdit import SkipDiTPipeline, SkipDiTTransformer2DModel, SkipLattePipeline, SkipLatteTransformer3DModel
from skipdit.schedulers import make_scheduler

NAMES = ["zero", "one", "two"]


def tiny_pipeline(kind: str = "video", num_classes: int | None = 3, skip: str | None = "linear", num_frames: int = 4):
    """Clips of a few frames of 16x16 pixels (or such pictures); every weight random, so that all matter."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "hidden_size": 16, "num_heads": 2, "num_classes": num_classes, "skip": skip}
    if kind == "video":
        transformer = SkipLatteTransformer3DModel(depth=8, num_frames=num_frames, **sizes)
    else:
        transformer = SkipDiTTransformer2DModel(depth=12, **sizes)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(1)  # the same whatever the network
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipeline_class = SkipLattePipeline if kind == "video" else SkipDiTPipeline
    names = NAMES[:num_classes] if num_classes else None
    return pipeline_class(transformer.eval(), vae.eval(), make_scheduler("ddim"), names)


def save_pipelines(root: Path) -> dict[str, Path]:
    """Saved pipelines: clips and pictures of three classes, unconditional clips, a vanilla model."""
    kinds = {
        "video": tiny_pipeline(),
        "image": tiny_pipeline("image"),
        "unconditional": tiny_pipeline(num_classes=None),
        "vanilla": tiny_pipeline(skip=None),
    }
    for name, pipeline in kinds.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in kinds}
