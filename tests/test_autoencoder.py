"""`skipdit train-vae`, on the smallest run that is still the real one."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from skipdit.cli import main
from skipdit.config import load_config
from skipdit.data import MovingDigits
from skipdit.training.autoencoder import (
    AutoencoderConfig,
    _standardise_latents,
    build_autoencoder,
    latent_statistics,
    reconstruction_psnr,
    train_autoencoder,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "digits" / "vae.yaml"
CARRIED = ROOT / "pretrained" / "digits" / "vae"
SMALL = {"steps": 2, "batch_size": 4, "eval_clips": 4, "log_every": 1}


def frames(split: str, clips: int, seed: int = 1) -> torch.Tensor:
    return torch.cat([item["video"] for item in MovingDigits(length=clips, seed=seed, split=split)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("vae") / "vae"
    return output, train_autoencoder(AutoencoderConfig(output=str(output), **SMALL))


def test_saved_folder_is_what_was_reported(trained):
    output, result = trained
    vae = AutoencoderKL.from_pretrained(output)
    held_out = frames("test", 4)
    _, std = latent_statistics(vae, held_out, per_channel=False)
    assert vae.config.scaling_factor == result["scaling_factor"] == pytest.approx(1 / std.item(), rel=1e-5)
    assert reconstruction_psnr(vae, held_out) == pytest.approx(result["psnr"], abs=1e-3)
    assert result["parameters"] == sum(p.numel() for p in vae.parameters()) <= 500_000
    latents = vae.encode(held_out[:1]).latent_dist.mean
    assert latents.shape == (1, 4, 8, 8)
    assert vae.decode(latents).sample.shape == (1, 3, 32, 32)


def test_files_are_float16_and_nothing_is_left_beside(trained):
    output, _ = trained
    weights = output / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 1_200_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert sorted(path.name for path in output.parent.iterdir()) == ["vae"]


def test_channels_come_out_centred_at_one_scale(trained):
    output, _ = trained
    mean, std = latent_statistics(AutoencoderKL.from_pretrained(output), frames("train", 4))
    assert mean.abs().max() < 0.02
    assert std.tolist() == pytest.approx([1] * 4, abs=0.01)


def test_same_seed_same_weights_and_an_older_folder_is_replaced(trained, tmp_path):
    first, _ = trained
    output = tmp_path / "vae"
    output.mkdir()
    (output / "stale").touch()
    overrides = [f"{key}={value}" for key, value in SMALL.items()]
    assert main(["train-vae", f"--config={CONFIG}", f"output={output}", *overrides]) == 0
    assert not (output / "stale").exists()
    states = [AutoencoderKL.from_pretrained(folder).state_dict() for folder in (first, output)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_standardising_leaves_the_reconstruction_and_the_noise_alone():
    torch.manual_seed(0)
    vae = build_autoencoder(AutoencoderConfig()).eval()
    batch = frames("train", 1)
    with torch.no_grad():
        before = vae.encode(batch).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, std = latent_statistics(vae, batch)
        _standardise_latents(vae, mean, std)
        after = vae.encode(batch).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
    scale = std[:, None, None]
    assert torch.allclose(after.mean * scale + mean[:, None, None], before.mean, atol=1e-4)
    assert torch.allclose(after.std * scale, before.std, rtol=1e-3)


def test_defaults_and_the_carried_config_agree():
    config = load_config(AutoencoderConfig, CONFIG)
    assert config == AutoencoderConfig()


@pytest.mark.skipif(not CARRIED.is_dir(), reason="the carried autoencoder is not in this checkout")
def test_carried_autoencoder_reconstructs_unseen_handwriting():
    vae = AutoencoderKL.from_pretrained(CARRIED)
    held_out = frames("test", 16, seed=5)
    mean, std = latent_statistics(vae, held_out)
    assert reconstruction_psnr(vae, held_out) > 35
    assert mean.abs().max() < 0.1 and (std - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps must be at least 1"),
        ("size=30", "multiple of 4"),
        ("norm_num_groups=5", "multiples of norm_num_groups"),
        ("block_out_channels=[]", "block_out_channels needs"),
        ("kl_weight=-1", "kl_weight must not be negative"),
        ("device=tpu", "device must be"),
        ("step=3", "did you mean 'steps'"),
    ],
)
def test_mistakes_end_in_one_sentence(override, message, capsys, tmp_path):
    assert main(["train-vae", f"--config={CONFIG}", f"output={tmp_path / 'vae'}", override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "vae").exists()
