"""`dsv4 bench gradients`: forward and backward of the 120.9M-parameter model, beside transformers.

Each contender has its own process, and they take turns, every second round in reverse order. A sample is a step
without an optimizer: next-token loss over all tokens, gradients of all parameters. Shapes are documents x tokens. All
compute in fp32, but "dsv4 bf16" multiplies BF16 numbers in the products of the backward (kernels/gradients.py). With
--busy rates are per processor second (of all threads) instead of wall time, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.process import Process, peak_bytes
from benchmarks.harness.random_checkpoint import write_random_values
from benchmarks.harness.scenarios import SLICE, TINY
from benchmarks.harness.turns import at_least_one, in_turns, line

CONTENDERS = ("dsv4", "dsv4 bf16", "transformers")
Sample = tuple[float, float, float, int]  # wall seconds, processor seconds, loss, peak bytes of the process

_steps: dict[str, Callable[[Tensor], Tensor]] = {}  # of this process: ids [documents, tokens] -> loss


def load(name: str, folder: Path) -> None:
    """Load a contender in its process."""
    with torch.inference_mode(False):
        _steps[name] = _load_transformers(folder) if name == "transformers" else _load_dsv4(folder, name == "dsv4 bf16")


def _load_dsv4(folder: Path, bf16: bool) -> Callable[[Tensor], Tensor]:
    import dsv4
    from dsv4.kernels.precision import precision
    from dsv4.model.aux_losses import AuxLosses
    from dsv4.model.batch import RaggedBatch
    from dsv4.training.losses import LossWeights, compute_losses
    from dsv4.training.memory import keep_freed_memory

    keep_freed_memory()
    model = dsv4.load(folder, weights="widened").requires_grad_()

    def loss(ids: Tensor) -> Tensor:
        model.zero_grad()
        batch = RaggedBatch.pack(ids.tolist())
        mask = torch.ones(batch.num_tokens, dtype=torch.bool)
        with precision("bf16" if bf16 else "fp32"):
            return compute_losses(model, batch, mask, LossWeights(), AuxLosses())[0]

    return loss


def _load_transformers(folder: Path) -> Callable[[Tensor], Tensor]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    def loss(ids: Tensor) -> Tensor:
        model.zero_grad()
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return loss


def step(name: str, documents: int, tokens: int, vocab: int, seed: int) -> Sample:
    """One forward and backward in a contender's process."""
    with torch.inference_mode(False), torch.enable_grad():
        ids = torch.randint(vocab, (documents, tokens), generator=torch.Generator().manual_seed(seed))
        wall, busy = perf_counter(), process_time()
        loss = _steps[name](ids)
        loss.backward()
        return perf_counter() - wall, process_time() - busy, float(loss.detach()), peak_bytes()


def shape(text: str) -> tuple[int, int]:
    documents, _, tokens = text.partition("x")
    return at_least_one(documents), at_least_one(tokens)


def measure(options: argparse.Namespace, documents: int, tokens: int, folder: Path) -> None:
    """Print one shape's rates and peaks; processes are new, so that a peak is this shape's."""
    samples: dict[str, list[Sample]] = {name: [] for name in options.contenders}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Process(name, options.threads)) for name in samples}

        def take(name: str, number: int) -> float:
            sample = processes[name].call(step, name, documents, tokens, options.config.vocab_size, number)
            samples[name].append(sample)
            return documents * tokens / sample[1 if options.busy else 0]

        for name, process in processes.items():
            process.call(load, name, folder)
            take(name, -1)  # the first step also reserves memory
        rates = in_turns({name: partial(take, name) for name in samples}, options.rounds)
    unit = "tokens per processor second" if options.busy else "tokens/s"
    for name, rate in rates.items():
        print(f"{documents} x {tokens}", line(name, rate, unit), f"peak {samples[name][-1][3] / 1e9:.2f} GB", sep=", ")
    for name in [name for name in rates if name != "transformers" and "transformers" in rates]:
        ratio = median(rates[name]) / median(rates["transformers"])
        memory = samples[name][-1][3] / samples["transformers"][-1][3]
        print(f"{documents} x {tokens}, {name}: {ratio:.2f} times transformers' rate, {memory:.2f} of its peak")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench gradients", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("shapes", nargs="*", type=shape, help="DOCUMENTSxTOKENS; default: 2x512 1x2048 1x4096")
    add("--rounds", type=at_least_one, default=3, help="default: %(default)s")
    add("--threads", type=at_least_one, default=2, help="of each; default: %(default)s")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    add("--busy", action="store_true", help="rates per processor second")
    add("--quick", action="store_true", help="a tiny model")
    options = parser.parse_args(argv)
    options.config = TINY if options.quick else SLICE
    with tempfile.TemporaryDirectory() as folder:
        write_random_values(options.config, Path(folder) / "model", 1, "fp32")
        for documents, tokens in options.shapes or [(2, 512), (1, 2048), (1, 4096)]:
            measure(options, documents, tokens, Path(folder) / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
