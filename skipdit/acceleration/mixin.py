"""What a pipeline offers of all this."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .planning import check_on_device, settle
from .turning_on import Acceleration, accelerate

__all__ = ["CompileMixin"]


class CompileMixin:
    """`compile` and `uncompile` of a pipeline with a transformer and an autoencoder."""

    _acceleration: Acceleration | None = None

    def compile(self, **choices: Any) -> Acceleration:
        """Turn on what makes sampling faster on the pipeline's device; samples stay the same within rounding.

        The pipeline is on its device and in its dtype already. The first call afterwards takes longer, since it
        compiles. docs/speed.md has the tolerance and what each part does.

        Args:
            kernels, blocks, graphs, modulation, decoder: None, as suits the device; False leaves a part out; True
                insists on it.
            dtype: Of transformer and autoencoder while compiled, for example torch.bfloat16; None: as they are.
            float8: Linear layers of the blocks in float8: True (attention and MLP) or some of "attention", "mlp",
                "skips".
            least_psnr: Samples with float8 must be as close as that, in dB, to those without.

        Returns:
            What was chosen and why; `print` shows it.

        Raises:
            ValueError: A part that is insisted on cannot be had, or weights are offloaded: nothing is changed then. Or
                float8's samples are too far off: the plain path is taken then.

        Example:
            >>> print(pipe.compile())
            >>> pipe.compile(graphs=False, dtype=torch.bfloat16)
        """
        plan = settle(self, **choices)
        self.uncompile()
        self._acceleration = accelerate(self, plan)
        return self._acceleration

    def uncompile(self) -> None:
        """Take back what `compile` did; samples are those of before, bit for bit.

        Weights that were moved or changed since keep that; only their dtype and order are put back.
        """
        if self._acceleration is not None:
            self._acceleration.undo()
            self._acceleration = None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', for weights that are what they were.

        Raises:
            ValueError: `compile` has cast them; nothing is written then.
        """
        cast = {"dtype", "float8"} & set(self._acceleration.parts if self._acceleration else ())
        if cast:
            raise ValueError(f"compile({sorted(cast)[0]}=...) has cast the weights: call uncompile() before saving.")
        super().save_pretrained(*args, **kwargs)

    def _step_contexts(
        self, timesteps: torch.Tensor, labels: torch.Tensor | int, rows: int
    ) -> Callable[[int], AbstractContextManager]:
        """Step index -> the context that its forward runs in; see `Acceleration.steps`."""
        if self._acceleration is None:
            return nullcontext
        check_on_device(self)
        return self._acceleration.steps(timesteps, labels, rows)
