"""dsv4 and transformers behind one interface: append tokens to a sequence, get the logits of the last one.

A peer imports its package when it is created, in its own process (see process.py), where `load` keeps it for `ask`.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.process import OURS, peak_bytes

Timing = tuple[float, int]  # seconds of forwards, peak bytes of the process


class Peer(ABC):
    settings: dict[str, Any]  # versions and options, for the saved run
    vocab_size: int

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}  # depth -> snapshot that decode_at resumes

    @abstractmethod
    def begin(self, max_tokens: int) -> None:
        """Start a new sequence of up to max_tokens tokens."""

    @abstractmethod
    def extend(self, ids: list[int]) -> Tensor:
        """Append tokens; return fp32 logits [vocab] of the last one."""

    @abstractmethod
    def hold(self) -> Any:
        """Snapshot of the sequence; `resume` may restore it any number of times."""

    @abstractmethod
    def resume(self, held: Any) -> None: ...

    def logits(self, ids: list[int], prompt: int) -> np.ndarray:
        """Logits [1 + steps, vocab]: of the prompt's last token, then of each decoded token."""
        self.begin(len(ids))
        pieces = [ids[:prompt], *([token] for token in ids[prompt:])]
        return torch.stack([self.extend(piece) for piece in pieces]).numpy()

    def prefill(self, length: int, seed: int) -> Timing:
        self.begin(length)
        return self.feed(length, seed)

    def decode_at(self, depth: int, steps: int, seed: int) -> Timing:
        """Time of the decode steps alone; the context of a depth is read once and kept."""
        if depth not in self._held:
            self.begin(depth + steps)
            if depth:
                self.extend(self._random_ids(depth, seed))
            self._held[depth] = self.hold()
        self.resume(self._held[depth])
        return self.decode_on(steps, seed)

    def feed(self, length: int, seed: int) -> Timing:
        return self._timed([self._random_ids(length, seed)])

    def decode_on(self, steps: int, seed: int) -> Timing:
        """Decode random tokens, as llama-bench does, then restore the sequence.

        Greedy tokens of random weights soon repeat, and with them the experts.
        """
        held = self.hold()
        timing = self._timed([[token] for token in self._random_ids(steps, seed)])
        self.resume(held)
        return timing

    def _random_ids(self, length: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(self.vocab_size, size=length).tolist()

    def _timed(self, pieces: list[list[int]]) -> Timing:
        """Time of one forward and argmax per piece."""
        start = perf_counter()
        for ids in pieces:
            self.extend(ids).numpy().argmax()
        return perf_counter() - start, peak_bytes()


class Dsv4Peer(Peer):
    """dsv4 as its engine runs it: ragged batches of at most max_num_batched_tokens, into a cache."""

    def __init__(self, folder: Path, numerics: str) -> None:
        super().__init__()
        import dsv4
        from dsv4.engine.config import EngineConfig
        from dsv4.kernels import backends
        from dsv4.model.batch import RaggedBatch

        self._batch = RaggedBatch
        self._step = EngineConfig().max_num_batched_tokens
        self._model = dsv4.load(folder, numerics=numerics)
        self._cache: Any = None
        self.vocab_size = self._model.config.vocab_size
        kernels = backends.describe().removeprefix("kernels: ")
        self.settings = {"version": dsv4.__version__, "chunk": self._step, "numerics": numerics, "kernels": kernels}

    def begin(self, max_tokens: int) -> None:
        self._cache = self._model.new_cache(batch_size=1, max_tokens=max_tokens)

    def extend(self, ids: list[int]) -> Tensor:
        logits = torch.empty(0)
        for start in range(0, len(ids), self._step):
            batch = self._batch.pack([ids[start : start + self._step]], starts=self._cache.lengths)
            last = start + batch.num_tokens == len(ids)
            rows = np.array([batch.num_tokens - 1] if last else [], dtype=np.int64)
            logits = self._model.next_token_logits(batch, self._cache, rows)
        return logits[0]

    def hold(self) -> Any:
        return self._cache, self._cache.snapshot(0)

    def resume(self, held: Any) -> None:
        self._cache, snapshot = held
        self._cache.restore(0, snapshot)

    def element_bytes(self) -> int:
        """Bytes per element of a compressed entry."""
        layers = (layer.main for layer in self._cache.layers if layer.main is not None)
        return next(layers).entries.element_size()


class TransformersPeer(Peer):
    """transformers with from_pretrained's defaults: whole prompts in one forward, one row of logits, its own cache."""

    def __init__(self, folder: Path, numerics: str) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        assert numerics == "float", "transformers has no other"
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._past: Any = None
        config = self._model.config
        self.vocab_size = config.vocab_size
        self.settings = {
            "version": version("transformers"),
            "attention": config._attn_implementation,
            "experts": config._experts_implementation,
        }

    def begin(self, max_tokens: int) -> None:
        self._past = None

    def extend(self, ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids])
        out = self._model(input_ids=tokens, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = out.past_key_values
        return out.logits[0, -1].float()

    def hold(self) -> Any:
        return copy.deepcopy(self._past)

    def resume(self, held: Any) -> None:
        self._past = copy.deepcopy(held)


_loaded: dict[str, Peer] = {}  # peers of this process, by name


def load(name: str, folder: Path) -> dict[str, Any]:
    """Create a peer and return its settings. "dsv4 shipped" computes in shipped numerics."""
    make = TransformersPeer if name == "transformers" else Dsv4Peer
    peer = _loaded[name] = make(folder, "shipped" if name.endswith(" shipped") else "float")
    running = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**peer.settings, **running, **{name.lower(): os.environ.get(name) for name in OURS}}


def ask(name: str, method: str, *arguments: Any) -> Any:
    """Call a method of a loaded peer."""
    return getattr(_loaded[name], method)(*arguments)
