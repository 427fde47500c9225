"""One training loop for one process or many, stopped and resumed without a trace."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import save_config
from ..data.latents import hash_weights
from ..errors import UserError
from ..files import check_writable, only_call
from ..models.layers import use_kernels
from ..pipelines import SkipPipeline
from . import checkpointing, diagnostics, samples
from .batches import BatchLosses
from .build import build_accelerator, build_model, check_fit, load_vae
from .config import TrainConfig
from .data import LatentClips, build_data, precompute_latents
from .diagnostics import Speed, TimestepBins
from .fvd import FvdMeter
from .initial import load_initial
from .optimizing import WeightAverage, build_optimizer, lr_multiplier, set_learning_rates
from .order import GlobalOrder, read_batches
from .progress import Progress
from .stopping import StopRequest

__all__ = ["Trainer", "train"]


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
        self.is_main = self.accelerator.is_main_process
        self.output = check_writable(config.folder)
        if self.is_main:
            with only_call("train", self.output):  # or a write that goes on would look like one cut short
                checkpointing.remove_leftovers(self.output)
        self.accelerator.wait_for_everyone()
        checkpoint = checkpointing.find_checkpoint(config.resume, self.output)
        saved = checkpointing.read_trainer_state(checkpoint) if checkpoint else None
        if saved:
            checkpointing.check_same_run(saved["config"], config, checkpoint)

        with self.accelerator.main_process_first():  # which indexes the files for all
            self.dataset, self.class_names = build_data(config.data, self.output)
        self.vae = load_vae(config.vae).to(self.accelerator.device)
        self.inputs = {"files": checkpointing.hash_names(self.dataset), "vae": hash_weights(self.vae.state_dict())}
        if saved:
            checkpointing.check_same_inputs(saved, self.inputs, checkpoint)
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        self.loaded = set(saved["loaded"]) if saved else load_initial(model, config.init)
        check_fit(model, self.vae, self.dataset, self.class_names, config.data, config.vae)
        self.preview_classes = samples.preview_classes(config.preview, model, self.class_names)
        self.fvd = FvdMeter(config.fvd, config.data, self.output, self.accelerator) if config.fvd.every else None

        self.step, self.dropped, self.dropped_in_a_row = 0, 0, 0
        self.unreadable: set[str] = set()  # files that any process could not read
        self.saved = -1  # step of the last checkpoint that this run wrote
        self.stop, self.stopping = StopRequest(), False
        self._prepare(model)
        if checkpoint:
            self._restore(checkpoint, saved)
        elif config.resume:
            self.say(f"No checkpoint in {self.output} yet: starting anew.")

    # ------------------------------------------------------------------ setting up

    def _prepare(self, model: torch.nn.Module) -> None:
        cfg = self.config
        if cfg.tf32:
            torch.set_float32_matmul_precision("high")
        if cfg.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if cfg.kernels:
            use_kernels(model, ("attention", "norm"))  # the MLP's has no gradient
        if cfg.compile:
            model.compile()  # in place, so that parameter names stay as they are
        optimizer = build_optimizer(model.train(), cfg.optimizer, self.loaded)
        self.lr_multiplier = lr_multiplier(cfg)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.module = self.accelerator.unwrap_model(self.model)
        self.parameters = list(self.module.parameters())
        names = [name for name, _ in self.module.named_parameters()]
        self.average = WeightAverage(names, self.parameters, cfg.ema)
        images = getattr(self.dataset, "images", 0)
        self.losses = BatchLosses(cfg, self.accelerator, self.model, self.module, self.vae, images)
        self.bins = TimestepBins(self.accelerator.device)

    def _restore(self, folder: Path, saved: dict[str, Any]) -> None:
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # accelerate's count of passes; a checkpoint lies between two whole steps
        self.average.load(load_file(folder / "ema.safetensors"), saved["ema_updates"])
        self.step, self.dropped = saved["step"], saved["dropped_steps"]
        cfg = self.config.optimizer
        for group in self.optimizer.param_groups:  # the config's settings, should they have changed
            group.update(betas=tuple(cfg.betas), eps=cfg.eps, weight_decay=cfg.weight_decay)
        self.say(f"Resuming from {folder}.")
        for line in checkpointing.changed_settings(saved["config"], self.config):
            self.say(f"  changed since that checkpoint: {line}")

    def say(self, line: str) -> None:
        """Print on the main process, past the progress bar."""
        if self.is_main:
            _print(line)

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train from the current step to `max_steps`, or to the first SIGTERM or SIGINT.

        Raises:
            UserError: Another call is writing to the output, which stays as it is; or the training cannot go on.
        """
        stop = self.config.max_steps
        with only_call("train", self.output) if self.is_main else contextlib.nullcontext():
            if self.step < stop:
                folder = self._train()
            else:
                self.say(f"Step {self.step} of {stop}: nothing left to train.")
            if self.step >= stop:
                return self._finish()
        self.say(f"Stopped after step {self.step}; saved {folder}.")
        self.say("Continue with the same command and resume=latest.")

    def _train(self) -> Path:
        """All steps that are left, unless it is asked to stop; returns the last checkpoint."""
        cfg = self.config
        if self.is_main:
            save_config(cfg, self.output / "train.yaml")
        self._start_tracker()
        dataset = self._training_set()
        order = GlobalOrder(
            len(dataset),
            cfg.batch_size,
            self.accelerator.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            cfg.seed,
            self.step,
            cfg.max_steps,
        )
        in_memory = isinstance(dataset, LatentClips)
        batches = iter(read_batches(dataset, order, 0 if in_memory else cfg.data.num_workers))
        self._announce(dataset)
        self.speed = Speed(self.accelerator, self.module)
        progress = Progress(
            self.output, self.step, cfg.max_steps, cfg.batch_size, self.is_main, self.say, self.accelerator.log
        )
        with self.stop, _attention_backend(self.accelerator.device), progress:
            while self.step < cfg.max_steps and not self.stopping:
                progress.add(self._step(batches, order))
                if self.step % cfg.log_every == 0 or self.step == cfg.max_steps:
                    progress.log(self.step, self._status(progress.clips_per_second))
                self._at_intervals(progress)
                progress.resume_clock()
            return self._save()

    def _start_tracker(self) -> None:
        if not self.config.tracker:
            return
        settings = checkpointing.flat(dataclasses.asdict(self.config))
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        self.accelerator.init_trackers("skipdit", config=plain)

    def _at_intervals(self, progress: Progress) -> None:
        cfg, step = self.config, self.step
        if cfg.diagnostics.every and step % cfg.diagnostics.every == 0:
            self._attempt("diagnostics", lambda: progress.note(step, {"diagnostics": self._diagnose()}))
        if self.fvd and (step % cfg.fvd.every == 0 or step == cfg.max_steps):
            self._attempt("FVD", lambda: progress.note(step, self._measure_fvd()))
        if step == cfg.max_steps:
            return
        if step % cfg.save_every == 0:
            self._save()
            self._export()
        if cfg.preview.every and step % cfg.preview.every == 0:
            self._preview()

    def _training_set(self) -> Dataset:
        if not self.config.data.precompute_latents:
            return self.dataset
        if hasattr(self.dataset, "item"):
            raise UserError(
                f"data.precompute_latents would freeze the random crops of {self.config.data.name}: write its latents "
                "with 'skipdit encode' and train from them (data.latents=<their folder>)."
            )
        self.say(f"Encoding {len(self.dataset)} items once.")
        return precompute_latents(self.accelerator, self.vae, self.dataset, self.config.data)

    def _announce(self, dataset: Dataset) -> None:
        parameters = sum(parameter.numel() for parameter in self.parameters)
        if self.loaded and not self.step:
            total = len(self.parameters)
            self.say(f"Starting from {self.config.init.from_}: {len(self.loaded)} of {total} tensors loaded.")
        precision = self.accelerator.mixed_precision
        passes = self.accelerator.gradient_accumulation_steps
        processes = self.accelerator.num_processes
        self.say(
            f"Training {type(self.module).__name__} ({parameters:,} parameters) on {len(dataset)} items, "
            f"{processes} process(es), {self.config.batch_size // passes // processes} items a pass, "
            f"{passes} pass(es) a step, "
            f"steps {self.step + 1} to {self.config.max_steps}; {self.accelerator.device}, "
            f"{'float32' if precision == 'no' else precision}. Output: {self.output}"
        )

    def _step(self, batches: Iterator[dict[str, Any]], order: GlobalOrder) -> dict[str, float]:
        """One optimizer step on the next global batch.

        Returns:
            Global means of "loss", "mse", "vb"; "grad_norm" before clipping; "lr"; "applied", 0 if dropped.
        """
        cfg = self.config
        lr = set_learning_rates(self.optimizer, cfg, self.step, self.lr_multiplier(self.step))
        totals = torch.zeros(6, device=self.accelerator.device)
        found: dict[str, str] = {}
        for accumulated in range(order.passes):
            batch = next(batches)
            found |= {path: reason for path, reason in batch["unreadable"].values() if path not in self.unreadable}
            with self.accelerator.accumulate(self.model):
                losses = self.losses(batch, self.step, order.positions(accumulated))
                self.accelerator.backward(losses.objective)
            sums = [(losses.items[name].detach() * losses.valid).sum() for name in ("loss", "mse", "vb")]
            totals[:4] += torch.stack([*sums, losses.valid.sum()])
            self.bins.add(losses.timestep, losses.items["mse"], losses.valid)
        self.last_batch = losses
        totals[4], totals[5] = float(self.stop.requested), len(found)
        *sums, valid, stop, unreadable = self.accelerator.reduce(totals, "sum").tolist()
        loss, mse, vb = (total / max(valid, 1.0) for total in sums)
        clips = cfg.max_grad_norm and self.step >= cfg.clip_after_step
        norm = _number(self.accelerator.clip_grad_norm_(self.parameters, cfg.max_grad_norm if clips else math.inf))
        applied = self._update(math.isfinite(loss) and math.isfinite(norm) and valid > 0)
        self.step += 1
        self.stopping = stop > 0  # of any process, so that all stop after the same step
        if unreadable:  # of any process
            self._note_unreadable(found)
        return {"loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "lr": lr, "applied": float(applied)}

    def _update(self, finite: bool) -> bool:
        """Apply the gradients if they are finite; the loss scaler of fp16 must see the others too."""
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        applied = finite and not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        if applied:
            self.average.step()
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

    def _note_unreadable(self, found: dict[str, str]) -> None:
        """Name each file that could not be read once, whichever processes met it; every process must call it."""
        for path, reason in sorted(pair for part in gather_object([found]) for pair in part.items()):
            if path not in self.unreadable:
                self.say(f"Step {self.step}: {reason}; it is left out from now on.")
                self.unreadable.add(path)
        most = getattr(self.dataset, "max_bad_share", 1.0) * len(self.dataset)
        if len(self.unreadable) > most:
            raise UserError(
                f"{len(self.unreadable)} files of {len(self.dataset)} items cannot be read (named above), more than "
                "data.arguments.max_bad_share allows: repair them, or allow more, and start again with resume=latest."
            )

    # ------------------------------------------------------------------ what it tells

    def _status(self, clips_per_second: float) -> dict[str, float | dict[str, float]]:
        return {
            "mse_by_timestep": self.bins.read(self.accelerator.reduce(self.bins.totals.clone(), "sum")),
            **self.speed.rates(clips_per_second),
            "memory_gib": diagnostics.memory_gib(self.accelerator.device),
            "dropped_steps": self.dropped,
            "unreadable_files": len(self.unreadable),
        }

    def _diagnose(self) -> dict[str, float]:
        """Spectral norm of each skip fusion, similarity of deep features between neighbouring steps."""
        cfg = self.config.diagnostics
        latents, labels = self.last_batch.latents[: cfg.clips], self.last_batch.class_labels
        labels = None if labels is None else labels[: cfg.clips]
        if images := self.losses.images:
            latents = latents[:, :, :-images]
        norms = {f"skip_norm_{index}": norm for index, norm in enumerate(diagnostics.skip_norms(self.module))}
        with self.accelerator.autocast():
            similarity = diagnostics.feature_similarity(self.module, latents, labels, self.config.objective, cfg.steps)
        return {**norms, "feature_similarity": sum(similarity) / len(similarity)}

    def _measure_fvd(self) -> dict[str, float]:
        """Of the averaged weights; every process samples its share."""
        with torch.random.fork_rng(devices=[]):
            return self.fvd.measure(self._pipeline(self.average.state(), "ddim"))

    def _pipeline(self, averages: dict[str, torch.Tensor], sampler: str) -> SkipPipeline:
        """With these weights, on this process's device."""
        model = samples.model_with(self.module, averages).to(self.accelerator.device)
        return samples.make_pipeline(model, self.vae, self.class_names, self.config, sampler)

    # ------------------------------------------------------------------ what it leaves on the disk

    def _save(self) -> Path:
        folder = checkpointing.checkpoint_folder(self.output, self.step)
        if self.saved == self.step:
            return folder
        state = {
            "step": self.step,
            "dropped_steps": self.dropped,
            "ema_updates": self.average.updates,
            "processes": self.accelerator.num_processes,
            "loaded": sorted(self.loaded),
            "inputs": self.inputs,
            "config": dataclasses.asdict(self.config),
        }

        def write(partial: Path) -> None:
            self.accelerator.save_state(str(partial))
            averages = self.average.state()  # on every process
            if self.is_main:
                save_file(averages, partial / "ema.safetensors")

        checkpointing.write_checkpoint(folder, state, write, self.is_main, self.accelerator.wait_for_everyone)
        self.saved = self.step
        if self.is_main:
            checkpointing.prune(self.output, self.config.keep_last, self.config.keep_every)
        return folder

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        """Do what a run can do without: its failure is told, and the training goes on."""
        try:
            action()
        except Exception as error:  # whatever it is, days of training are worth more
            self.say(f"Step {self.step}: the {what} failed ({type(error).__name__}: {error}); training goes on.")

    def _export(self, must: bool = False) -> None:
        averages = self.average.state()

        def export() -> None:
            model = samples.model_with(self.module, averages)
            samples.export_pipeline(model, self.vae, self.class_names, self.config, self.output / "pipeline")

        if self.is_main:
            export() if must else self._attempt("export", export)

    def _preview(self, must: bool = False) -> None:
        averages = self.average.state()

        def preview() -> None:
            pipeline = self._pipeline(averages, self.config.preview.sampler)
            path = self.output / "samples" / f"step-{self.step:07d}"
            samples.write_preview(pipeline, self.config.preview, self.preview_classes, path)

        if self.is_main:
            preview() if must else self._attempt("preview", preview)

    def _finish(self) -> None:
        self._export(must=True)
        if self.config.preview.every:
            self._preview(must=True)
        self.say(f"Trained {self.step} steps ({self.dropped} dropped). Pipeline: {self.output / 'pipeline'}")


def _print(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()


def _number(value: Any) -> float:
    """Of a tensor, whole or sharded."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


def _attention_backend(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, plain products: the fused attention's backward takes twice as long on short sequences."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
