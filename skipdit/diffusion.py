"""The training loss of DiT and Latte: noise (or v) prediction plus a variational bound that trains the variance.

Improved DDPM (Nichol & Dhariwal 2021), "hybrid" objective without its 1/1000 scale on the bound.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .schedulers import TRAINING_SCHEDULE

__all__ = [
    "Objective",
    "add_noise",
    "discretized_gaussian_log_likelihood",
    "noise_schedule",
    "training_losses",
    "variational_bound",
]


PREDICTIONS = ("epsilon", "v_prediction")
WEIGHTINGS = ("none", "min_snr", "soft_min_snr", "debiased")


@dataclass
class Objective:
    """What the network predicts and how much each timestep counts; the defaults are the published recipe.

    Attributes:
        prediction: "epsilon", the noise, or "v_prediction", sqrt(abar) noise - sqrt(1 - abar) clean (Salimans & Ho
            2022).
        zero_terminal_snr: Rescale the schedule so that the last timestep is pure noise (Lin et al. 2023, algorithm
            1); needs v_prediction, for noise is no prediction there.
        weighting: Of the squared error by SNR = abar / (1 - abar): "none"; "min_snr", min(SNR, gamma) in clean units
            (Hang et al. 2023); "soft_min_snr", SNR gamma / (SNR + gamma) (Crowson et al. 2024); "debiased",
            sqrt(SNR) (Yu et al. 2023). The variational bound is never weighted.
        snr_gamma: Of the first two.
    """

    prediction: str = "epsilon"
    zero_terminal_snr: bool = False
    weighting: str = "none"
    snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        for name, choices in (("prediction", PREDICTIONS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"objective.{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("objective.zero_terminal_snr needs objective.prediction=v_prediction.")
        if not self.snr_gamma > 0:
            raise ValueError(f"objective.snr_gamma must be above 0, not {self.snr_gamma}.")

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """What `make_scheduler` must be told of it."""
        settings: dict[str, Any] = {"prediction_type": self.prediction}
        return {**settings, "rescale_betas_zero_snr": True} if self.zero_terminal_snr else settings

    def weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """Factor of each sample's squared error; timestep [B], result [B]."""
        if self.weighting == "none":
            return torch.ones(timestep.shape, device=timestep.device)
        tables = noise_schedule(timestep.device, self.zero_terminal_snr)
        signal, noise = tables["signal"][timestep] ** 2, tables["spread"][timestep] ** 2
        snr = signal / noise
        clean_weight = {
            "min_snr": snr.clamp(max=self.snr_gamma),
            "soft_min_snr": snr * self.snr_gamma / (snr + self.snr_gamma),
            "debiased": snr.sqrt(),
        }[self.weighting]
        # The error of the clean sample is that of the noise / SNR, and that of v / (SNR + 1).
        return clean_weight / (snr if self.prediction == "epsilon" else snr + 1)


PUBLISHED = Objective()


@lru_cache(maxsize=8)
def noise_schedule(device: torch.device, zero_terminal_snr: bool = False) -> dict[str, torch.Tensor]:
    """Tables [1000] in float32, computed in float64: what q(x_t | x_0) and q(x_{t-1} | x_t, x_0) need (Ho et al. 2020).

    Returns:
        "signal" sqrt(abar), "spread" sqrt(1 - abar), "inverse_signal", "inverse_ratio" sqrt(1/abar - 1) (both infinite
        at the end if `zero_terminal_snr`), "clean_weight" and "noisy_weight" of the posterior mean (eq. 7), "log_beta"
        and "log_posterior_variance" (clipped at t=0, where it would be -inf), the two ends of the learned variance.
    """
    steps = TRAINING_SCHEDULE["num_train_timesteps"]
    beta = torch.linspace(TRAINING_SCHEDULE["beta_start"], TRAINING_SCHEDULE["beta_end"], steps, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    if zero_terminal_snr:
        signal = alpha_bar.sqrt()
        alpha_bar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    alpha = alpha_bar / previous
    beta = 1 - alpha
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    tables = {
        "signal": alpha_bar.sqrt(),
        "spread": (1 - alpha_bar).sqrt(),
        "inverse_signal": alpha_bar.rsqrt(),
        "inverse_ratio": (1 / alpha_bar - 1).sqrt(),
        "clean_weight": beta * previous.sqrt() / (1 - alpha_bar),
        "noisy_weight": (1 - previous) * alpha.sqrt() / (1 - alpha_bar),
        "log_beta": beta.log(),
        "log_posterior_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
    }
    return {name: table.float().to(device) for name, table in tables.items()}


def add_noise(
    clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, zero_terminal_snr: bool = False
) -> torch.Tensor:
    """Sample x_t of q(x_t | x_0): clean and noise [B, ...], timestep [B] in 0..999."""
    tables = noise_schedule(clean.device, zero_terminal_snr)
    return _at(tables["signal"], timestep, clean) * clean + _at(tables["spread"], timestep, clean) * noise


def training_losses(
    model: Callable,
    clean: torch.Tensor,
    timestep: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    objective: Objective = PUBLISHED,
    **model_inputs: torch.Tensor | int,
) -> dict[str, torch.Tensor]:
    """Loss of each sample.

    Args:
        model: A backbone; with `learn_sigma` its output has twice the channels of `clean`.
        clean: Scaled latents [B, C, (F,) height, width].
        timestep: [B], integers 0..999.
        noise: Standard normal, shaped as `clean`.
        class_labels: [B], null class where guidance dropout struck; None for an unconditional model.
        objective: What is predicted, over which schedule, with which weights.
        **model_inputs: Passed to the model (joint images: `num_images`, `image_class_labels`).

    Returns:
        "mse" (of the prediction, unweighted), "vb" (bits per dimension; 0 without learned variance) and "loss", the
        weighted mse plus vb; each [B], float32.
    """
    noisy = add_noise(clean, noise, timestep, objective.zero_terminal_snr)
    output = model(noisy, timestep, class_labels, return_dict=False, **model_inputs)[0].float()
    channels = clean.shape[1]
    predicted = output[:, :channels]
    tables = noise_schedule(clean.device, objective.zero_terminal_snr)
    target = noise
    if objective.prediction == "v_prediction":
        target = _at(tables["signal"], timestep, clean) * noise - _at(tables["spread"], timestep, clean) * clean
    mse = _mean_per_sample((predicted - target) ** 2)
    vb = torch.zeros_like(mse)
    if output.shape[1] == 2 * channels:
        # The bound trains the variance alone: the prediction enters it as a constant.
        vb = variational_bound(predicted.detach(), output[:, channels:], clean, noisy, timestep, objective)
    weighted = mse if objective.weighting == "none" else objective.weight(timestep) * mse
    return {"loss": weighted + vb, "mse": mse, "vb": vb}


def variational_bound(
    predicted: torch.Tensor,
    variance_logits: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    objective: Objective = PUBLISHED,
) -> torch.Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t=0 the decoder's negative log-likelihood; bits per dimension.

    Args:
        predicted: What `objective` says: noise or v.
        variance_logits: In [-1, 1] between the posterior's log variance and log beta (Nichol & Dhariwal, eq. 15).

    Returns:
        [B].
    """
    tables = noise_schedule(clean.device, objective.zero_terminal_snr)

    def at(name: str) -> torch.Tensor:
        return _at(tables[name], timestep, clean)

    low, high = at("log_posterior_variance"), at("log_beta")
    log_variance = low + (variance_logits + 1) / 2 * (high - low)
    if objective.prediction == "epsilon":
        predicted_clean = at("inverse_signal") * noisy - at("inverse_ratio") * predicted
    else:
        predicted_clean = at("signal") * noisy - at("spread") * predicted
    mean = at("clean_weight") * predicted_clean + at("noisy_weight") * noisy
    true_mean = at("clean_weight") * clean + at("noisy_weight") * noisy

    kl = 0.5 * (log_variance - low + (low - log_variance).exp() + (true_mean - mean) ** 2 * (-log_variance).exp() - 1)
    nll = -discretized_gaussian_log_likelihood(clean, mean, 0.5 * log_variance)
    per_sample = torch.where(timestep == 0, _mean_per_sample(nll), _mean_per_sample(kl))
    return per_sample / math.log(2)


def discretized_gaussian_log_likelihood(
    values: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor
) -> torch.Tensor:
    """Log-probability of the 1/255-wide bin around each value in [-1, 1] (Ho et al. 2020, eq. 13).

    The normal's distribution function is the usual tanh approximation, as in the published code.
    """
    centred = values - mean
    inverse_std = (-log_std).exp()
    upper = _normal_cdf(inverse_std * (centred + 1 / 255))
    lower = _normal_cdf(inverse_std * (centred - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    left, right = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
    return torch.where(values < -0.999, left, torch.where(values > 0.999, right, inside))


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table: torch.Tensor, timestep: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Table entries of each sample, shaped to broadcast over `like`."""
    return table[timestep].reshape(-1, *[1] * (like.ndim - 1))


def _mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(dim=1)
