"""Detectors: from clips or pictures as bytes to the features that FVD and FID compare.

Resizing and scaling are part of a detector, since they are part of the metric's protocol.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UserError
from . import i3d, inception
from .weights import I3D_WEIGHTS, INCEPTION_WEIGHTS, WeightFile, i3d_state_dict, read_arrays, read_script

__all__ = ["Detector", "load_detector"]

# Part of the fingerprint: change a word whenever the numbers that come out change.
_I3D_PROTOCOL = "bilinear to 224 without antialiasing, [-1, 1], logits; 1"
_INCEPTION_PROTOCOL = "TensorFlow 1 bilinear to 299, (x - 128) / 128, pooled; 1"


@dataclass(frozen=True)
class Detector:
    """A frozen network with its preprocessing.

    Attributes:
        name: "i3d" or "inception".
        dim: Numbers per clip or picture: 400 or 2048.
        fingerprint: Hex SHA-256 over the weights, the preprocessing and the arithmetic's dtype. Features of two
            detectors may be compared if theirs are equal.
        minimum_frames: The shortest clip it takes; 1 for pictures.
    """

    name: str
    dim: int
    fingerprint: str
    minimum_frames: int
    network: nn.Module
    prepare: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def features(self, batch: torch.Tensor) -> torch.Tensor:
        """Features of a batch; those of one clip do not depend on the others.

        Args:
            batch: uint8 [B, T, H, W, 3] for "i3d" (RGB; any size: it is resized to 224x224 whatever its shape),
                [B, H, W, 3] for "inception".

        Returns:
            float32 [B, dim], on the CPU.

        Raises:
            UserError: The clips have fewer frames than `minimum_frames`.
            ValueError: Another dtype or shape.
        """
        self._check(batch)
        # Neither autocast nor TensorFloat-32, whatever the caller's settings: they would be another detector.
        with torch.autocast(self.device.type, enabled=False), _ieee_convolutions():
            features = self.network(self.prepare(batch.to(self.device)).to(self.dtype))
        if features.shape != (len(batch), self.dim):
            raise ValueError(f"The network gave {list(features.shape)} instead of [{len(batch)}, {self.dim}].")
        return features.float().cpu()

    def class_probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """Probabilities of the 400 classes of Kinetics [B, 400], for "i3d"; arguments and errors as `features`.

        Raises:
            ValueError: This is not "i3d": the features of "inception" are not classes.
        """
        if self.name != "i3d":
            raise ValueError(f"The detector {self.name} does not classify.")
        return self.features(batch).softmax(dim=1)

    def check_frames(self, count: int) -> None:
        """Raise UserError if clips of so many frames are too short for it."""
        if count < self.minimum_frames:
            raise UserError(
                f"I3D needs clips of at least {self.minimum_frames} frames, these have {count}: "
                "use longer clips or another metric."
            )

    def _check(self, batch: torch.Tensor) -> None:
        axes = "[B, T, H, W, 3]" if self.name == "i3d" else "[B, H, W, 3]"
        if batch.dtype != torch.uint8 or batch.dim() != axes.count(",") + 1 or batch.shape[-1] != 3 or not len(batch):
            raise ValueError(f"{self.name} takes uint8 {axes}, not {batch.dtype} {list(batch.shape)}.")
        if self.name == "i3d":
            self.check_frames(batch.shape[1])


def load_detector(
    name: str,
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Detector:
    """A detector with the published weights, verified by their hash.

    Args:
        name: "i3d" (FVD; protocol of StyleGAN-V, Skorokhodov et al., CVPR 2022) or "inception" (FID, KID).
        path: File of the weights; None: where the download command puts them, from the working folder. For "i3d"
            it may also be StyleGAN-V's `i3d_torchscript.pt`, told by its content, whose hash nobody has published:
            it is part of the fingerprint.
        device: Where to compute.
        dtype: Of weights and arithmetic; published figures are float32.

    Raises:
        UserError: Unknown name; weights missing, unreadable, or not the known ones.

    Example:
        >>> features = load_detector("i3d").features(clips)  # uint8 [B, 16, 256, 256, 3] -> float32 [B, 400]
    """
    device = torch.device(device)
    if name == "i3d":
        file = WeightFile(I3D_WEIGHTS, path)
        network = _StyleganV(file, device) if file.is_script else _published_i3d(file)
        dim, frames, prepare, protocol = 400, i3d.MINIMUM_FRAMES, _prepare_clips, _I3D_PROTOCOL
    elif name == "inception":
        file = WeightFile(INCEPTION_WEIGHTS, path)
        file.verify()
        network = read_script(file, device)
        dim, frames, prepare, protocol = 2048, 1, inception.prepare, _INCEPTION_PROTOCOL
    else:
        raise UserError(f"There is no detector '{name}': choose i3d or inception.")
    network = network.to(device, dtype).eval()
    words = f"{file.sha256} {protocol} {dtype}"
    fingerprint = hashlib.sha256(words.encode()).hexdigest()
    return Detector(name, dim, fingerprint, frames, network, prepare, device, dtype)


@contextmanager
def _ieee_convolutions() -> Iterator[None]:
    """No TensorFloat-32 in convolutions, which NVIDIA GPUs use by default; neither network has other products."""
    cudnn = torch.backends.cudnn
    if not hasattr(getattr(cudnn, "conv", None), "fp32_precision"):  # before torch 2.9
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
        return
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def _prepare_clips(clips: torch.Tensor) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, 224, 224] in [-1, 1], channels last in memory."""
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).float()
    if frames.shape[2:] != (i3d.SIDE, i3d.SIDE):
        frames = F.interpolate(frames, (i3d.SIDE, i3d.SIDE), mode="bilinear", align_corners=False)
    return frames.div(127.5).sub(1).unflatten(0, clips.shape[:2]).transpose(1, 2)


def _published_i3d(file: WeightFile) -> nn.Module:
    file.verify()
    network = i3d.I3D()
    try:
        network.load_state_dict(i3d_state_dict(read_arrays(file.content)))
    except (ValueError, RuntimeError) as error:  # cannot happen to the file with this hash
        raise UserError(f"{file.path} holds no I3D weights: {error}.") from error
    return network.to(memory_format=torch.channels_last_3d)


class _StyleganV(nn.Module):
    """StyleGAN-V's TorchScript of the same network, called without its own resizing and scaling.

    Raises:
        UserError: The file is TorchScript of something else.
    """

    def __init__(self, file: WeightFile, device: torch.device):
        super().__init__()
        self.script = read_script(file, device)
        names = {argument.name for argument in self.script.forward.schema.arguments}
        if not {"rescale", "resize", "return_features"} <= names:
            raise UserError(f"{file.path} is TorchScript, but not the I3D of StyleGAN-V: its forward takes others.")

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, 224, 224] in [-1, 1] -> [B, 400]."""
        return self.script(clips, rescale=False, resize=False, return_features=True)
