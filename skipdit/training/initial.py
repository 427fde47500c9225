"""Starting from trained weights: of the same network, or of a vanilla one that is given long skips."""

from pathlib import Path

import torch

from ..checkpoints import load_state_dict
from ..errors import UserError
from ..models import SkipBackbone
from ..weights import read_folder
from .config import InitConfig

__all__ = ["is_skip", "load_initial"]

LABELS = "y_embedder.embedding_table.weight"
_SKIPS = ("skip_norms.", "skip_linears.")


def is_skip(name: str) -> bool:
    """Whether a parameter belongs to the long skips."""
    return name.startswith(_SKIPS)


@torch.no_grad()
def load_initial(model: SkipBackbone, config: InitConfig) -> set[str]:
    """Copy the weights that `init.from` names into the model.

    The position tables are fixed functions of the sizes and stay the model's own, so that weights of one frame
    count or picture size start a run of another. A label table of another number of classes stays fresh. Long
    skips may be absent if the model's are residual: then it computes what the loaded network did.

    Returns:
        Names of the parameters that were loaded; none without `init.from`.

    Raises:
        UserError: There are no weights, they do not fit this network, or a setting for them is given without them.
    """
    if config.skips_only_steps and not model.config.skip:
        raise UserError("init.skips_only_steps needs long skips: set model.arguments.skip=residual, or the steps to 0.")
    if config.from_ is None:
        if config.lr_scale != 1:
            raise UserError(f"init.lr_scale={config.lr_scale:g} is for loaded weights: set init.from, or leave it out.")
        return set()
    where = Path(config.from_)
    if not where.exists():
        raise UserError(f"init.from={where} is not there: give a diffusers folder, or a .pt or .safetensors file.")
    state = read_folder(where)[0] if where.is_dir() else load_state_dict(where, prefer=config.weights)
    own = dict(model.named_parameters())
    state = {name: value for name, value in state.items() if name not in dict(model.named_buffers())}
    if LABELS in state and (LABELS not in own or state[LABELS].shape != own[LABELS].shape):
        del state[LABELS]
    _check_names(state, own, model.config.skip, where)
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"init.from={where} does not fit: {name} is {list(value.shape)} there and {list(own[name].shape)} in "
                "this model; give model.arguments the sizes of those weights."
            )
        own[name].copy_(value)
    return set(state)


def _check_names(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], skip: str | None, where: Path) -> None:
    missing = {name for name in own if name not in state} - {LABELS}
    unknown = sorted(set(state) - set(own))
    if missing and all(map(is_skip, missing)) and not unknown:
        if skip != "residual":
            raise UserError(
                f"init.from={where} is a vanilla model, without long skips: set model.arguments.skip=residual, with "
                "which the run starts exactly from it."
            )
        return
    if unknown and all(map(is_skip, unknown)) and not missing:
        raise UserError(f"init.from={where} has long skips: set model.arguments.skip=linear (or residual).")
    if missing or unknown:
        example = f"it has no {min(missing)}" if missing else f"this model has no {unknown[0]}"
        count = len(missing) + len(unknown)
        raise UserError(f"init.from={where} is another kind of model: {example} ({count} such names in all).")
