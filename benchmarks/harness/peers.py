"""dsv4 and transformers behind one interface: an empty cache, then more tokens of a sequence -> logits of the last.

A peer imports its package when it is made: dsv4 asks MKL for reproducible rounding, which would slow transformers down.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Peer(Protocol):
    settings: dict[str, Any]  # how it was run, for the record

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence; the next one has up to max_tokens tokens."""
        ...

    def extend(self, ids: list[int]) -> Tensor:
        """Append tokens -> fp32 logits [vocab] of the last one."""
        ...

    def hold(self) -> Any:
        """The sequence as it is now, for `resume`, as often as wanted."""
        ...

    def resume(self, held: Any) -> None: ...


class Dsv4Peer:
    """dsv4 as its engine runs it: ragged batches of up to the scheduler's tokens a step, into a cache."""

    def __init__(self, folder: Path, numerics: str = "float") -> None:
        import dsv4
        from dsv4.engine.config import EngineConfig
        from dsv4.kernels import backends
        from dsv4.model.batch import RaggedBatch

        self._batch = RaggedBatch
        self._step = EngineConfig().max_num_batched_tokens
        self._model = dsv4.load(folder, numerics=numerics)
        self._cache: Any = None
        kernels = backends.describe().removeprefix("kernels: ")
        self.settings = {
            "version": dsv4.__version__,
            "chunk": self._step,
            "numerics": self._model.numerics,
            "kernels": kernels,
        }

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
        """Bytes of one element of a compressed entry."""
        layers = (layer.main for layer in self._cache.layers if layer.main is not None)
        return next(layers).entries.element_size()


class TransformersPeer:
    """transformers as from_pretrained gives it: whole prompts in one forward, one row of logits, its own cache."""

    def __init__(self, folder: Path, numerics: str = "float") -> None:
        from transformers import AutoModelForCausalLM

        assert numerics == "float", "transformers has no other"
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._past: Any = None
        config = self._model.config
        self.settings = {
            "version": version("transformers"),
            "attention": config._attn_implementation,
            "experts": config._experts_implementation,
        }

    def begin(self, max_tokens: int) -> None:
        self._past = None

    def extend(self, ids: list[int]) -> Tensor:
        out = self._model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self._past = out.past_key_values
        return out.logits[0, -1].float()

    def hold(self) -> Any:
        return copy.deepcopy(self._past)

    def resume(self, held: Any) -> None:
        self._past = copy.deepcopy(held)


MAKERS: dict[str, type[Dsv4Peer] | type[TransformersPeer]] = {"dsv4": Dsv4Peer, "transformers": TransformersPeer}
