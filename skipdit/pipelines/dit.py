"""Classes in, pictures out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput

from .base import Labels, SkipPipeline

__all__ = ["SkipDiTPipeline"]


class SkipDiTPipeline(SkipPipeline):
    """Class-to-image with `SkipDiTTransformer2DModel`."""

    def _latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple:
        return (batch, self.transformer.config.in_channels, *self._latent_sides(height, width))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_samples: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_channels: int | None = 3,
        output_type: str = "pil",
        decode_chunk_size: int = 16,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample pictures: as `SkipLattePipeline.__call__`, without frames.

        Args:
            guidance_channels: Latent channels that guidance acts on; the published image model guides the first 3 of
                its 4. None: all.

        Returns:
            `.images`: "pil": a list; "np": [B, H, W, 3] in [0, 1]; "pt": [B, 3, H, W] in [0, 1]; "latent":
            [B, C, h, w].
        """
        latents = self._sample(
            class_labels, num_samples, num_inference_steps, guidance_scale, generator, latents, guidance_channels,
            output_type, decode_chunk_size, callback_on_step_end, callback_on_step_end_tensor_inputs,
            {"height": height, "width": width},
        )  # fmt: skip
        images = self.decode(latents, output_type, decode_chunk_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _show(self, latents: torch.Tensor, output_type: str, pictures_at_once: int) -> Any:
        return self.video_processor.postprocess(self._decode(latents, pictures_at_once), output_type)
