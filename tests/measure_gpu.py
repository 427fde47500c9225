"""The whole measurement of a card in one call: errors of the kernels, forwards, samplings, training, where time goes.

PYTHONPATH=. python tests/measure_gpu.py --output outputs/gpu                        # about 9 minutes on one GPU
TRITON_INTERPRET=1 python tests/measure_gpu.py --device cpu --preset tiny --output outputs/rehearsal

Writes gpu.md, gpu.json and gpu.log. Every section is a process of its own with a limit of time: a crash, even one that
loses the device, or a section that takes too long costs the rest nothing. Results are on the disk as soon as they
exist.

Needs what `pip install -e .` brings, of which only NEEDED for nearly all of it: where nothing can be downloaded, carry
the wheels of those and put the folder they are installed to on PYTHONPATH. The two items "samples" of decoding also
need omegaconf and av, and tell where these are missing.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What the sections import -> what is installed.
NEEDED = {"torch": "torch", "diffusers": "diffusers", "einops": "einops", "numpy": "numpy", "PIL": "pillow"}
# Section -> share of the time, about the seconds that its items of weight take on an H200; in the order of the run.
SECTIONS = {
    "rates": 12,
    "correctness": 35,
    "forward": 115,
    "sampling": 105,
    "training": 55,
    "breakdown": 20,
    "decoding": 45,
    "pieces": 32,
}
PARTS = "parts"  # folder of what the sections write and compile, merged and removed at the end
START = 15  # seconds that a process needs before it measures
LEAST = 15  # seconds without which a section is not worth its start


def time_for(waiting: list[str], left: float) -> float:
    """Seconds that the first waiting section may measure for: its share, and a little of what others seldom use."""
    to_share = left - START * len(waiting)
    share = to_share * SECTIONS[waiting[0]] / sum(SECTIONS[name] for name in waiting)
    return min(max(1.15 * share, LEAST), left - START)


def run_section(args: argparse.Namespace) -> None:
    """In the child: measure one section."""
    import torch
    from gpu import breakdown, decoding, models, pieces, sampling
    from gpu.common import PRESETS, Record

    found = {
        **{name: getattr(pieces, name) for name in ("rates", "correctness", "pieces")},
        **{name: getattr(models, name) for name in ("forward", "training")},
        "sampling": sampling.sampling,
        "breakdown": breakdown.breakdown,
        "decoding": decoding.decoding,
    }
    device = torch.device(args.device)
    record = Record(Path(args.output) / PARTS / f"{args.section}.json", args.seconds, device)
    found[args.section](PRESETS[args.preset], device, record)


def start_section(name: str, seconds: float, args: argparse.Namespace) -> str:
    """In the parent: run one section; returns how it ended."""
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--section", name, "--seconds", f"{seconds:.0f}"]
    for option in ("device", "preset", "output"):
        command += [f"--{option}", getattr(args, option)]
    log = Path(args.output) / PARTS / f"{name}.log"
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            status = subprocess.run(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds + START,
                env=environment(log.parent / f"compiled-{name}"),
            ).returncode
            ended = "ended" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = "was stopped"
    print(f"{name} {ended} after {time.monotonic() - began:.0f} s", flush=True)
    if ended != "ended":
        print(log.read_text(encoding="utf-8", errors="replace")[-1500:], flush=True)
    return ended


def environment(cache: Path) -> dict[str, str]:
    """Every section starts without compiled code, so that its set-up is that of a first start."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache.resolve()), "TRITON_CACHE_DIR": str(cache.resolve() / "triton")}
    return {**os.environ, **caches, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def missing() -> str:
    """A sentence on packages that are not installed; "" if none is missing."""
    names = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if not names:
        return ""
    return (
        f"Not installed: {', '.join(names)}; run 'pip install -e .', or carry their wheels to this machine and put the "
        "folder that they are installed to on PYTHONPATH."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="xl", choices=("xl", "tiny"))
    parser.add_argument("--output", default="outputs/gpu")
    parser.add_argument("--budget", type=float, default=525, help="seconds for everything (525)")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="some of the sections")
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if sentence := missing():
        print(sentence, file=sys.stderr)
        return 2
    if args.section:
        run_section(args)
        return 0
    from gpu.report import write

    deadline = time.monotonic() + args.budget
    output = Path(args.output)
    shutil.rmtree(output / PARTS, ignore_errors=True)
    (output / PARTS).mkdir(parents=True)
    wanted = [name for name in SECTIONS if not args.only or name in args.only]
    ended, started = {}, []
    for name in wanted:
        waiting = [other for other in wanted if other not in ended]
        seconds = time_for(waiting, deadline - time.monotonic())
        ended[name] = "had no time left"
        if seconds >= LEAST:
            started.append(name)
            ended[name] = start_section(name, seconds, args)
        write(output, output / PARTS, args.preset, ended)
    logs = [f"== {name}\n{(output / PARTS / f'{name}.log').read_text(errors='replace')}" for name in started]
    (output / "gpu.log").write_text("\n".join(logs), encoding="utf-8")
    shutil.rmtree(output / PARTS)
    print((output / "gpu.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
