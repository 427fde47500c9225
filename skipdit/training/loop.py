"""`skipdit train` and `train.py`: one loop for one process or many, stopped and resumed without a trace."""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import load_config, save_config, setting_name
from ..diffusion import training_losses
from ..errors import UserError
from ..files import check_writable
from . import checkpointing, samples
from .build import build_accelerator, build_model, check_fit, load_vae, lr_multiplier
from .config import TrainConfig
from .data import GlobalOrder, LatentClips, build_data, encode, precompute_latents
from .initial import is_skip, load_initial
from .noise import draw_noise
from .progress import Progress
from .stopping import StopRequest

__all__ = ["Trainer", "add_arguments", "run", "train"]

DEFAULT_CONFIG = "configs/digits/train.yaml"


def train(config: TrainConfig) -> Path:
    """Train as the config says.

    Returns:
        The output folder: `checkpoints/`, `samples/`, `pipeline/`, `log.jsonl`, `train.yaml`.

    Raises:
        UserError: A setting that cannot work, before any work is done.
    """
    trainer = Trainer(config)
    trainer.fit()
    trainer.accelerator.end_training()
    return config.folder


class Trainer:
    """Everything a run holds.

    Its state is the step number, the weights, their average and the optimizer's moments: all else (order,
    noise, learning rate) is a function of the config and the step.
    """

    def __init__(self, config: TrainConfig):
        config.check()
        self.config = config
        self.accelerator = build_accelerator(config)
        self.per_pass = config.per_pass(self.accelerator.num_processes)
        self.output = check_writable(config.folder)
        checkpoint = checkpointing.find_checkpoint(config.resume, self.output)
        saved = checkpointing.read_trainer_state(checkpoint) if checkpoint else None
        if saved:
            checkpointing.check_same_run(saved["config"], config, checkpoint)

        self.dataset, self.class_names = build_data(config.data)
        self.vae = load_vae(config.vae).to(self.accelerator.device)
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        self.loaded = set(saved["loaded"]) if saved else load_initial(model, config.init)
        self.model_class_dropout = model.config.class_dropout_prob
        check_fit(model, self.vae, self.dataset, self.class_names, config.data)
        self.preview_classes = samples.check_preview(config.preview, model, self.class_names)

        self.step, self.dropped, self.dropped_in_a_row = 0, 0, 0
        self.stop, self.stopping = StopRequest(), False
        self._prepare(model)
        if self.accelerator.is_main_process:
            checkpointing.remove_leftovers(self.output)
        if checkpoint:
            self._restore(checkpoint, saved)
        elif config.resume:
            self.say(f"No checkpoint in {self.output} yet: starting anew.")

    # ------------------------------------------------------------------ setting up

    def _prepare(self, model: torch.nn.Module) -> None:
        cfg = self.config
        if cfg.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if cfg.compile:
            model.compile()  # in place, so that parameter names stay as they are
        self.module = model.train()
        optimizer = torch.optim.AdamW(
            self._parameter_groups(model),
            lr=cfg.optimizer.lr,
            betas=tuple(cfg.optimizer.betas),
            eps=cfg.optimizer.eps,
            weight_decay=cfg.optimizer.weight_decay,
            fused=True,
        )
        self.lr_multiplier = lr_multiplier(cfg)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.names = [name for name, _ in self.module.named_parameters()]
        self.parameters = list(self.module.parameters())
        self.ema = EMAModel(
            self.parameters,
            decay=cfg.ema.decay,
            use_ema_warmup=True,
            power=cfg.ema.warmup_power,
            foreach=True,
        )

    def _parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Parameters by what decides their learning rate: loaded or fresh, long skip or not."""
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            groups.setdefault((name in self.loaded, is_skip(name)), []).append(parameter)
        return [{"params": members, "loaded": kind[0], "skips": kind[1]} for kind, members in groups.items()]

    def _set_learning_rates(self) -> float:
        """Those of this step; returns that of fresh weights."""
        init = self.config.init
        lr = self.config.optimizer.lr * self.lr_multiplier(self.step)
        for group in self.optimizer.param_groups:
            waits = self.step < init.skips_only_steps and not group["skips"]
            group["lr"] = 0.0 if waits else lr * (init.lr_scale if group["loaded"] else 1.0)
        return lr

    def _restore(self, folder: Path, saved: dict[str, Any]) -> None:
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # accelerate's count of passes; a checkpoint lies between two whole steps
        averaged = load_file(folder / "ema.safetensors")
        self.ema.shadow_params = [averaged[name].to(self.accelerator.device) for name in self.names]
        self.ema.optimization_step = saved["ema_updates"]
        self.step, self.dropped = saved["step"], saved["dropped_steps"]
        cfg = self.config.optimizer
        for group in self.optimizer.param_groups:  # the config's settings, should they have changed
            group.update(betas=tuple(cfg.betas), eps=cfg.eps, weight_decay=cfg.weight_decay)
        self.say(f"Resuming from {folder}.")
        for line in checkpointing.changed_settings(saved["config"], self.config):
            self.say(f"  changed since that checkpoint: {line}")

    def say(self, line: str) -> None:
        """Print on the main process, past the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line)
            sys.stdout.flush()

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train from the current step to `max_steps`, or to the first SIGTERM or SIGINT."""
        cfg = self.config
        if self.step >= cfg.max_steps:
            self.say(f"Step {self.step} of {cfg.max_steps}: nothing left to train.")
            return self._finish()
        if self.accelerator.is_main_process:
            save_config(cfg, self.output / "train.yaml")
        if cfg.tracker:
            self.accelerator.init_trackers(cfg.tracker)
        dataset = self._training_set()
        order = GlobalOrder(
            len(dataset),
            cfg.batch_size,
            cfg.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            cfg.seed,
            self.step,
            cfg.max_steps,
        )
        in_memory = isinstance(dataset, LatentClips)
        batches = iter(order.loader(dataset, 0 if in_memory else cfg.data.num_workers))
        self._announce(dataset)
        with self.stop, _attention_backend(self.accelerator.device), Progress(self) as progress:
            while self.step < cfg.max_steps and not self.stopping:
                progress.add(self._step(batches, order))
                if self.step % cfg.log_every == 0 or self.step == cfg.max_steps:
                    progress.log()
                if self.step % cfg.save_every == 0 and self.step < cfg.max_steps:
                    self._save()
                    self._attempt("export", self._export)
                if cfg.preview.every and self.step % cfg.preview.every == 0 and self.step < cfg.max_steps:
                    self._attempt("preview", self._preview)
                progress.resume_clock()
            folder = self._save()
        if self.step < cfg.max_steps:
            self.say(f"Stopped after step {self.step}; saved {folder}.")
            self.say("Continue with the same command and resume=latest.")
        else:
            self._finish()

    def _training_set(self) -> Dataset:
        if not self.config.data.precompute_latents:
            return self.dataset
        self.say(f"Encoding {len(self.dataset)} items once.")
        return precompute_latents(self.accelerator, self.vae, self.dataset, self.config.data)

    def _announce(self, dataset: Dataset) -> None:
        parameters = sum(parameter.numel() for parameter in self.parameters)
        if self.loaded and not self.step:
            self.say(f"Starting from {self.config.init.from_}: {len(self.loaded)} of {len(self.names)} tensors loaded.")
        precision = self.accelerator.mixed_precision
        self.say(
            f"Training {type(self.module).__name__} ({parameters:,} parameters) on {len(dataset)} items, "
            f"{self.accelerator.num_processes} process(es), {self.per_pass} items a pass, "
            f"steps {self.step + 1} to {self.config.max_steps}; {self.accelerator.device}, "
            f"{'float32' if precision == 'no' else precision}. Output: {self.output}"
        )

    def _step(self, batches: Iterator[dict[str, torch.Tensor]], order: GlobalOrder) -> dict[str, float]:
        """One optimizer step on the next global batch.

        Returns:
            Global means of "loss", "mse", "vb"; "grad_norm" before clipping; "lr"; "applied", 0 if dropped.
        """
        cfg = self.config
        lr = self._set_learning_rates()
        totals = torch.zeros(4, device=self.accelerator.device)
        for accumulated in range(cfg.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                losses = self._losses(next(batches), order.positions(accumulated))
                self.accelerator.backward(losses["loss"].mean())
                totals[:3] += torch.stack([losses[name].detach().mean() for name in ("loss", "mse", "vb")])
        totals /= cfg.gradient_accumulation_steps
        totals[3] = float(self.stop.requested)
        loss, mse, vb, stop = self.accelerator.reduce(totals, "mean").tolist()
        clips = cfg.max_grad_norm and self.step >= cfg.clip_after_step
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, cfg.max_grad_norm if clips else math.inf))
        applied = self._update(math.isfinite(loss) and math.isfinite(norm))
        self.step += 1
        self.stopping = stop > 0  # of any process, so that all stop after the same step
        return {"loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "lr": lr, "applied": float(applied)}

    def _losses(self, batch: dict[str, torch.Tensor], positions: range) -> dict[str, torch.Tensor]:
        device = self.accelerator.device
        if "mean" in batch:
            mean, std = batch["mean"].to(device), batch["std"].to(device)
        else:
            mean, std = encode(self.vae, batch["video"], self.config.data.encode_batch)
        drawn = draw_noise(self.config.seed, self.step, positions, mean.shape[1:])
        timestep, dropout, noise, posterior = (values.to(device) for values in drawn)
        latents = (mean + std * posterior) * self.vae.config.scaling_factor
        class_labels = None
        if self.module.null_class is not None:
            class_labels = batch["class_label"].to(device)
            class_labels = torch.where(dropout < self.model_class_dropout, self.module.null_class, class_labels)
        with self.accelerator.autocast():
            return training_losses(self.model, latents, timestep, noise, class_labels)

    def _update(self, finite: bool) -> bool:
        """Apply the gradients if they are finite; the loss scaler of fp16 must see the others too."""
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        applied = finite and not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        if applied:
            self.ema.step(self.parameters)
            self.dropped_in_a_row = 0
            return True
        self.dropped, self.dropped_in_a_row = self.dropped + 1, self.dropped_in_a_row + 1
        self.say(f"Step {self.step + 1} dropped: its loss or gradient is not finite ({self.dropped} so far).")
        if self.dropped_in_a_row >= self.config.max_dropped_steps:
            raise UserError(
                f"{self.dropped_in_a_row} steps in a row gave no finite loss and gradient: lower "
                "optimizer.lr or use mixed_precision=bf16, then resume from the last checkpoint."
            )
        return False

    # ------------------------------------------------------------------ what it leaves on the disk

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        """EMA weights by parameter name, on the CPU."""
        return {name: value.detach().cpu() for name, value in zip(self.names, self.ema.shadow_params, strict=True)}

    def _save(self) -> Path:
        folder = checkpointing.checkpoint_folder(self.output, self.step)
        state = {
            "step": self.step,
            "dropped_steps": self.dropped,
            "ema_updates": self.ema.optimization_step,
            "processes": self.accelerator.num_processes,
            "loaded": sorted(self.loaded),
            "config": dataclasses.asdict(self.config),
        }
        is_main = self.accelerator.is_main_process

        def write(partial: Path) -> None:
            self.accelerator.save_state(str(partial))
            if is_main:
                save_file(self.averaged_weights(), partial / "ema.safetensors")

        checkpointing.write_checkpoint(folder, state, write, is_main, self.accelerator.wait_for_everyone)
        if is_main:
            checkpointing.prune(self.output, self.config.keep_last)
        return folder

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        """Do what a run can do without: its failure is told, and the training goes on."""
        try:
            action()
        except Exception as error:  # whatever it is, days of training are worth more
            self.say(f"Step {self.step}: the {what} failed ({type(error).__name__}: {error}); training goes on.")

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            model = samples.model_with(self.module, self.averaged_weights())
            samples.export_pipeline(
                model, self.vae, self.class_names, self.config.export_dtype, self.output / "pipeline"
            )

    def _preview(self) -> None:
        if self.accelerator.is_main_process:
            cfg = self.config.preview
            model = samples.model_with(self.module, self.averaged_weights()).to(self.accelerator.device)
            pipeline = samples.make_pipeline(model, self.vae, self.class_names, cfg.sampler)
            path = self.output / "samples" / f"step-{self.step:07d}"
            samples.write_preview(pipeline, cfg, self.preview_classes, path)

    def _finish(self) -> None:
        self._export()
        if self.config.preview.every:
            self._preview()
        self.say(f"Trained {self.step} steps ({self.dropped} dropped). Pipeline: {self.output / 'pipeline'}")


def _attention_backend(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, plain products: the fused attention's backward takes twice as long on short sequences."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `skipdit train`."""
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.epilog = "settings and their defaults:\n" + "\n".join(_describe(TrainConfig()))


def _describe(section: object, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _describe(value, f"{prefix}{field.name}.")
        else:
            text = json.dumps(value) if isinstance(value, bool | None) else value  # as YAML has it
            yield f"  {prefix}{setting_name(field.name)}={text}"


def run(args: argparse.Namespace) -> None:
    """Train; of several processes only the main one reports a mistake."""
    try:
        train(load_config(TrainConfig, args.config, args.overrides))
    except UserError:
        from accelerate import PartialState

        if PartialState().is_main_process:
            raise
        raise SystemExit(2) from None
