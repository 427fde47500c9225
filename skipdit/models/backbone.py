"""What the image and the video backbone share: construction, long skips, the two compute paths, cache switches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..cache import SkipCacheConfig, SkipCacheHook, check_foreign_cache
from .layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    SkipLinear,
    SkipNorm,
    TimestepEmbedder,
    join_skip,
    sincos_2d,
)

SKIP_KINDS = ("linear", "residual", None)


@dataclass
class SkipTransformerOutput(BaseOutput):
    """What a backbone returns.

    Attributes:
        sample: Noise prediction first, then (learn_sigma) the variance: [B, 2C, F, h, w] or [B, 2C, h, w].
        deep_features: Input of unit `num_units - shallow`, before its skip fusion; None unless `shallow` was given.
    """

    sample: torch.Tensor
    deep_features: torch.Tensor | None = None


class SkipBackbone(ModelMixin, ConfigMixin, CacheMixin):
    """Base of `SkipDiTTransformer2DModel` and `SkipLatteTransformer3DModel`.

    A *unit* is what a long skip spans: a block of DiT, a pair (spatial, temporal) of Latte. The first half of the
    units keep their outputs; each unit of the second half first joins its input with the newest output not yet
    taken: unit n/2 with n/2-1, ..., unit n-1 with 0 (Skip-DiT, arXiv 2411.17616, section 3).

    Subclasses give `blocks_per_unit` and `run_unit`, and call `build` at the end of their constructor.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]
    _no_split_modules = ["Block"]
    blocks_per_unit: int
    xavier_skips: bool  # as published: Xavier-initialised skip linears in video, torch's default in image models

    def build(self) -> None:
        """Create every module from the registered config and initialise it as DiT does (adaLN-Zero)."""
        cfg = self.config
        self.check_config()
        dim = cfg.hidden_size
        self.out_channels = cfg.in_channels * (2 if cfg.learn_sigma else 1)
        self.x_embedder = PatchEmbed(cfg.patch_size, cfg.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = None if cfg.num_classes is None else LabelEmbedder(cfg.num_classes, dim)
        self.blocks = nn.ModuleList(Block(dim, cfg.num_heads, cfg.mlp_ratio) for _ in range(cfg.depth))
        joined = range(self.num_units // 2) if cfg.skip else range(0)
        self.skip_norms = nn.ModuleList(SkipNorm(2 * dim, eps=1e-6) for _ in joined)
        self.skip_linears = nn.ModuleList(SkipLinear(dim) for _ in joined)
        self.final_layer = FinalLayer(dim, cfg.patch_size, self.out_channels)
        self.register_buffer("pos_embed", self._positions(*self._grid(cfg.sample_size)).float())
        self._other_positions: dict[tuple, torch.Tensor] = {}
        self.gradient_checkpointing = False
        self.initialize_weights()

    def check_config(self) -> None:
        """Raise ValueError, in one sentence, if the sizes do not fit each other."""
        cfg = self.config
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels"):
            if not isinstance(cfg[name], int) or cfg[name] < 1:
                raise ValueError(f"{name}={cfg[name]!r} must be a whole number of 1 or more.")
        if cfg.skip not in SKIP_KINDS:
            raise ValueError(f"skip={cfg.skip!r} is not known: choose one of {SKIP_KINDS}.")
        if cfg.depth % self.blocks_per_unit or self.num_units % 2 or self.num_units < 2:
            raise ValueError(
                f"depth={cfg.depth} gives no even number of units of {self.blocks_per_unit} block(s): "
                f"choose a multiple of {2 * self.blocks_per_unit}."
            )
        if cfg.hidden_size % cfg.num_heads or cfg.hidden_size % 4:
            raise ValueError(f"hidden_size={cfg.hidden_size} must be divisible by num_heads={cfg.num_heads} and by 4.")
        for side in self._sides(cfg.sample_size):
            if side % cfg.patch_size:
                raise ValueError(f"sample_size={cfg.sample_size} is not a multiple of patch_size={cfg.patch_size}.")

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier-uniform linears, N(0, 0.02) embeddings, zero gates, zero output; residual skips start at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (name.startswith("skip_linears") and not self.xavier_skips):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        zero += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        if self.config.skip == "residual":
            zero += [skip.linear for skip in self.skip_linears]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    # ------------------------------------------------------------------ sizes

    @property
    def num_units(self) -> int:
        """Number of units that long skips and `SkipCacheConfig.shallow` count in."""
        return self.config.depth // self.blocks_per_unit

    @property
    def null_class(self) -> int | None:
        """Index of the null class (guidance's unconditional branch); None for an unconditional model."""
        return self.config.num_classes

    @staticmethod
    def _sides(sample_size: int | tuple[int, int]) -> tuple[int, int]:
        return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)

    def _grid(self, sample_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = self._sides(sample_size)
        return height // self.config.patch_size, width // self.config.patch_size

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        return sincos_2d(self.config.hidden_size, rows, columns)[None]

    def patch_positions(self, rows: int, columns: int) -> torch.Tensor:
        """Position embedding [1, rows * columns, D]: the stored one at the configured size, else computed."""
        if (rows, columns) == self._grid(self.config.sample_size):
            return self.pos_embed
        return self._computed((rows, columns), lambda: self._positions(rows, columns))

    def _computed(self, size: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Positions of another size than the configured one: once for each, not at every step."""
        key = size, self.pos_embed.dtype, self.pos_embed.device
        if key not in self._other_positions:
            with torch.inference_mode(False):
                self._other_positions[key] = compute().to(self.pos_embed)
        return self._other_positions[key]

    def check_input(self, hidden_states: torch.Tensor, ndim: int) -> None:
        """Raise ValueError, in one sentence, if the latents cannot be cut into patches."""
        cfg = self.config
        if hidden_states.ndim != ndim or hidden_states.shape[1] != cfg.in_channels:
            axes = "[B, C, F, height, width]" if ndim == 5 else "[B, C, height, width]"
            raise ValueError(f"Expected latents {axes} with C={cfg.in_channels}, got {list(hidden_states.shape)}.")
        if any(side % cfg.patch_size for side in hidden_states.shape[-2:]):
            raise ValueError(
                f"Latents of {list(hidden_states.shape[-2:])} do not divide into patches of {cfg.patch_size}."
            )

    # ------------------------------------------------------------------ conditioning

    def embed_labels(self, class_labels: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | int:
        """Class indices of the given shape -> [*shape, D]; 0 for an unconditional model.

        None on a class-conditional model means the null class everywhere.
        """
        if self.y_embedder is None:
            if class_labels is not None:
                raise ValueError("This model is unconditional (num_classes=None): leave class_labels out.")
            return 0
        if class_labels is None:
            class_labels = torch.full(shape, self.null_class, device=self.pos_embed.device)
        if tuple(class_labels.shape) != tuple(shape):
            raise ValueError(f"Expected class labels of shape {list(shape)}, got {list(class_labels.shape)}.")
        return self.y_embedder(class_labels)

    # ------------------------------------------------------------------ the trunk

    def run_block(self, index: int, *inputs: torch.Tensor | int | None) -> torch.Tensor:
        """One block, recomputed in the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self.blocks[index], *inputs)
        return self.blocks[index](*inputs)

    def run_unit(self, unit: int, hidden_states: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    join_skip = staticmethod(join_skip)

    def fuse_skip(self, index: int, hidden_states: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """`join_skip` by the index-th pair of layers."""
        norm, linear = self.skip_norms[index], self.skip_linears[index]
        return self.join_skip(norm, linear, hidden_states, skip, self.config.skip == "residual")

    def run_units(
        self,
        hidden_states: torch.Tensor,
        conditions: tuple[torch.Tensor, ...],
        shallow: int | None = None,
        deep_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run all units (full path), or the first and last `shallow` with `deep_features` between (reuse path).

        Returns:
            The trunk's output and, if `shallow` is given, the input of unit `num_units - shallow`.
        """
        units = self.num_units
        last_units = units if shallow is None else units - shallow
        skips: list[torch.Tensor] = []
        for unit in range(units):
            if unit == last_units:
                if deep_features is None:
                    deep_features = hidden_states
                else:
                    hidden_states = deep_features
            elif deep_features is not None and shallow <= unit < last_units:
                continue
            if self.config.skip and unit >= units // 2:
                hidden_states = self.fuse_skip(unit - units // 2, hidden_states, skips.pop())
            hidden_states = self.run_unit(unit, hidden_states, *conditions)
            if self.config.skip and unit < units // 2:
                skips.append(hidden_states)
        return hidden_states, deep_features

    def check_paths(self, shallow: int | None, deep_features: torch.Tensor | None) -> None:
        """Raise ValueError if the cached path is asked for where there is none."""
        if shallow is None:
            if deep_features is not None:
                raise ValueError("deep_features needs shallow, the number of units that still run at each end.")
            return
        if not self.config.skip:
            raise ValueError(
                "Skip-Cache needs long skips, which this vanilla model (skip=None) lacks: load skip weights, retrofit "
                "it with skip='residual', or use one of diffusers' own caches."
            )
        if not 1 <= shallow < self.num_units // 2:
            raise ValueError(
                f"shallow={shallow} is out of range: with {self.num_units} units it must be at least 1 and "
                f"less than {self.num_units // 2}, or nothing would be reused."
            )

    # ------------------------------------------------------------------ caches

    def enable_cache(self, config) -> None:
        """Attach Skip-Cache (`SkipCacheConfig`) or one of diffusers' own caches.

        Args:
            config: A `SkipCacheConfig`, or a diffusers cache config. Those that skip whole blocks would lose the
                tensors that long skips carry and are refused on skip models.

        Raises:
            ValueError: A cache is enabled already, or this model cannot be used with this one (the message says why).
        """
        if not isinstance(config, SkipCacheConfig):
            check_foreign_cache(config, has_skips=bool(self.config.skip), block_class=Block)
            super().enable_cache(config)
            return
        if self.is_cache_enabled:
            raise ValueError(f"A cache is enabled already ({self._cache_config!r}): call disable_cache() first.")
        self.check_paths(config.shallow, None)
        SkipCacheHook.attach(self, config)
        self._cache_config = config

    def disable_cache(self) -> None:
        """Detach the cache and drop what it remembers; the model computes as if it had never been enabled."""
        if not isinstance(self._cache_config, SkipCacheConfig):
            super().disable_cache()
            return
        SkipCacheHook.detach(self)
        self._cache_config = None

    @property
    def cache_stats(self):
        """`CacheStats` of the last trajectory (full and reused forwards); None while Skip-Cache is off."""
        return SkipCacheHook.stats_of(self)
