"""The training loss and the samplers: recorded numbers and closed forms."""

import math

import pytest
import torch
from golden_data import FAMILIES, golden, golden_model, relative_error

from skipdit.diffusion import add_noise, discretized_gaussian_log_likelihood, noise_schedule, training_losses
from skipdit.schedulers import SAMPLERS, make_scheduler


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_agree_with_the_published_code(family):
    tensors, _ = golden(family)
    inputs = [tensors[f"loss.{name}"] for name in ("clean", "timestep", "noise", "labels")]
    losses = training_losses(golden_model(family), *inputs)
    for name in ("mse", "vb", "loss"):
        assert relative_error(losses[name], tensors[f"loss.{name}"]) < 1e-5


def test_the_bound_trains_the_variance_alone():
    tensors, _ = golden("dit_skip")
    model = golden_model("dit_skip").requires_grad_(True)
    inputs = [tensors[f"loss.{name}"] for name in ("clean", "timestep", "noise", "labels")]
    training_losses(model, *inputs)["vb"].sum().backward()
    gradient = model.final_layer.linear.bias.grad.reshape(-1, 8)  # per patch position: 4 noise, 4 variance channels
    assert torch.equal(gradient[:, :4], torch.zeros_like(gradient[:, :4]))
    assert gradient[:, 4:].abs().min() > 0


def test_without_learned_variance_there_is_no_bound():
    losses = training_losses(
        lambda x, t, y, return_dict: (torch.zeros_like(x),), torch.zeros(2, 4, 8, 8), torch.tensor([5, 9]),
        torch.full((2, 4, 8, 8), 3.0),
    )  # fmt: skip
    assert losses["vb"].tolist() == [0, 0] and losses["loss"].tolist() == [9, 9]


def test_noise_schedule_closed_forms():
    tables = noise_schedule(torch.device("cpu"))
    assert tables["signal"][0].item() == pytest.approx(math.sqrt(1 - 1e-4), rel=1e-6)
    assert torch.allclose(tables["signal"] ** 2 + tables["spread"] ** 2, torch.ones(1000))
    # A perfect prediction of the clean sample at t=0 returns it: the posterior mean's weights are (1, 0) there.
    assert tables["clean_weight"][0].item() == pytest.approx(1.0) and tables["noisy_weight"][0].item() == 0.0
    clean, noise = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)
    noisy = add_noise(clean, noise, torch.tensor([500]))
    assert torch.allclose(noisy, tables["signal"][500] + 2 * tables["spread"][500])


def test_discretized_likelihood_sums_to_one_over_the_bins():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.2), (-0.9, 0.05), (0.0, 2.0)):
        log = discretized_gaussian_log_likelihood(bins, torch.tensor(mean), torch.tensor(math.log(std)))
        assert log.exp().sum().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("steps", [25, 50, 250])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_timesteps_spread_over_both_ends(name, steps):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(steps)
    expected = [round(i * 999 / (steps - 1)) for i in range(steps)][::-1]
    assert scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_with_a_perfect_model_recovers_the_clean_sample(kind):
    torch.manual_seed(0)
    clean, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    scheduler = make_scheduler("ddim", prediction_type=kind)
    scheduler.set_timesteps(7)
    tables = noise_schedule(torch.device("cpu"))
    x = add_noise(clean, noise, torch.tensor([999]))
    for t in scheduler.timesteps:
        v = tables["signal"][t] * noise - tables["spread"][t] * clean
        x = scheduler.step({"epsilon": noise, "sample": clean, "v_prediction": v}[kind], t, x).prev_sample
    assert torch.allclose(x, clean, atol=1e-4)


def test_ddim_eta_one_has_the_variance_of_the_posterior():
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(1000)
    zero = torch.zeros(1, 1, 200, 200)
    out = scheduler.step(zero, 500, zero, eta=1.0, generator=torch.Generator().manual_seed(0)).prev_sample
    alpha, previous = scheduler.alphas_cumprod[500].item(), scheduler.alphas_cumprod[499].item()
    variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
    assert out.var().item() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_survives_saving(name, tmp_path):
    scheduler = make_scheduler(name)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    settings = [{k: v for k, v in s.config.items() if k[0] != "_"} for s in (scheduler, loaded)]
    assert settings[0] == settings[1] and settings[0]["timestep_spacing"] == "linspace"


def test_unknown_sampler():
    with pytest.raises(ValueError, match="ddim, ddpm"):
        make_scheduler("euler")
