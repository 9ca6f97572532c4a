"""Tokenised shards: Arrow IPC files, memory-mapped, with one row per document, and one index of a folder of them.

A shard holds one record batch with the columns `ids` (list of uint16 or uint32) and `mask` (list of uint8, empty for a
document whose every token is a target). The list offsets are the document boundaries. Its schema's metadata has the
fingerprint of the data: tokenizer, sources and settings. `index.json` is written last, so a folder with one is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from dsv4.checkpoint.atomic import new_file

FORMAT = "dsv4 tokens 1"
INDEX = "index.json"
_FINGERPRINT, _NEXT, _COUNTS = b"dsv4.fingerprint", b"dsv4.next", b"dsv4.counts"


class ShardError(ValueError):
    """A shard or an index is damaged, missing, or of other data than asked for."""


@dataclass(frozen=True)
class Counts:
    """Sums over documents: their number, tokens, targets, and UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    targets: int = 0
    text_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the index: its name, size and sha256, and what it holds."""

    name: str
    size: int
    sha256: str
    counts: Counts


@dataclass(frozen=True)
class SourceEntry:
    """One source in the index."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Index:
    """Contents of index.json."""

    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    counts: Counts
    shards: tuple[ShardEntry, ...]
    sources: tuple[SourceEntry, ...]

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT} | asdict(self), indent=1, ensure_ascii=False) + "\n"
        with new_file(folder / INDEX) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """ShardError if there is none, or a damaged one."""
        path = folder / INDEX
        if not path.is_file():
            raise ShardError(f"{folder}: no {INDEX}, so these are no shards, or tokenizing them was not finished")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ShardError(f"{path}: another format than {FORMAT!r}")
            values["counts"] = Counts(**values["counts"])
            values["shards"] = tuple(ShardEntry(**s | {"counts": Counts(**s["counts"])}) for s in values["shards"])
            values["sources"] = tuple(SourceEntry(**source) for source in values["sources"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ShardError(f"{path} is damaged: {error!r}") from error


@dataclass(frozen=True)
class ShardHeader:
    """Metadata of a shard: the data's fingerprint, (source, record) that follows its last document, its counts."""

    fingerprint: str
    following: tuple[int, int]
    counts: Counts


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for a vocabulary of at most 65,536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_shard(
    path: Path,
    documents: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    dtype: np.dtype[Any],
    header: ShardHeader,
) -> None:
    """Write a shard under a temporary name, then rename it. Equal arguments give equal bytes."""
    ids = _lists(documents, dtype)
    mask = _lists([np.zeros(0) if mask is None else mask for mask in masks], np.dtype(np.uint8))
    metadata = {
        _FINGERPRINT: header.fingerprint,
        _NEXT: json.dumps(header.following),
        _COUNTS: json.dumps(asdict(header.counts)),
    }
    schema = pa.schema([("ids", ids.type), ("mask", mask.type)], metadata=metadata)
    batch = pa.record_batch([ids, mask], schema=schema)
    with (
        new_file(path, batch.nbytes) as temporary,
        temporary.open("wb") as sink,
        ipc.new_file(sink, schema) as writer,
    ):
        writer.write_batch(batch)


def _lists(rows: Sequence[np.ndarray], dtype: np.dtype[Any]) -> Any:
    """Arrow list column of the rows."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows).astype(dtype)))


@dataclass(frozen=True)
class Shard:
    """An open shard: views of the mapped file."""

    header: ShardHeader
    offsets: np.ndarray  # int32 [documents + 1]: document i is ids[offsets[i]:offsets[i + 1]]
    ids: np.ndarray  # uint16 or uint32 [tokens]
    mask_offsets: np.ndarray  # int32 [documents + 1]: empty for a document whose every token is a target
    mask: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def mask_of(self, document: int) -> np.ndarray | None:
        """Loss mask of a document, None where every token is a target."""
        start, stop = self.mask_offsets[document], self.mask_offsets[document + 1]
        return self.mask[start:stop] if stop > start else None


def open_shard(path: Path) -> Shard:
    """Map a shard's file. ShardError, naming the file, if it is missing or no shard."""
    try:
        batch = ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        metadata = batch.schema.metadata
        following = tuple(json.loads(metadata[_NEXT]))
        header = ShardHeader(metadata[_FINGERPRINT].decode(), following, Counts(**json.loads(metadata[_COUNTS])))
        ids, mask = batch.column("ids"), batch.column("mask")
        shard = Shard(header, *_parts(ids), *_parts(mask))
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ShardError(f"{path} is damaged, or no shard: {error}") from error
    if len(shard) != header.counts.documents or len(shard.ids) != header.counts.tokens:
        raise ShardError(
            f"{path} is damaged: {len(shard)} documents and {len(shard.ids)} tokens, but it says {header.counts}"
        )
    return shard


def _parts(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a list column, without a copy."""
    return column.offsets.to_numpy(zero_copy_only=True), column.values.to_numpy(zero_copy_only=True)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class ShardFolder:
    """All documents of a folder of shards, numbered in order. Pickles as its path; opens on first use.

    `verify`: hash every shard when opening, else compare its size only.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder, self.index = Path(folder), Index.read(Path(folder))
        self._shards = [self._open(entry, verify) for entry in self.index.shards]
        lengths = [np.diff(shard.offsets) for shard in self._shards]
        self.lengths = np.concatenate([np.zeros(0, np.int32), *lengths]).astype(np.int64)  # tokens of each document
        self._first = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFolder, (self.folder, False)

    def _open(self, entry: ShardEntry, verify: bool) -> Shard:
        path = self.folder / entry.name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ShardError(f"{path} {found}; the index has it with {entry.size} bytes")
        if verify and hash_file(path) != entry.sha256:
            raise ShardError(f"{path} is damaged: its sha256 is not the one in the index")
        shard = open_shard(path)
        if shard.header.fingerprint != self.index.fingerprint:
            raise ShardError(f"{path} is of other data: its fingerprint is not the one in the index")
        wanted = token_dtype(self.index.vocab_size)
        if (shard.ids.dtype, shard.mask.dtype) != (wanted, np.uint8):
            raise ShardError(f"{path}: ids are {shard.ids.dtype}, masks {shard.mask.dtype}; allowed: {wanted}, uint8")
        if verify and len(shard.ids) and (highest := int(shard.ids.max())) >= self.index.vocab_size:
            raise ShardError(f"{path}: token id {highest}; the tokenizer has {self.index.vocab_size} ids")
        return shard

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of a document, and its loss mask or None: views of the mapped file."""
        place = int(np.searchsorted(self._first, number, side="right")) - 1
        shard, row = self._shards[place], number - int(self._first[place])
        return shard.ids[shard.offsets[row] : shard.offsets[row + 1]], shard.mask_of(row)

    def token_arrays(self) -> list[np.ndarray]:
        """Ids of all documents of each shard: views of the mapped files."""
        return [shard.ids for shard in self._shards]

    def check_tokenizer(self, sha256: str) -> None:
        """ShardError if the documents were encoded with another tokenizer."""
        if self.index.tokenizer_sha256 != sha256:
            raise ShardError(f"{self.folder} was tokenized with another tokenizer than the model's: tokenize it again")
