"""The optimizer, what learns at which rate, and the average of the weights."""

import importlib.util
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..errors import UserError
from .config import EMAConfig, OptimizerConfig, TrainConfig
from .initial import is_skip

__all__ = ["WeightAverage", "build_optimizer", "lr_multiplier", "set_learning_rates"]


def build_optimizer(model: nn.Module, config: OptimizerConfig, loaded: Collection[str]) -> torch.optim.Optimizer:
    """AdamW over groups by what decides a parameter's learning rate: loaded or fresh, long skip or not.

    Raises:
        UserError: The 8-bit kind is asked for where bitsandbytes is not installed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name in loaded, is_skip(name)), []).append(parameter)
    settings = {
        "params": [{"params": members, "loaded": kind[0], "skips": kind[1]} for kind, members in groups.items()],
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(**settings, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("optimizer.name=adamw8bit needs the package bitsandbytes: install it or use adamw.")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(**settings)


def lr_multiplier(config: TrainConfig) -> Callable[[int], float]:
    """Learning rate of a step as a share of the base rate: diffusers' schedule as a function."""
    cfg = config.lr_schedule
    name = "constant_with_warmup" if cfg.name == "constant" else cfg.name
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    try:
        schedule = get_scheduler(
            name, placeholder, num_warmup_steps=cfg.warmup_steps, num_training_steps=config.max_steps
        )
    except (ValueError, TypeError) as error:  # a TypeError: of schedules that need more than their warm-up
        raise UserError(f"lr_schedule.name={cfg.name!r}: {str(error).splitlines()[0]}.") from error
    return schedule.lr_lambdas[0]


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, multiplier: float) -> float:
    """Set the rates of a step; returns that of fresh weights."""
    lr = config.optimizer.lr * multiplier
    for group in optimizer.param_groups:
        waits = step < config.init.skips_only_steps and not group["skips"]
        group["lr"] = 0.0 if waits else lr * (config.init.lr_scale if group["loaded"] else 1.0)
    return lr


class WeightAverage:
    """Exponential moving average by diffusers' EMAModel, beside the weights or on the CPU.

    Of sharded weights (FSDP2) each process averages its own shards.
    """

    def __init__(self, names: list[str], parameters: Iterable[nn.Parameter], config: EMAConfig):
        self.names, self.parameters, self.on_cpu = names, list(parameters), config.on_cpu
        warmup: dict[str, Any] = {"min_decay": config.decay}
        if config.warmup_power is not None:
            warmup = {"use_ema_warmup": True, "power": config.warmup_power}
        self.ema = EMAModel(self._current(), decay=config.decay, foreach=True, **warmup)

    def _current(self) -> list[torch.Tensor]:
        if not self.on_cpu:
            return self.parameters
        return [parameter.detach().cpu().requires_grad_(parameter.requires_grad) for parameter in self.parameters]

    def step(self) -> None:
        """Take in the weights as they are."""
        self.ema.step(self._current())

    def state(self) -> dict[str, torch.Tensor]:
        """Averages by parameter name, whole and on the CPU; with sharded weights every process must call it."""
        return {name: _whole(value) for name, value in zip(self.names, self.ema.shadow_params, strict=True)}

    def load(self, averages: dict[str, torch.Tensor], updates: int) -> None:
        """Take over what `state` gave after so many updates."""
        for name, own in zip(self.names, self.ema.shadow_params, strict=True):
            value = averages[name].to(own.device, own.dtype)
            own.copy_(_like(value, own))
        self.ema.optimization_step = updates

    @property
    def updates(self) -> int:
        """How often `step` was called, over all resumed runs."""
        return self.ema.optimization_step


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()


def _like(value: torch.Tensor, other: Any) -> torch.Tensor:
    """The value distributed as the other tensor is."""
    if not hasattr(other, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, other.device_mesh, other.placements)
