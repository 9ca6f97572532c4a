"""Trainers in processes of their own: dsv4 in some precision with Muon, transformers in fp32 with AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from benchmarks.harness.process import peak_bytes
from benchmarks.harness.training_parts import timed_parts
from dsv4.analysis.activations import Recompute

TRANSFORMERS = "transformers"
PRECISIONS = {"dsv4": "fp32", "dsv4 bf16": "bf16", "dsv4 fp8": "fp8"}  # of each contender of ours
CONTENDERS = (*PRECISIONS, TRANSFORMERS)
RATE = 1e-4  # learning rate
CLIP = 1.0


@dataclass(frozen=True)
class Took:
    """One measurement: wall and processor seconds, mean loss, peak bytes of the process so far, seconds by part."""

    wall: float
    busy: float
    loss: float
    peak: int
    parts: dict[str, float]


class Contender(Protocol):
    def gradient(self, batches: Sequence[Tensor]) -> float:
        """Forward and backward of micro-batches of ids [documents, tokens] -> mean loss per token."""
        ...

    def update(self) -> None:
        """The optimizer's step, with the gradient clipped; drops the gradient."""
        ...


class Dsv4:
    def __init__(self, folder: Path, precision: str, recompute: Recompute) -> None:
        import dsv4
        from dsv4.training.memory import keep_freed_memory
        from dsv4.training.newton_schulz import product_dtype
        from dsv4.training.optim import MuonAdamW

        keep_freed_memory()
        self.model = dsv4.load(folder, weights="widened").requires_grad_()
        self.precision = precision
        self.recompute: Recompute = recompute
        dtype = product_dtype(torch.device("cpu"))
        self.optimizer = MuonAdamW(self.model, self.model.config, compute_dtype=dtype)

    def gradient(self, batches: Sequence[Tensor]) -> float:
        from dsv4.training.gradient import Work, compute_gradient, pack_batch
        from dsv4.training.losses import LossWeights

        self.optimizer.zero_grad()
        packed = [pack_batch(Documents(ids.tolist()), self.model.device) for ids in batches]
        work = Work(0, 0, LossWeights(), False, cast("Any", self.precision), recompute=self.recompute)
        return compute_gradient(self.model, packed, work).losses.next_token

    def update(self) -> None:
        self.optimizer.step(RATE, min(1.0, CLIP / (self.optimizer.gradient_norm() + 1e-6)))
        self.optimizer.zero_grad()


class Documents:
    """A batch of documents whose every token is a target."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents, self.loss_masks = documents, [[1] * len(document) for document in documents]


class Transformers:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, foreach=True)

    def gradient(self, batches: Sequence[Tensor]) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for ids in batches:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        return total

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


_contenders: dict[str, Contender] = {}  # of this process


def load(name: str, folder: Path, recompute: Recompute = "none") -> None:
    """Load a contender in its process; recompute: activation checkpointing of ours."""
    with torch.inference_mode(False):
        ours = name in PRECISIONS
        _contenders[name] = Dsv4(folder, PRECISIONS[name], recompute) if ours else Transformers(folder)


def run(name: str, shape: tuple[int, int], micro_batches: int, updates: bool, seed: int, parts: bool = False) -> Took:
    """Forward and backward of random documents x tokens, several micro-batches, and the update if asked for.

    parts: clock each part, by processor time; the native calls of dsv4 alone.
    """
    with torch.inference_mode(False), torch.enable_grad():
        contender, generator = _contenders[name], torch.Generator().manual_seed(seed)
        vocab = cast("Any", contender).model.config.vocab_size
        batches = [torch.randint(vocab, shape, generator=generator) for _ in range(micro_batches)]
        if parts:
            with timed_parts(busy=True) as seconds:
                return _take(contender, batches, updates, seconds)
        return _take(contender, batches, updates, {})


def _take(contender: Contender, batches: Sequence[Tensor], updates: bool, parts: dict[str, float]) -> Took:
    wall, busy = perf_counter(), process_time()
    loss = contender.gradient(batches)
    before = process_time()
    if updates:
        contender.update()
        parts["optimizer"] = process_time() - before
    return Took(perf_counter() - wall, process_time() - busy, loss, peak_bytes(), parts)


def bf16_gradients() -> bool:
    """True if the gradients' products of bf16 training run at the rate of BF16 here."""
    from dsv4.kernels.precision import multiplies_bf16

    return multiplies_bf16()


def matrices(folder: Path) -> list[tuple[int, int]]:
    """Shapes of the independent matrices that Muon orthogonalizes in the main model of a folder."""
    import dsv4
    from dsv4.training.optim import split_parameters

    model = dsv4.load(folder, weights="widened").requires_grad_()
    model.mtp.requires_grad_(False)
    return [shape for rule in split_parameters(model.named_parameters(), model.config) for shape in rule.matrices]
