"""The I3D network (RGB, Kinetics-400) whose logits are the features of FVD.

Carreira and Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", CVPR 2017: Inception-v1
with every filter inflated to three dimensions. Modules carry the names of the published checkpoint. For inference
only: batch norm, which follows every convolution but the last, is folded into its weights (`weights.i3d_state_dict`).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["I3D", "MINIMUM_FRAMES", "SIDE", "same_padding"]

SIDE = 224  # pixels; the last pooling covers 7 x 7 positions, one for each 32 pixels
MINIMUM_FRAMES = 9  # halved three times, rounding up, they fill the two positions of the last pooling


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding before and after an axis by TensorFlow's rule 'SAME': ceil(size / stride) outputs, the odd one after.

    Example:
        >>> same_padding(224, kernel=7, stride=2)
        (2, 3)
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """Pad the last three axes of `x`; torch lists paddings from the last axis to the first."""
    axes = [same_padding(*axis) for axis in zip(x.shape[-3:], kernel, stride, strict=True)]
    padding = [amount for axis in reversed(axes) for amount in axis]
    return F.pad(x, padding, value=value) if any(padding) else x


class Unit3D(nn.Conv3d):
    """A convolution with padding 'SAME', its folded batch norm, and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        # At stride 1 'SAME' is the same on both sides, and the convolution can do it without a copy.
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, C', ceil(T / stride), ceil(H / stride), ceil(W / stride)], not negative."""
        if self.stride != (1, 1, 1):
            x = _pad_same(x, self.kernel_size, self.stride)
        return super().forward(x).relu_()


class SameMaxPool(nn.Module):
    """Max pooling with padding 'SAME': what is padded never wins."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> the same with each axis divided by its stride, rounded up."""
        return F.max_pool3d(_pad_same(x, self.kernel, self.stride, -torch.inf), self.kernel, self.stride)


class Mixed(nn.Module):
    """An inflated Inception module: four branches side by side (Figure 3 of the paper).

    Args:
        inputs: Channels that come in.
        first: Channels of the 1x1x1 branch.
        second: Channels of the first 3x3x3 branch, after its 1x1x1 convolution and at its end.
        third: The same of the second one.
        last: Channels of the branch that starts with max pooling.
    """

    def __init__(self, inputs: int, first: int, second: tuple[int, int], third: tuple[int, int], last: int):
        super().__init__()
        self.Branch_0 = _named(Conv3d_0a_1x1=Unit3D(inputs, first, 1))
        self.Branch_1 = _named(Conv3d_0a_1x1=Unit3D(inputs, second[0], 1), Conv3d_0b_3x3=Unit3D(*second, 3))
        self.Branch_2 = _named(Conv3d_0a_1x1=Unit3D(inputs, third[0], 1), Conv3d_0b_3x3=Unit3D(*third, 3))
        pool = SameMaxPool((3, 3, 3), (1, 1, 1))
        self.Branch_3 = _named(MaxPool3d_0a_3x3=pool, Conv3d_0b_1x1=Unit3D(inputs, last, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, sum of the branches' channels, T, H, W]."""
        return torch.cat([self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(x)], dim=1)


class I3D(nn.Module):
    """Clips to the 400 logits of Kinetics-400, averaged over time.

    Example:
        >>> logits = I3D().eval()(torch.zeros(1, 3, 16, 224, 224))  # [1, 400]; weights: `load_detector("i3d")`
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _named(
            Conv3d_1a_7x7=Unit3D(3, 64, 7, stride=2),
            MaxPool3d_2a_3x3=SameMaxPool((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=Unit3D(64, 64, 1),
            Conv3d_2c_3x3=Unit3D(64, 192, 3),
            MaxPool3d_3a_3x3=SameMaxPool((1, 3, 3), (1, 2, 2)),
            Mixed_3b=Mixed(192, 64, (96, 128), (16, 32), 32),
            Mixed_3c=Mixed(256, 128, (128, 192), (32, 96), 64),
            MaxPool3d_4a_3x3=SameMaxPool((3, 3, 3), (2, 2, 2)),
            Mixed_4b=Mixed(480, 192, (96, 208), (16, 48), 64),
            Mixed_4c=Mixed(512, 160, (112, 224), (24, 64), 64),
            Mixed_4d=Mixed(512, 128, (128, 256), (24, 64), 64),
            Mixed_4e=Mixed(512, 112, (144, 288), (32, 64), 64),
            Mixed_4f=Mixed(528, 256, (160, 320), (32, 128), 128),
            MaxPool3d_5a_2x2=SameMaxPool((2, 2, 2), (2, 2, 2)),
            Mixed_5b=Mixed(832, 256, (160, 320), (32, 128), 128),
            Mixed_5c=Mixed(832, 384, (192, 384), (48, 128), 128),
        )
        self.Logits = _named(Conv3d_0c_1x1=nn.Conv3d(1024, 400, 1))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Logits, before softmax.

        Args:
            clips: [B, 3, T, 224, 224] in [-1, 1], RGB, T >= 9.

        Returns:
            [B, 400].

        Raises:
            ValueError: The shape is another.
        """
        if (
            clips.dim() != 5
            or clips.shape[1] != 3
            or clips.shape[3:] != (SIDE, SIDE)
            or clips.shape[2] < MINIMUM_FRAMES
        ):
            raise ValueError(f"I3D takes clips [B, 3, T >= {MINIMUM_FRAMES}, {SIDE}, {SIDE}], not {list(clips.shape)}.")
        return self.head(self.trunk(clips))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Deep features [B, 1024, T / 8, 7, 7] -> logits [B, 400]: pool 2x7x7, classify each position, average."""
        areas = x.mean(dim=(3, 4), keepdim=True)  # torch has no average pooling in bfloat16 on the CPU
        pooled = (areas[:, :, 1:] + areas[:, :, :-1]) / 2
        return self.Logits(pooled).mean(dim=(2, 3, 4))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
