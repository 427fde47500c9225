"""What both pipelines share: checks, noise, the sampling loop with guidance and cache contexts, chunked decoding."""

import inspect
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

# diffusers loads a saved component only from a module that is imported already, so that of the samplers is too.
from .. import schedulers  # noqa: F401
from ..acceleration import CompileMixin
from ..models import SkipBackbone
from .guidance import guide

Labels = int | str | Sequence[int | str] | torch.Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNED_VARIANCE = ("learned", "learned_range")


class SkipPipeline(CompileMixin, DiffusionPipeline):
    """Base of both pipelines: noise, the sampling loop with guidance and cache contexts, chunked decoding.

    Args:
        transformer: A backbone of this package, vanilla or with skips.
        vae: `AutoencoderKL` or `AutoencoderTiny` with the transformer's latent channels.
        scheduler: Any diffusers scheduler; `skipdit.make_scheduler` gives the published samplers.
        class_names: Name of each class, in order; stored with the pipeline, so that labels can be names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SkipBackbone,
        vae: AutoencoderKL | AutoencoderTiny,
        scheduler: SchedulerMixin,
        class_names: Sequence[str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        names = list(class_names.values() if isinstance(class_names, dict) else class_names or [])
        # A mapping, because a list in a pipeline's config is taken for a component.
        self.register_to_config(class_names={str(index): name for index, name in enumerate(names)} or None)
        self.class_names = names
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        self._current_timestep: float | None = None

    @property
    def current_timestep(self) -> float | None:
        """Timestep of the running step, for caches that ask for it; None outside a call."""
        return self._current_timestep

    # ------------------------------------------------------------------ inputs

    def get_label_ids(self, labels: Labels) -> list[int]:
        """Class indices of names and indices, one or several, mixed as you like.

        Raises:
            ValueError: A name is not known (the nearest one is suggested) or an index is out of range.
        """
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in _listed(labels):
            if isinstance(label, str):
                if label not in self.class_names:
                    close = get_close_matches(label, self.class_names, n=1)
                    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(self.class_names[:12])}..."
                    raise ValueError(f"No class named {label!r}: {hint}")
                label = self.class_names.index(label)
            if not isinstance(label, int | np.integer):
                raise ValueError(f"class_labels={label!r} is neither an index nor a name.")
            if not 0 <= label < num_classes:
                raise ValueError(f"Class {label} is out of range: this model has classes 0 to {num_classes - 1}.")
            ids.append(int(label))
        return ids

    def _check_labels(self, class_labels: Labels | None, num_samples: int | None) -> torch.Tensor | int:
        """Class indices [B] on the device, or the number of samples of an unconditional model."""
        if self.transformer.config.num_classes is None:
            if class_labels is not None:
                raise ValueError("This model is unconditional: pass num_samples instead of class_labels.")
            if num_samples is not None and num_samples < 1:
                raise ValueError(f"num_samples={num_samples} must be 1 or more.")
            return num_samples or 1
        if class_labels is None or not _listed(class_labels):
            raise ValueError("This model is class-conditional: pass class_labels, one index or name for each sample.")
        if num_samples not in (None, len(_listed(class_labels))):
            raise ValueError(f"num_samples={num_samples} contradicts the {len(_listed(class_labels))} class_labels.")
        return torch.tensor(self.get_label_ids(class_labels), device=self._execution_device)

    def _latent_shape(self, batch: int, num_frames: int | None, height: int | None, width: int | None) -> tuple:
        raise NotImplementedError

    def _latent_sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        sample_size = self.transformer.config.sample_size
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        step = self.vae_scale_factor * self.transformer.config.patch_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < step or pixels % step):
                raise ValueError(f"{name}={pixels} must be a multiple of {step} pixels.")
        return tuple(
            side if pixels is None else pixels // self.vae_scale_factor
            for side, pixels in zip(sides, (height, width), strict=True)
        )

    def _prepare_latents(
        self, shape: tuple[int, ...], generator: torch.Generator | list | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} samples: pass one for each, or a single one.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"Expected latents {list(shape)}, got {list(latents.shape)}.")
        return latents.to(self._execution_device, torch.float32) * self.scheduler.init_noise_sigma

    def _check_numbers(self, steps: int, guidance_scale: float, guidance_channels: int | None) -> None:
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be 1 or more.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale} must be finite; 1 is without guidance.")
        channels = self.transformer.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(f"guidance_channels={guidance_channels} must be 1 to {channels}, or None for all.")

    def check_decoding(self, output_type: str, decode_chunk_size: int = 16) -> None:
        """Raise ValueError, in one sentence, where `decode` of this network's latents would fail."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not known: choose one of {', '.join(OUTPUT_TYPES)}.")
        if decode_chunk_size < 1:
            raise ValueError(f"decode_chunk_size={decode_chunk_size} must be 1 or more.")
        channels = self.transformer.config.in_channels
        if output_type != "latent" and (of_vae := self.vae.config.latent_channels) != channels:
            raise ValueError(f"The transformer's latents have {channels} channels, the autoencoder's {of_vae}.")

    def _check_scheduler(self) -> None:
        if self._takes_variance() and not self.transformer.config.learn_sigma:
            raise ValueError("This scheduler expects a learned variance, which the model (learn_sigma=False) has not.")
        if not self._takes_variance() and self.scheduler.config.get("variance_type") in LEARNED_VARIANCE:
            self.scheduler.register_to_config(variance_type=None)  # it came along from a DDPM scheduler's config

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def _sample(
        self,
        class_labels: Labels | None,
        num_samples: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        guidance_channels: int | None,
        output_type: str,
        decode_chunk_size: int,
        callback_on_step_end: Callable | None,
        callback_tensors: Sequence[str],
        size: dict[str, int | None],
    ) -> torch.Tensor:
        """Latents of the samples, [B, C, (F,) h, w] in float32, scaled as the transformer sees them."""
        self._check_numbers(num_inference_steps, guidance_scale, guidance_channels)
        self.check_decoding(output_type, decode_chunk_size)
        self._check_scheduler()
        if unknown := set(callback_tensors) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: no {sorted(unknown)[0]!r}; there are the latents.")
        labels = self._check_labels(class_labels, num_samples)
        batch = labels if isinstance(labels, int) else len(labels)
        guided = guidance_scale > 1 and not isinstance(labels, int)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_class)])
        # On the host: the loop reads nothing back from the device.
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps.tolist()
        on_device = self.scheduler.timesteps.to(self._execution_device)
        latents = self._prepare_latents(self._latent_shape(batch, **size), generator, latents)
        step_inputs = self._step_inputs(generator)
        step_context = self._step_contexts(on_device, labels, batch * (2 if guided else 1))
        self.transformer._reset_stateful_cache()  # an earlier call may have been cut short
        try:
            for index, timestep in enumerate(self.progress_bar(timesteps)):
                self._current_timestep = timestep
                model_input = self.scheduler.scale_model_input(latents, self.scheduler.timesteps[index])
                with step_context(index):
                    prediction = self._predict(
                        model_input,
                        on_device[index],
                        labels,
                        guided,
                        guidance_scale,
                        guidance_channels,
                        index,
                        timestep,
                    )
                latents = self.scheduler.step(
                    prediction, self.scheduler.timesteps[index], latents, **step_inputs, return_dict=False
                )[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, index, timestep, dict.fromkeys(callback_tensors, latents))
                    latents = (changed or {}).get("latents", latents)
        finally:
            self._current_timestep = None
        return latents

    def _predict(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | int,
        guided: bool,
        guidance_scale: float,
        guidance_channels: int | None,
        step_index: int,
        timestep_on_host: float,
    ) -> torch.Tensor:
        """One forward; under guidance the conditional and the unconditional branch are one batch."""
        model_input = torch.cat([model_input, model_input]) if guided else model_input
        with self.transformer.cache_context("cond_uncond", step_index=step_index, timestep=timestep_on_host):
            prediction = self.transformer(
                model_input.to(self.transformer.dtype),
                timestep.expand(len(model_input)),
                None if isinstance(labels, int) else labels,
                return_dict=False,
            )[0].float()
        if guided:
            prediction = guide(prediction, guidance_scale, guidance_channels or self.transformer.config.in_channels)
        if self._takes_variance():
            return prediction
        return prediction[:, : self.transformer.config.in_channels]

    def _takes_variance(self) -> bool:
        """Whether the scheduler wants the predicted variance beside the noise; only DDPM can use it."""
        learned = self.scheduler.config.get("variance_type") in LEARNED_VARIANCE
        return learned and isinstance(self.scheduler, DDPMScheduler)

    def _step_inputs(self, generator: torch.Generator | list | None) -> dict[str, Any]:
        known = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in known else {}

    def decode(self, latents: torch.Tensor, output_type: str = "pil", decode_chunk_size: int = 16) -> Any:
        """Pictures or clips of latents that a call with `output_type="latent"` gave.

        Args:
            latents: [B, C, (F,) h, w], scaled as the transformer sees them.
            output_type: "pil", "np" or "pt"; "latent" hands them back.
            decode_chunk_size: Pictures that the VAE decodes at once.

        Returns:
            What a call with that `output_type` returns.

        Raises:
            ValueError: As `check_decoding`.
        """
        self.check_decoding(output_type, decode_chunk_size)
        return latents if output_type == "latent" else self._show(latents, output_type, decode_chunk_size)

    def _show(self, latents: torch.Tensor, output_type: str, pictures_at_once: int) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, pictures_at_once: int) -> torch.Tensor:
        """Latents [N, C, h, w] -> pictures [N, 3, H, W] in [-1, 1] on the CPU, a few at a time."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return torch.cat(
            [self.vae.decode(chunk, return_dict=False)[0].float().cpu() for chunk in scaled.split(pictures_at_once)]
        )


def _listed(labels: Labels) -> list:
    if isinstance(labels, torch.Tensor | np.ndarray):
        return labels.reshape(-1).tolist()
    return [labels] if isinstance(labels, int | str) else list(labels)
