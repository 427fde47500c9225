"""Seconds of a training step, eager and compiled, against the operations it must do; latents ready.

python tests/measure_training.py --config configs/digits/train.yaml
python tests/measure_training.py --config configs/ucf101/train.yaml --batch 4 mixed_precision=bf16 kernels=true

The setting `kernels` counts, as in train.py; `compile` does not, for both are measured.
"""

import argparse
import contextlib
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipdit.config import load_config
from skipdit.diffusion import training_losses
from skipdit.models.layers import use_kernels
from skipdit.training.build import build_model
from skipdit.training.config import TrainConfig
from skipdit.training.diagnostics import matrix_rate, training_operations


def step_seconds(config: TrainConfig, batch: int, compiled: bool, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each step after a warm-up of two; forward, backward and AdamW."""
    torch.manual_seed(0)
    model = build_model(config.model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if config.kernels:
        use_kernels(model, ("attention", "norm"))  # as the trainer does
    if compiled:
        model.compile()
    cfg = model.config
    latents = torch.randn(batch, cfg.in_channels, cfg.num_frames, cfg.sample_size, cfg.sample_size, device=device)
    labels = None if model.null_class is None else torch.zeros(batch, dtype=torch.long, device=device)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    seconds = []
    for step in range(repeats + 2):
        began = time.perf_counter()
        timestep = torch.full((batch,), 100 + step, device=device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            losses = training_losses(model, latents, timestep, torch.randn_like(latents), labels)
        losses["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(losses["mse"][0])
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits/train.yaml")
    parser.add_argument("--batch", type=int, help="clips a step (the config's batch_size)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(TrainConfig, args.config, args.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or config.batch_size
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.float32)
    operations = training_operations(build_model(config.model)) * batch
    rate = matrix_rate(device, dtype)
    print(f"{batch} clips a step, {operations / 1e12:.3f} TFLOP; matrix rate {rate / 1e12:.2f} TFLOP/s ({dtype}).\n")
    print("| | s a step | clips/s | TFLOP/s | of the matrix rate |\n|---|--:|--:|--:|--:|")
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()  # as the trainer does
    with plain:
        for name, compiled in (("eager", False), ("compiled", True)):
            seconds = statistics.median(step_seconds(config, batch, compiled, args.repeats, device))
            speed = operations / seconds
            print(f"| {name} | {seconds:.3f} | {batch / seconds:.1f} | {speed / 1e12:.3f} | {speed / rate:.0%} |")


if __name__ == "__main__":
    main()
