"""How Skip-Cache attaches: a diffusers hook around the model's forward."""

from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, HookRegistry, ModelHook, StateManager

from .config import SkipCacheConfig
from .forecast import forecast
from .state import CacheStats, SkipCacheState

_HOOK_NAME = "skip_cache"


class SkipCacheHook(ModelHook):
    """Chooses, once a sampler step, between the model's full and its reuse path.

    The model's forward must accept `shallow=` and `deep_features=` and return the features when `shallow` is given.
    The step index and the timestep come from `model.cache_context(name, step_index=..., timestep=...)`; nothing is
    read from the device.
    """

    _is_stateful = True

    def __init__(self, config: SkipCacheConfig):
        super().__init__()
        self.config = config
        self.policy = config.policy
        self.states = StateManager(SkipCacheState)
        self._stats: dict[str, CacheStats] = {}
        self._trajectory_over = False

    @classmethod
    def attach(cls, model: torch.nn.Module, config: SkipCacheConfig) -> None:
        """Put the hook around the model's forward."""
        HookRegistry.check_if_exists_or_initialize(model).register_hook(cls(config), _HOOK_NAME)

    @staticmethod
    def detach(model: torch.nn.Module) -> None:
        """Take the hook off again, with all that it remembers."""
        HookRegistry.check_if_exists_or_initialize(model).remove_hook(_HOOK_NAME, recurse=False)

    @staticmethod
    def stats_of(model: torch.nn.Module) -> CacheStats | None:
        """Counts of the model's last trajectory; None without the hook."""
        hook = HookRegistry.check_if_exists_or_initialize(model).get_hook(_HOOK_NAME)
        return None if hook is None else hook.stats

    @property
    def stats(self) -> CacheStats:
        """Forward passes of the last trajectory, summed over its cache contexts."""
        counts = self._stats.values()
        return CacheStats(sum(c.full for c in counts), sum(c.reused for c in counts))

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Forget everything; the counts stay readable until the next forward."""
        self.states.reset()
        self._trajectory_over = True
        return module

    # The decision is Python on the host; only the model's two paths are compiled, each as one graph.
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the path that the policy chooses and remember what it needs later."""
        features = self.begin_step(hidden_states, kwargs)
        output = self.fn_ref.original_forward(
            hidden_states, *args, **kwargs, shallow=self.config.shallow, deep_features=features
        )
        if features is None:
            self.end_step(output[1])
        return output[:1] if type(output) is tuple else output

    @torch.compiler.disable
    def begin_step(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Decide about this step: the features to reuse (held or forecast), or None for a full pass.

        Raises:
            RuntimeError: Gradients are enabled.
            ValueError: The call is not inside a cache context that names step index and timestep.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Skip-Cache reuses features across steps and has no gradient: call the model under torch.no_grad(), "
                "or model.disable_cache() for training."
            )
        if kwargs.get("shallow") is not None or kwargs.get("deep_features") is not None:
            raise ValueError("Skip-Cache is enabled and chooses the path itself: leave shallow and deep_features out.")
        context = self.states.context
        if context.timestep is None or context.step_index is None:
            raise ValueError(
                "Skip-Cache needs cache_context(name, step_index=..., timestep=...) around the model call."
            )
        state = self._current_state(context, hidden_states)
        if context.step_index != state.step_index:  # else: another call within one step, same decision
            timestep = float(context.timestep)
            state.full = not state.remembered or self.policy.is_full(state.counter, context.step_index, timestep)
            state.counter += 1
            state.step_index, state.timestep = context.step_index, timestep
        counts = self._stats[context.name]
        if state.full:
            counts.full += 1
            return None
        counts.reused += 1
        return forecast(state.remembered, context.step_index)

    def _current_state(self, context: CacheContext, hidden_states: torch.Tensor) -> SkipCacheState:
        """The context's state, emptied where a new trajectory begins or the policy forgot after the last step."""
        if self._trajectory_over:
            self._stats, self._trajectory_over = {}, False
        state: SkipCacheState = self.states.get_state()
        signature = (tuple(hidden_states.shape), hidden_states.dtype, hidden_states.device)
        begins = state.step_index is None or context.step_index < state.step_index
        if begins or signature != state.signature:
            state.reset()
            state.signature = signature
            self._stats[context.name] = CacheStats()
        elif context.step_index != state.step_index and self.policy.forgets(state.timestep):
            state.remembered, state.counter = [], 0
        return state

    @torch.compiler.disable
    def end_step(self, features: torch.Tensor) -> None:
        """Remember the features of a full pass beside those that a forecast takes with them."""
        state: SkipCacheState = self.states.get_state()
        earlier = [(step, kept) for step, kept in state.remembered if step != state.step_index]
        state.remembered = [*earlier, (state.step_index, features)][-1 - self.config.forecast :]
