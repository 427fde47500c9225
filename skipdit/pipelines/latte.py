"""Classes in, clips out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SchedulerMixin
from diffusers.utils import BaseOutput

from ..models import SkipBackbone
from .base import Labels, SkipPipeline

__all__ = ["SkipLattePipeline", "SkipLattePipelineOutput"]


@dataclass
class SkipLattePipelineOutput(BaseOutput):
    """Clips.

    Attributes:
        frames: "pil": a list of PIL images for each clip; "np": [B, F, H, W, 3] in [0, 1]; "pt": [B, F, 3, H, W] in
            [0, 1]; "latent": [B, C, F, h, w], scaled as the transformer sees them.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


class SkipLattePipeline(SkipPipeline):
    """Class-to-video with `SkipLatteTransformer3DModel`.

    Args:
        transformer, vae, scheduler, class_names: As for every pipeline here.
        frame_interval: Every how many-th frame of its training videos the network saw; stored with the pipeline, so
            that an evaluation can tell whether real clips are like the generated ones. None: not known.

    Example:
        >>> pipe = SkipLattePipeline.from_pretrained("pretrained/digits")
        >>> pipe.transformer.enable_cache(SkipCacheConfig.parse("N2-900-50"))
        >>> frames = pipe(class_labels=["three", 7], generator=torch.manual_seed(0)).frames
    """

    def __init__(
        self,
        transformer: SkipBackbone,
        vae: AutoencoderKL | AutoencoderTiny,
        scheduler: SchedulerMixin,
        class_names: Sequence[str] | dict[str, str] | None = None,
        frame_interval: int | None = None,
    ):
        super().__init__(transformer, vae, scheduler, class_names)
        self.register_to_config(frame_interval=frame_interval)

    def _latent_shape(self, batch: int, num_frames: int | None, height: int | None, width: int | None) -> tuple:
        cfg = self.transformer.config
        return (batch, cfg.in_channels, num_frames or cfg.num_frames, *self._latent_sides(height, width))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_samples: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_channels: int | None = None,
        output_type: str = "pil",
        decode_chunk_size: int = 16,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> SkipLattePipelineOutput | tuple:
        """Sample clips.

        Args:
            class_labels: An index or name for each clip; None for an unconditional model.
            num_inference_steps: Sampler steps.
            guidance_scale: 1 or less: no guidance. Without effect on an unconditional model.
            generator: One, or one for each clip: then a clip does not depend on what else is in the batch.
            latents: Start noise [B, C, F, h, w] instead of drawing it.
            num_samples: Clips of an unconditional model.
            num_frames, height, width: Size of the clips in frames and pixels; default: the model's own.
            guidance_channels: Latent channels that guidance acts on; default: all, as published for video.
            output_type: "pil", "np", "pt" or "latent".
            decode_chunk_size: Frames that the VAE decodes at once.
            callback_on_step_end: `f(pipeline, step_index, timestep, {"latents": ...})`, may return new latents.
            callback_on_step_end_tensor_inputs: What the callback is given; there are the latents.
            return_dict: False returns a tuple.

        Raises:
            ValueError: An input does not fit; nothing has been computed then.
        """
        size = {"num_frames": num_frames, "height": height, "width": width}
        latents = self._sample(
            class_labels, num_samples, num_inference_steps, guidance_scale, generator, latents, guidance_channels,
            output_type, decode_chunk_size, callback_on_step_end, callback_on_step_end_tensor_inputs, size,
        )  # fmt: skip
        frames = self.decode(latents, output_type, decode_chunk_size)
        self.maybe_free_model_hooks()
        return SkipLattePipelineOutput(frames=frames) if return_dict else (frames,)

    def _show(self, latents: torch.Tensor, output_type: str, pictures_at_once: int) -> Any:
        pictures = self._decode(latents.transpose(1, 2).flatten(0, 1), pictures_at_once)
        video = pictures.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)
        return self.video_processor.postprocess_video(video, output_type)
