"""Latte with long skips: video (Ma et al. 2024, variant 1; Skip-DiT, arXiv 2411.17616)."""

import torch
from diffusers import ModelMixin  # noqa: F401  saved pipelines name this module; diffusers looks its base class up in it
from diffusers.configuration_utils import register_to_config
from einops import rearrange

from .backbone import SkipBackbone, SkipTransformerOutput
from .layers import sincos_1d

OVER_FRAMES, OVER_PATCHES = -3, -2  # axes of [B, F, P, D] that attention runs along


class SkipLatteTransformer3DModel(SkipBackbone):
    """Video backbone: blocks alternate attention over patches and over frames; such a pair is a unit of the skips.

    Hidden states stay in one layout, [B, F, P, D], and one conditioning vector serves all frames of a clip. Extra
    images may follow the clip's frames (joint image-video training): they pass the spatial blocks only.

    Args:
        sample_size: Side of the latents, or (height, width); another size at call time computes its positions anew.
        patch_size: Side of a patch in latent pixels.
        in_channels: Latent channels C.
        hidden_size, depth, num_heads, mlp_ratio: Size of the trunk; `depth` is a multiple of 4.
        num_frames: Frames per clip; another number at call time computes its positions anew.
        num_classes: Number of classes; None for an unconditional model.
        class_dropout_prob: Share of labels that training replaces by the null class. The trainer reads it; the
            network itself drops nothing, so its forward is deterministic.
        learn_sigma: Predict a variance beside the noise (2C output channels, noise first).
        skip: "linear" (as published), "residual" (added to the input, zero-initialised) or None (vanilla Latte).
    """

    blocks_per_unit = 2
    xavier_skips = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        skip: str | None = "linear",
    ):
        super().__init__()
        self.build()
        self.register_buffer("temp_embed", sincos_1d(hidden_size, torch.arange(num_frames))[None].float())

    def frame_positions(self, frames: int) -> torch.Tensor:
        """Position embedding of the frame axis, [1, frames, 1, D]."""
        if frames == self.config.num_frames:
            return self.temp_embed[:, :, None]
        return self._computed(
            (frames,), lambda: sincos_1d(self.config.hidden_size, torch.arange(frames))[None, :, None]
        )

    def run_unit(
        self, unit: int, hidden_states: torch.Tensor, conditioning: torch.Tensor, frame_positions: torch.Tensor
    ) -> torch.Tensor:
        """A spatial, then a temporal block; images after the clip's frames bypass the latter."""
        x = self.run_block(2 * unit, hidden_states, conditioning, OVER_PATCHES)
        frames = frame_positions.shape[1]
        clip, images = x[:, :frames], x[:, frames:]
        position = frame_positions if unit == 0 else None
        clip = self.run_block(2 * unit + 1, clip, conditioning[:, :1], OVER_FRAMES, position)
        return torch.cat([clip, images], dim=1) if images.shape[1] else clip

    def condition(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        frames: int,
        num_images: int,
        image_class_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, 1, 1, D]; with joint images [B, F + images, 1, D], each image carrying its own class."""
        batch = timestep.shape[0]
        time = self.t_embedder(timestep)
        clip = (time + self.embed_labels(class_labels, (batch,)))[:, None]
        if not num_images:
            return clip[:, :, None]
        images = time[:, None] + self.embed_labels(image_class_labels, (batch, num_images))
        return torch.cat([clip.expand(-1, frames, -1), images.expand(-1, num_images, -1)], dim=1)[:, :, None]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        num_images: int = 0,
        image_class_labels: torch.Tensor | None = None,
        shallow: int | None = None,
        deep_features: torch.Tensor | None = None,
    ) -> SkipTransformerOutput | tuple[torch.Tensor, ...]:
        """Predict the noise (and variance).

        Args:
            hidden_states: Noisy latents [B, C, F + num_images, height, width], the extra images last.
            timestep: [B], 0..999; one for a clip and its images.
            class_labels: [B], 0..num_classes (the last being the null class); None means the null class.
            return_dict: False returns a tuple.
            num_images: How many of the frames are independent images.
            image_class_labels: [B, num_images]; None means the null class.
            shallow: Units that run at each end when the deep part is reused; makes the call return `deep_features`.
            deep_features: The remembered tensor: run the reuse path instead of the full one.
        """
        self.check_input(hidden_states, ndim=5)
        self.check_paths(shallow, deep_features)
        batch, _, total, height, width = hidden_states.shape
        if not 0 <= num_images < total:
            raise ValueError(f"num_images={num_images} leaves no clip in {total} frames.")
        frames = total - num_images
        rows, columns = self._grid((height, width))

        x = self.x_embedder(rearrange(hidden_states, "b c f h w -> (b f) c h w")) + self.patch_positions(rows, columns)
        x = x.unflatten(0, (batch, total))
        conditioning = self.condition(timestep, class_labels, frames, num_images, image_class_labels)
        x, deep_features = self.run_units(x, (conditioning, self.frame_positions(frames)), shallow, deep_features)
        x = self.final_layer(x, conditioning)

        p = self.config.patch_size
        sample = rearrange(x, "b f (h w) (p q c) -> b c f (h p) (w q)", h=rows, w=columns, p=p, q=p)
        if not return_dict:
            return (sample,) if shallow is None else (sample, deep_features)
        return SkipTransformerOutput(sample=sample, deep_features=deep_features)
