"""Token frequencies of a run's data, counted in its shards: what the tables of hash-routed layers are balanced by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import numpy as np

from dsv4.checkpoint.atomic import new_file
from dsv4.data.packing import Document
from dsv4.data.shards import Index, ShardError, ShardFolder
from dsv4.data.stable_hash import stable_hash
from dsv4.tokenizer import Tokenizer
from dsv4.training.sources import MixtureSource, PartPaths

COUNTED_TOKENS = 1 << 25  # of a folder of shards: all if it has no more, else pieces of them
PIECE_TOKENS = 1 << 14  # read at one place
TASK_TOKENS = 1 << 16  # of generated documents
FILE = "token_counts.npy"


def count_folder(folder: Path, vocab_size: int, most: float) -> np.ndarray:
    """Occurrences int64 [vocab_size] of each id in a folder of shards, or in pieces of about `most` of its tokens.

    The pieces begin at equal distances in all shards. ShardError if an id is not in the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    shards = ShardFolder(folder, verify=False)  # hashed when the run's batches are read
    apart = PIECE_TOKENS * max(1.0, shards.index.counts.tokens / most)
    for ids in shards.token_arrays():
        for start in map(int, np.arange(0, len(ids), apart)):
            found = np.bincount(ids[start : start + PIECE_TOKENS], minlength=vocab_size)
            if len(found) > vocab_size:
                raise ShardError(f"{folder}: id {len(found) - 1}; the model's vocabulary has {vocab_size}")
            counts += found
    return counts


def count_generated(documents: Iterable[Document], vocab_size: int, most: float) -> np.ndarray:
    """Occurrences int64 [vocab_size] of each id in the first of `documents`, `most` tokens or some more."""
    counts, left = np.zeros(vocab_size, dtype=np.int64), most
    for document in documents:
        counts += np.bincount(document.ids, minlength=vocab_size)
        left -= len(document)
        if left <= 0:
            break
    return counts


def count_run(stages: Iterable[tuple[MixtureSource, float]], vocab_size: int) -> np.ndarray:
    """Occurrences float64 [vocab_size] of each id that a run is to see, from the source and the tokens of its stages.

    Every part of a stage's mixture has its share of the stage's tokens. What `Rates` change in texts is not counted.
    """
    found: dict[tuple[Path, ...], np.ndarray] = {}
    expected = np.zeros(vocab_size)
    for source, tokens in stages:
        weights = sum(part.weight for part in source.parts)
        for part in source.parts:
            if part.folders not in found:
                counts = _count_part(source, part, vocab_size)
                found[part.folders] = counts / max(1.0, counts.sum())
            expected += tokens * part.weight / weights * found[part.folders]
    return expected


def _count_part(source: MixtureSource, part: PartPaths, vocab_size: int) -> np.ndarray:
    if not part.folders:
        return count_generated(_draw_documents(source), vocab_size, TASK_TOKENS)
    counts = np.zeros(vocab_size)
    for folder in part.folders:
        found = count_folder(folder, vocab_size, COUNTED_TOKENS)
        counts += found * (Index.read(folder).counts.tokens / max(1, found.sum()))
    return counts


def _draw_documents(source: MixtureSource) -> Iterator[Document]:
    """Generated documents without end, drawn with a seed of their own."""
    from dsv4.data.generated import TASK_SHARES, TaskDocuments  # needs the tasks' package

    documents = TaskDocuments(Tokenizer.from_pretrained(source.tokenizer_folder), TASK_SHARES, whole_loss=True)
    random = Random(stable_hash("counted", source.seed))
    while True:
        yield documents.draw(random)


def keep_counts(run_dir: Path, stages: Iterable[tuple[MixtureSource, float]], vocab_size: int) -> None:
    """Write `count_run` to the run's folder, unless it is there: a resumed run does not count again."""
    if (run_dir / FILE).is_file():
        return
    counts = count_run(stages, vocab_size)
    with new_file(run_dir / FILE, counts.nbytes) as temporary, temporary.open("wb") as handle:
        np.save(handle, counts)


def read_counts(run_dir: Path) -> np.ndarray:
    """Counts that `keep_counts` wrote."""
    return np.load(run_dir / FILE)
