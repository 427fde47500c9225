"""Samplers: diffusers schedulers set up to give the published samplers' numbers, and faster modern ones."""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

TRAINING_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
"""The noise schedule of DiT and Latte: linear betas, noise prediction."""


class RespacedDDIMScheduler(DDIMScheduler):
    """DDIM (Song et al. 2021, eq. 12) that steps to the next timestep of its own list.

    diffusers' DDIM steps to `t - 1000 // n`, which misses the list for timesteps spread over [0, 999] with both ends
    (9% off after 50 steps); the published samplers use the list. After the last timestep alpha-bar is 1. The
    coefficients are Python floats, so a step reads nothing from the device if `timestep` is a number.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of any shape.

        Args:
            model_output: Predicted noise (or what `prediction_type` says).
            timestep: The current timestep, one of `self.timesteps`.
            sample: The noisy sample x_t.
            eta: 0 is deterministic, 1 adds as much noise as DDPM.
            generator: Source of that noise.
            return_dict: False returns (previous sample, predicted clean sample).
        """
        alpha, alpha_prev = self._alphas(int(timestep))
        clean, noise = self._clean_and_noise(model_output, sample, alpha)
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        previous = math.sqrt(alpha_prev) * clean + math.sqrt(1 - alpha_prev - sigma**2) * noise
        if eta > 0:
            previous = previous + sigma * randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        if not return_dict:
            return previous, clean
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=clean)

    def _alphas(self, timestep: int) -> tuple[float, float]:
        """Alpha-bar at this timestep and at the next one of the list."""
        if self.num_inference_steps is None:
            raise ValueError("Call set_timesteps() before step().")
        timesteps = self._timesteps_on_host
        following = timesteps.index(timestep) + 1
        alpha = self._alpha_list[timestep]
        return alpha, self._alpha_list[timesteps[following]] if following < len(timesteps) else 1.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread `num_inference_steps` timesteps as `timestep_spacing` says."""
        super().set_timesteps(num_inference_steps, device)
        self._timesteps_on_host = self.timesteps.tolist()
        self._alpha_list = self.alphas_cumprod.tolist()

    def _clean_and_noise(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (sample - spread * model_output) / signal, model_output
        if kind == "sample":
            return model_output, (sample - signal * model_output) / spread
        return signal * sample - spread * model_output, signal * model_output + spread * sample  # v_prediction


SAMPLERS = ("ddim", "ddpm", "dpm++", "unipc")


def make_scheduler(name: str, **overrides: Any) -> SchedulerMixin:
    """A sampler over DiT's noise schedule.

    Args:
        name: "ddim" and "ddpm" give the published samplers' numbers (timesteps evenly over [0, 999], both ends
            included); "dpm++" (DPM-Solver++ 2M, Lu et al. 2022) and "unipc" (Zhao et al. 2023) need about 20 steps.
        **overrides: Further arguments of the diffusers class, for example `prediction_type="v_prediction"`.

    Raises:
        ValueError: The name is not known.
    """
    spacing = {"timestep_spacing": "linspace"}
    if name == "ddim":
        return RespacedDDIMScheduler(**{**TRAINING_SCHEDULE, **spacing, "clip_sample": False, **overrides})
    if name == "ddpm":
        settings = {**TRAINING_SCHEDULE, **spacing, "clip_sample": False, "variance_type": "learned_range"}
        return DDPMScheduler(**{**settings, **overrides})
    if name == "dpm++":
        settings = {**TRAINING_SCHEDULE, **spacing, "algorithm_type": "dpmsolver++", "solver_order": 2}
        return DPMSolverMultistepScheduler(**{**settings, **overrides})
    if name == "unipc":
        return UniPCMultistepScheduler(**{**TRAINING_SCHEDULE, **spacing, "solver_order": 2, **overrides})
    raise ValueError(f"No sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
