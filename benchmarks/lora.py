"""`dsv4 bench lora`: memory and speed of LoRA against training every parameter, on nano or a 120.9M-parameter model.

    dsv4 bench lora
    dsv4 bench lora --model slice --tokens 512 --rank 8

Contenders: every parameter (Muon and AdamW), LoRA on a base that stays as it is stored, LoRA on a base widened to
fp32. Each sample is a process of its own with one thread; memory is its peak above the one before the model is loaded.
Speed is per second of processor time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness.process import ROOT, peak_bytes
from benchmarks.harness.scenarios import SLICE
from benchmarks.harness.turns import in_turns, line
from dsv4.commands.options import count
from dsv4.config import nano_path

CONTENDERS = ("full", "lora", "lora, widened base")
SEED = 1


def measure(contender: str, folder: Path, tokens: int, rank: int, steps: int) -> dict[str, float]:
    """Peak memory and what is saved of the model, in MB, and tokens per second of processor time after a first step."""
    import torch

    from benchmarks.harness.trainers import Documents
    from dsv4.checkpoint import load_model
    from dsv4.training.gradient import Work, compute_gradient, pack_batch
    from dsv4.training.lora import add_adapters
    from dsv4.training.lora_settings import LoraSettings
    from dsv4.training.losses import LossWeights
    from dsv4.training.memory import keep_freed_memory
    from dsv4.training.optim import MuonAdamW
    from dsv4.training.state import run_tensors

    torch.set_num_threads(1)
    keep_freed_memory()
    before = peak_bytes()
    model = load_model(folder, weights="stored" if contender == "lora" else "widened")
    if contender == "full":
        model.requires_grad_()
    else:
        add_adapters(model, LoraSettings(rank), torch.Generator().manual_seed(SEED))
    optimizer = MuonAdamW(model, model.config, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=generator).tolist()
    batch = [pack_batch(Documents([ids]), torch.device("cpu"))]
    work = Work(0, 0, LossWeights(), quantized=False)
    started = 0.0
    for step in range(1 + steps):
        if step == 1:
            started = time.process_time()
        compute_gradient(model, batch, work)
        optimizer.step(1e-4)
        optimizer.zero_grad()
    speed = tokens * steps / (time.process_time() - started)
    saved = sum(tensor.nbytes for tensor in run_tensors(model).values())
    return {"memory": (peak_bytes() - before) / 1e6, "saved": saved / 1e6, "speed": speed}


def take(contender: str, options: argparse.Namespace, folder: Path, found: list[dict[str, float]], _: int) -> float:
    """One sample, in a process of its own; `found` gets all its figures."""
    words = ["--contender", contender, "--folder", str(folder)]
    words += [f"--{key}={getattr(options, key)}" for key in ("tokens", "rank", "steps")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lora", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[-1]["speed"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench lora", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=("nano", "slice"), default="nano", help="default: %(default)s")
    add("--tokens", type=count, default=2048, help="of a step; default: %(default)s")
    add("--rank", type=count, default=16, help="default: %(default)s")
    add("--steps", type=count, default=3, help="counted steps per sample; default: %(default)s")
    add("--rounds", type=count, default=3, help="default: %(default)s")
    add("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.contender is not None:
        print(json.dumps(measure(options.contender, options.folder, options.tokens, options.rank, options.steps)))
        return 0
    from benchmarks.harness.random_checkpoint import write_random_checkpoint  # after the help, as it imports torch

    with tempfile.TemporaryDirectory() as scratch:
        folder = nano_path()
        if options.model == "slice":
            folder = Path(scratch) / "slice"
            write_random_checkpoint(SLICE, folder, SEED)
        found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        in_turns({name: partial(take, name, options, folder, found[name]) for name in CONTENDERS}, options.rounds)
    for key, unit in (("speed", "tokens per processor second"), ("memory", "MB"), ("saved", "MB")):
        for name, samples in found.items():
            print(line(f"{key}, {name}", [sample[key] for sample in samples], unit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
