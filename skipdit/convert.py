"""`skipdit convert`: published weights to a diffusers folder, and back, or to a smaller file."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import written_whole

__all__ = ["add_arguments", "convert", "run"]

FLAT = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
WRITTEN = (".pt", ".safetensors")
DEFAULT_VAE = Path("pretrained/Latte/vae")

EPILOG = """examples:
  skipdit convert pretrained/ucf101-skip.pt pretrained/ucf101-skip            a folder for SkipLattePipeline
  skipdit convert pretrained/DiT-XL-2-skip.pt dit.safetensors --dtype bf16    the EMA weights alone
  skipdit convert pretrained/ucf101-skip mine.pt                              back to {"ema": state_dict}

What the output is, its name tells: a folder, or a file that ends in .pt or .safetensors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("source", type=Path, help="a .pt or .safetensors file, or a diffusers folder")
    parser.add_argument("output", type=Path, help="a new folder, or a file ending in .pt or .safetensors")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which copy of a training checkpoint (ema)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the stored weights (fp32)"
    )
    parser.add_argument(
        "--vae",
        type=Path,
        help=f"folder of the autoencoder (default: the source pipeline's own, else {DEFAULT_VAE})",
    )
    parser.add_argument(
        "--transformer-only",
        action="store_true",
        help="write the transformer's folder, no pipeline around it",
    )
    parser.add_argument("--scheduler", help="ddim, ddpm, dpm++ or unipc (default: the source's, else the published)")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="a class name a line, in order")
    parser.add_argument("--num-heads", type=int, help="heads of attention, if the model is of no known size")
    parser.add_argument(
        "--skip",
        choices=("linear", "residual"),
        default="linear",
        help="kind of long skips (linear, as published)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what the model is."""
    words = vars(args)
    print(convert(words.pop("source"), words.pop("output"), **words))
    return 0


def convert(
    source: Path,
    output: Path,
    weights: str = "ema",
    dtype: str = "fp32",
    vae: Path | None = None,
    transformer_only: bool = False,
    scheduler: str | None = None,
    class_names: Path | None = None,
    num_heads: int | None = None,
    skip: str = "linear",
    overwrite: bool = False,
) -> str:
    """Write `source` in the form that the name of `output` tells; `output` appears whole or not at all.

    Args:
        source: A file that `load_state_dict` reads, or a folder of a pipeline or of a transformer.
        output: A folder (of a pipeline, or with `transformer_only` of a transformer), a `.pt`
            ({"ema": state_dict}, as published) or a `.safetensors` file (the bare state dict).
        weights: "ema" or "model", of a training checkpoint.
        dtype: "fp32", "bf16" or "fp16".
        vae: Folder of an AutoencoderKL or AutoencoderTiny; None: the source pipeline's own, else pretrained/Latte/vae.
        transformer_only: Leave out the pipeline around the transformer.
        scheduler: A name that `make_scheduler` knows; None: the source pipeline's own, else DDIM for class-conditional
            video and DDPM for the rest.
        class_names: A text file of names; None: the source pipeline's own.
        num_heads: Needed if the model is of none of the published sizes; shapes do not tell.
        skip: "linear" or "residual"; shapes do not tell.
        overwrite: Replace what is there.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: Something is missing, exists already, or is no model of this family.
    """
    flat = output.suffix in FLAT
    _check(source, output, flat, overwrite)
    finish = None if flat or transformer_only else _pipeline_parts(source, vae, scheduler, class_names)

    from .weights import build, describe, infer_config, read_folder

    if source.is_dir():
        state, config = read_folder(source)
    else:
        from .checkpoints import load_state_dict

        state = load_state_dict(source, prefer=weights)
        config = infer_config(state, str(source), num_heads, skip)
    model = build(state, config, str(source), dtype)
    with written_whole(output) as temporary:
        if flat:
            _write_flat(model.state_dict(), temporary)
        elif finish is None:
            model.save_pretrained(temporary)
        else:
            finish(model).save_pretrained(temporary)
    return f"{describe(model)} -> {output} ({dtype}, {_size(output) / 1e9:.3g} GB)"


def _check(source: Path, output: Path, flat: bool, overwrite: bool) -> None:
    if not source.exists():
        raise UserError(f"{source} is not there: pass a weights file or a diffusers folder.")
    if flat and output.suffix not in WRITTEN:
        raise UserError(f"{output}: name the file with {' or '.join(WRITTEN)}, or give a folder.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: choose another name or add --overwrite.")
    if output.exists() and output.samefile(source):
        raise UserError(f"{output} is the source itself: choose another name.")
    if output.is_dir() and flat or output.is_file() and not flat:
        raise UserError(f"{output} exists and is of the other kind (file or folder): choose another name.")


def _pipeline_parts(
    source: Path, vae: Path | None, scheduler: str | None, class_names: Path | None
) -> Callable[[Any], Any]:
    """Read what belongs around the transformer, before the long work; gives transformer -> pipeline.

    A pipeline keeps its own autoencoder, scheduler and class names unless others are given.
    """
    own = source if (source / "model_index.json").is_file() else None
    folder = vae or (own / "vae" if own else DEFAULT_VAE)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"No autoencoder in {folder}: fetch it with 'python pretrained/download_ckpts.py skip-dit/vae', "
            "pass its folder with --vae, or add --transformer-only."
        )
    from .sampling.loading import PIPELINES, load_vae, read_class_names
    from .schedulers import make_scheduler

    if scheduler is not None:
        try:
            make_scheduler(scheduler)
        except ValueError as error:
            raise UserError(str(error)) from error
    names = read_class_names(class_names) if class_names else None
    kept = _kept_parts(own) if own else {}

    def finish(model: Any) -> Any:
        conditional = model.config.num_classes is not None
        if names is not None and len(names) != (model.config.num_classes or 0):
            raise UserError(f"{class_names}: {len(names)} names for {model.config.num_classes} classes.")
        chosen = make_scheduler(scheduler or ("ddim" if "num_frames" in model.config and conditional else "ddpm"))
        parts = {"scheduler": chosen, "class_names": names}
        given = {"scheduler": scheduler is not None, "class_names": names is not None}
        parts |= {name: part for name, part in kept.items() if not given[name]}
        return PIPELINES[type(model)](transformer=model, vae=load_vae(folder), **parts)

    return finish


def _kept_parts(folder: Path) -> dict[str, Any]:
    """Scheduler and class names of a saved pipeline."""
    import diffusers

    from . import schedulers

    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["scheduler"][1]
        kind = getattr(schedulers, name, None) or getattr(diffusers, name)
        scheduler = kind.from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read as a pipeline ({str(error).splitlines()[0][:120]}).") from error
    return {"scheduler": scheduler, "class_names": index.get("class_names")}


def _write_flat(state: dict[str, Any], path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        import torch

        torch.save({"ema": state}, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(i.stat().st_size for i in path.rglob("*") if i.is_file())
