"""The training loss of DiT and Latte: noise prediction plus a variational bound that trains the variance.

Improved DDPM (Nichol & Dhariwal 2021), "hybrid" objective without its 1/1000 scale on the bound.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from .schedulers import TRAINING_SCHEDULE


@lru_cache(maxsize=8)
def noise_schedule(device: torch.device) -> dict[str, torch.Tensor]:
    """Tables [1000] in float32, computed in float64: what q(x_t | x_0) and q(x_{t-1} | x_t, x_0) need (Ho et al. 2020).

    Returns:
        "signal" sqrt(abar), "spread" sqrt(1 - abar), "inverse_signal", "inverse_ratio" sqrt(1/abar - 1),
        "clean_weight" and "noisy_weight" of the posterior mean (eq. 7), "log_beta" and "log_posterior_variance"
        (clipped at t=0, where it would be -inf), the two ends of the learned variance.
    """
    steps = TRAINING_SCHEDULE["num_train_timesteps"]
    beta = torch.linspace(TRAINING_SCHEDULE["beta_start"], TRAINING_SCHEDULE["beta_end"], steps, dtype=torch.float64)
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
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


def add_noise(clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Sample x_t of q(x_t | x_0): clean and noise [B, ...], timestep [B] in 0..999."""
    tables = noise_schedule(clean.device)
    return _at(tables["signal"], timestep, clean) * clean + _at(tables["spread"], timestep, clean) * noise


def training_losses(
    model: Callable,
    clean: torch.Tensor,
    timestep: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    **model_inputs: torch.Tensor | int,
) -> dict[str, torch.Tensor]:
    """Loss of each sample.

    Args:
        model: A backbone; with `learn_sigma` its output has twice the channels of `clean`.
        clean: Scaled latents [B, C, (F,) height, width].
        timestep: [B], integers 0..999.
        noise: Standard normal, shaped as `clean`.
        class_labels: [B], null class where guidance dropout struck; None for an unconditional model.
        **model_inputs: Passed to the model (joint images: `num_images`, `image_class_labels`).

    Returns:
        "mse" (noise prediction), "vb" (bits per dimension; 0 without learned variance) and "loss", their sum;
        each [B], float32.
    """
    noisy = add_noise(clean, noise, timestep)
    output = model(noisy, timestep, class_labels, return_dict=False, **model_inputs)[0].float()
    channels = clean.shape[1]
    predicted = output[:, :channels]
    mse = _mean_per_sample((predicted - noise) ** 2)
    vb = torch.zeros_like(mse)
    if output.shape[1] == 2 * channels:
        # The bound trains the variance alone: the noise prediction enters it as a constant.
        vb = variational_bound(predicted.detach(), output[:, channels:], clean, noisy, timestep)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def variational_bound(
    predicted_noise: torch.Tensor,
    variance_logits: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t=0 the decoder's negative log-likelihood; bits per dimension.

    Args:
        variance_logits: In [-1, 1] between the posterior's log variance and log beta (Nichol & Dhariwal, eq. 15).

    Returns:
        [B].
    """
    tables = noise_schedule(clean.device)

    def at(name: str) -> torch.Tensor:
        return _at(tables[name], timestep, clean)

    low, high = at("log_posterior_variance"), at("log_beta")
    log_variance = low + (variance_logits + 1) / 2 * (high - low)
    predicted_clean = at("inverse_signal") * noisy - at("inverse_ratio") * predicted_noise
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
