"""DiT with long skips: class-conditional images (Peebles & Xie 2022; Skip-DiT, arXiv 2411.17616)."""

import torch
from diffusers import ModelMixin  # noqa: F401  saved pipelines name this module; diffusers looks its base class up in it
from diffusers.configuration_utils import register_to_config
from einops import rearrange

from .backbone import SkipBackbone, SkipTransformerOutput


class SkipDiTTransformer2DModel(SkipBackbone):
    """Image backbone: `depth` blocks over [B, P, D], each block a unit of the long skips.

    Args:
        sample_size: Side of the latents, or (height, width); another size at call time computes its positions anew.
        patch_size: Side of a patch in latent pixels.
        in_channels: Latent channels C.
        hidden_size, depth, num_heads, mlp_ratio: Size of the trunk; `depth` is even.
        num_classes: Number of classes; None for an unconditional model.
        class_dropout_prob: Share of labels that training replaces by the null class. The trainer reads it; the
            network itself drops nothing, so its forward is deterministic.
        learn_sigma: Predict a variance beside the noise (2C output channels, noise first).
        skip: "linear" (as published), "residual" (added to the input, zero-initialised) or None (vanilla DiT).
    """

    blocks_per_unit = 1
    xavier_skips = False

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
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        skip: str | None = "linear",
    ):
        super().__init__()
        self.build()

    def run_unit(self, unit: int, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return self.run_block(unit, hidden_states, conditioning)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        shallow: int | None = None,
        deep_features: torch.Tensor | None = None,
    ) -> SkipTransformerOutput | tuple[torch.Tensor, ...]:
        """Predict the noise (and variance).

        Args:
            hidden_states: Noisy latents [B, C, height, width].
            timestep: [B], 0..999.
            class_labels: [B], 0..num_classes (the last being the null class); None means the null class.
            return_dict: False returns a tuple.
            shallow: Units that run at each end when the deep part is reused; makes the call return `deep_features`.
            deep_features: The remembered tensor: run the reuse path instead of the full one.
        """
        self.check_input(hidden_states, ndim=4)
        self.check_paths(shallow, deep_features)
        batch, _, height, width = hidden_states.shape
        rows, columns = self._grid((height, width))

        x = self.x_embedder(hidden_states) + self.patch_positions(rows, columns)
        conditioning = (self.t_embedder(timestep) + self.embed_labels(class_labels, (batch,)))[:, None]
        x, deep_features = self.run_units(x, (conditioning,), shallow, deep_features)
        x = self.final_layer(x, conditioning)

        p = self.config.patch_size
        sample = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)
        if not return_dict:
            return (sample,) if shallow is None else (sample, deep_features)
        return SkipTransformerOutput(sample=sample, deep_features=deep_features)
