"""Picklable batch sources for helper processes: they hold the loader's arguments and build it on first use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.data.augment import Rates
from dsv4.data.packing import TokenBatch
from dsv4.data.prefetch import Prefetch
from dsv4.data.shard_loader import MixtureLoader, Part, RowShape, make_batch
from dsv4.data.shards import ShardFolder, hash_file
from dsv4.tokenizer import Tokenizer

TASKS = "tasks"  # name of the part of generated documents


@dataclass(frozen=True)
class PartPaths:
    """A part of a mixture: folders of shards, its share of the tokens, and on which tokens it has loss.

    The name TASKS with no folders: conversations generated from the tasks.
    """

    name: str
    folders: tuple[Path, ...]
    weight: float = 1.0
    loss: str = "mask"


@dataclass
class MixtureSource:
    """Batches of a mixture of shards, tokenized with the tokenizer in `tokenizer_folder`.

    One batch is one row of `shape`. `workers` processes prepare groups of rows; the batches are the same for any number
    of them. ShardError if a shard is damaged, or of another tokenizer.
    """

    tokenizer_folder: Path
    parts: tuple[PartPaths, ...]
    seed: int
    shape: RowShape
    rates: Rates = field(default_factory=Rates)
    workers: int = 0
    _loader: MixtureLoader | None = field(default=None, repr=False, compare=False)
    _ahead: Prefetch | None = field(default=None, repr=False, compare=False)
    _verified: bool = field(default=False, repr=False, compare=False)

    def batch(self, step: int, /) -> TokenBatch:
        """Batch number `step`, independent of earlier calls."""
        loader = self.open()
        if self._ahead is None:
            # Ranks ask for small groups at unequal distances, at each of which the processes would be started again.
            few = loader.group_rows < self.shape.group_rows // 2
            self._ahead = Prefetch(self, 0 if few else self.workers)
        group, place = loader.locate(step)
        return make_batch(self._ahead.group(group)[place])

    def close(self) -> None:
        """End the processes that prepare batches; the next batch that is asked for starts them again."""
        if self._ahead is not None:
            self._ahead.close()

    def group(self, number: int, /) -> Any:
        """Group of rows number `number`."""
        return self.open().group(number)

    def open(self) -> MixtureLoader:
        """Open the shards and check them; hashed once, not again in helper processes."""
        if self._loader is None:
            tokenizer = Tokenizer.from_pretrained(self.tokenizer_folder)
            sha256 = hash_file(self.tokenizer_folder / "tokenizer.json")
            parts, generated = [], None
            for part in self.parts:
                folders = tuple(ShardFolder(folder, verify=not self._verified) for folder in part.folders)
                for folder in folders:
                    folder.check_tokenizer(sha256)
                if not folders and part.name != TASKS:
                    raise ValueError(f"part {part.name!r} has no folder; only {TASKS!r} needs none")
                if not folders:
                    from dsv4.data.generated import TASK_SHARES, TaskDocuments  # needs the tasks' package

                    generated = TaskDocuments(tokenizer, TASK_SHARES, part.loss == "all")
                parts.append(Part(part.name, part.weight, folders or None, part.loss))
            self._verified = True
            self._loader = MixtureLoader(parts, tokenizer, self.seed, self.shape, self.rates, generated)
        return self._loader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loader": None, "_ahead": None}
