"""Picklable batch sources for helper processes: they hold the loader's arguments and build it on first use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.data.loader import NanoLoader, TokenBatch
from dsv4.tokenizer import Tokenizer


@dataclass
class NanoSource:
    """Batches of a NanoLoader with the tokenizer in `tokenizer_folder`."""

    tokenizer_folder: Path
    stage: str
    seed: int
    tokens_per_batch: int
    _loader: NanoLoader | None = field(default=None, repr=False, compare=False)

    def batch(self, step: int, /) -> TokenBatch:
        """Batch number `step`, independent of earlier calls."""
        if self._loader is None:
            tokenizer = Tokenizer.from_pretrained(self.tokenizer_folder)
            self._loader = NanoLoader(tokenizer, self.stage, self.seed, self.tokens_per_batch)
        return self._loader.batch(step)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loader": None}
