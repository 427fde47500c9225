"""The gate that float8 has to pass: samples of a pipeline with it against samples without."""

import math

import torch
from diffusers import DiffusionPipeline

__all__ = ["psnr", "trial_samples"]

STEPS, SAMPLES = 20, 2


@torch.no_grad()
def trial_samples(pipeline: DiffusionPipeline) -> torch.Tensor:
    """A few samples from fixed noise, in [0, 1]; latents where there is no autoencoder."""
    config = pipeline.transformer.config
    count = min(SAMPLES, config.num_classes or SAMPLES)
    who = {"num_samples": count} if config.num_classes is None else {"class_labels": list(range(count))}
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        return pipeline(
            **who,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent" if pipeline.vae is None else "pt",
            return_dict=False,
        )[0].float()
    finally:
        pipeline._progress_bar_config = bar


def psnr(samples: torch.Tensor, reference: torch.Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all values; infinite for equal ones."""
    error = (samples.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)
