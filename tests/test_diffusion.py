"""The training loss and the samplers: recorded numbers and closed forms."""

import math

import pytest
import torch
from golden_data import FAMILIES, golden, golden_model, relative_error

from skipdit.diffusion import Objective, add_noise, discretized_gaussian_log_likelihood, noise_schedule, training_losses
from skipdit.schedulers import SAMPLERS, TRAINING_SCHEDULE, make_scheduler


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


# ---------------------------------------------------------------------- other objectives


@pytest.mark.parametrize(
    ("weighting", "closed_form"),
    [
        ("none", lambda snr: torch.ones_like(snr)),
        ("min_snr", lambda snr: snr.clamp(max=5.0) / snr),
        ("soft_min_snr", lambda snr: 5.0 / (snr + 5.0)),
        ("debiased", lambda snr: snr**-0.5),
    ],
)
def test_weightings(weighting, closed_form):
    timestep = torch.tensor([0, 10, 200, 999])
    tables = noise_schedule(torch.device("cpu"))
    snr = ((tables["signal"] / tables["spread"]) ** 2)[timestep]
    weight = Objective(weighting=weighting).weight(timestep)
    torch.testing.assert_close(weight, closed_form(snr))
    if weighting != "none":
        of_v = Objective("v_prediction", weighting=weighting).weight(timestep)
        torch.testing.assert_close(of_v, weight * snr / (snr + 1))


def test_min_snr_agrees_with_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    timestep = torch.arange(0, 1000, 111)
    snr = compute_snr(DDPMScheduler(**TRAINING_SCHEDULE), timestep)
    wanted = torch.stack([snr, torch.full_like(snr, 5.0)], 1).min(1).values / snr
    torch.testing.assert_close(Objective(weighting="min_snr").weight(timestep), wanted, rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_is_that_of_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    beta = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = (1 - rescale_zero_terminal_snr(beta)).cumprod(0)
    tables = noise_schedule(torch.device("cpu"), zero_terminal_snr=True)
    torch.testing.assert_close(tables["signal"] ** 2, alpha_bar, rtol=1e-4, atol=1e-6)
    assert tables["signal"][-1] == 0 and tables["spread"][-1] == 1


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_perfect_v_prediction_costs_nothing(zero_terminal_snr):
    objective = Objective("v_prediction", zero_terminal_snr)
    timestep = torch.tensor([1, 500, 999])
    clean, noise = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    tables = noise_schedule(torch.device("cpu"), zero_terminal_snr)
    signal, spread = (tables[name][timestep].view(3, 1, 1, 1) for name in ("signal", "spread"))

    def model(noisy, *_, return_dict):
        torch.testing.assert_close(noisy, signal * clean + spread * noise)
        low = torch.full_like(clean, -1.0)  # the posterior's own variance, so that the bound is 0
        return (torch.cat([signal * noise - spread * clean, low], 1),)

    losses = training_losses(model, clean, timestep, noise, None, objective)
    assert losses["mse"].max() < 1e-10 and losses["vb"].abs().max() < 1e-4 and torch.isfinite(losses["loss"]).all()


@torch.no_grad()
def test_samplers_undo_what_a_v_objective_trains():
    """A network that knows the clean sample: each sampler ends there."""
    from skipdit.schedulers import make_scheduler

    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for objective in (Objective("v_prediction"), Objective("v_prediction", True)):
        tables = noise_schedule(torch.device("cpu"), objective.zero_terminal_snr)
        for name in ("ddim", "unipc"):
            scheduler = make_scheduler(name, **objective.sampler_settings)
            scheduler.set_timesteps(20)
            sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            for step in scheduler.timesteps:
                signal, spread = tables["signal"][step], tables["spread"][step]
                noise = (sample - signal * clean) / spread
                sample = scheduler.step(signal * noise - spread * clean, step, sample).prev_sample
            assert (sample - clean).abs().max() < 1e-3, (name, objective)


def test_objectives_that_cannot_be():
    with pytest.raises(ValueError, match="needs objective.prediction=v_prediction"):
        Objective(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="objective.weighting must be one of none, min_snr"):
        Objective(weighting="minsnr")
