"""Sources to shards: deterministic, and resumed after the last whole shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.checkpoint.atomic import clear_folder
from dsv4.data.encoding import Encoded, RecordEncoder
from dsv4.data.records import MESSAGES, Entry, NoRecordsError, Record, RecordError, Source
from dsv4.data.shards import (
    FORMAT,
    INDEX,
    Counts,
    Index,
    ShardEntry,
    ShardError,
    ShardHeader,
    SourceEntry,
    hash_file,
    open_shard,
    token_dtype,
    write_shard,
)
from dsv4.tokenizer.prompts import PromptEncoder

SHARD_TOKENS = 1 << 24  # 32 MB of uint16
_BATCH_CHARACTERS = 1 << 20  # text encoded at once
_MARKS = 2  # tokens of an empty text: BOS and EOS

_Document = tuple[str, Record]  # place and record
Progress = Callable[[str, int, int], None]  # name of the source, bytes done (estimated), bytes in all


@dataclass
class _Pending:
    """Documents of the next shard."""

    documents: list[Encoded] = field(default_factory=list[Encoded])
    tokens: int = 0

    def add(self, document: Encoded) -> None:
        self.documents.append(document)
        self.tokens += len(document.ids)

    def counts(self) -> Counts:
        documents = self.documents
        targets, num_bytes = sum(d.targets for d in documents), sum(d.num_bytes for d in documents)
        return Counts(len(documents), self.tokens, targets, num_bytes)


class ShardWriter:
    """Tokenizes `sources` into `folder`, a shard per `shard_tokens` tokens; a whole shard is never written again."""

    def __init__(
        self, sources: Sequence[Source], tokenizer_folder: Path, folder: Path, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        if not 0 < shard_tokens < 1 << 30:
            raise ValueError(f"{shard_tokens} tokens per shard; allowed: 1 to {(1 << 30) - 1}")
        self._sources, self._folder, self._shard_tokens = sources, folder, shard_tokens
        prompts = PromptEncoder.from_pretrained(tokenizer_folder)
        self._encoder, self._vocab_size = RecordEncoder(prompts), prompts.tokenizer.vocab_size
        self._dtype = token_dtype(self._vocab_size)
        self._tokenizer_sha256 = hash_file(tokenizer_folder / "tokenizer.json")
        self._entries = tuple(SourceEntry(source.name, source.digest()) for source in sources)
        settings = [FORMAT, self._tokenizer_sha256, str(prompts.ladder), shard_tokens]
        described = json.dumps([settings, [[entry.name, entry.sha256] for entry in self._entries]])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def run(self, progress: Progress | None = None) -> Index:
        """Write the missing shards, then the index. ShardError if the folder holds shards of other data."""
        self._folder.mkdir(parents=True, exist_ok=True)
        clear_folder(self._folder)
        if (self._folder / INDEX).exists():
            index = Index.read(self._folder)
            if index.fingerprint != self.fingerprint:
                raise ShardError(
                    f"{self._folder / INDEX} is of other data: other sources, tokenizer or settings; remove it"
                )
            return index
        done, following = self._find_done()
        pending = _Pending()
        for encoded, place in self._encoded(following, progress):
            pending.add(encoded)
            if pending.tokens >= self._shard_tokens:
                done.append(self._write(len(done), pending, place))
                pending = _Pending()
        names = ", ".join(entry.name for entry in self._entries)
        if not done and not pending.documents:
            raise NoRecordsError(f"{names}: no records")
        if not done and pending.tokens <= _MARKS * len(pending.documents):
            raise RecordError(f"{names}: no text in any record")
        if pending.documents:
            done.append(self._write(len(done), pending, (len(self._sources), 0)))
        counts = sum((entry.counts for entry in done), Counts())
        index = Index(
            self.fingerprint, self._tokenizer_sha256, self._vocab_size, self._dtype.name, counts, tuple(done),
            self._entries,
        )  # fmt: skip
        index.write(self._folder)
        return index

    def _find_done(self) -> tuple[list[ShardEntry], tuple[int, int]]:
        """Whole shards of an earlier, killed call, and (source, record) that follows them."""
        done: list[ShardEntry] = []
        following = (0, 0)
        while (path := self._path(len(done))).exists():
            shard = open_shard(path)
            if shard.header.fingerprint != self.fingerprint:
                raise ShardError(f"{path} is of other data: other sources, tokenizer or settings; remove it")
            following = shard.header.following
            done.append(ShardEntry(path.name, path.stat().st_size, hash_file(path), shard.header.counts))
        return done, following

    def _encoded(self, start: tuple[int, int], progress: Progress | None) -> Iterator[tuple[Encoded, tuple[int, int]]]:
        """Encoded records from `start` on, each with the place of the record after it."""
        sizes = [source.size for source in self._sources]
        for number in range(start[0], len(self._sources)):
            source = self._sources[number]
            first = start[1] if number == start[0] else 0
            read = 0
            for place, documents in _batches(source.entries(first), first):
                for offset, encoded in enumerate(self._encode(documents)):
                    yield encoded, (number, place + offset + 1)
                    read += encoded.num_bytes
                if progress:
                    progress(source.name, sum(sizes[:number]) + min(read, sizes[number]), sum(sizes))
            if progress:
                progress(source.name, sum(sizes[: number + 1]), sum(sizes))

    def _encode(self, documents: list[_Document]) -> list[Encoded]:
        try:
            return self._encoder.encode([record for _, record in documents])
        except ValueError:
            for place, record in documents:  # one by one, to name the record
                try:
                    self._encoder.encode([record])
                except ValueError as error:
                    raise RecordError(f"{place}: {error}") from error
            raise

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.arrow"

    def _write(self, number: int, pending: _Pending, following: tuple[int, int]) -> ShardEntry:
        path, counts = self._path(number), pending.counts()
        ids, masks = [d.ids for d in pending.documents], [d.mask for d in pending.documents]
        highest = max(int(document.max()) for document in ids)
        if highest >= self._vocab_size:
            raise ShardError(f"{path}: token id {highest}; the tokenizer has {self._vocab_size} ids")
        write_shard(path, ids, masks, self._dtype, ShardHeader(self.fingerprint, following, counts))
        return ShardEntry(path.name, path.stat().st_size, hash_file(path), counts)


def _batches(entries: Iterator[Entry], first: int) -> Iterator[tuple[int, list[_Document]]]:
    """Records grouped by size, each group with the number of its first. The first RecordError is raised."""
    group: list[_Document] = []
    size = 0
    for entry in entries:
        record = entry.record
        if isinstance(record, RecordError):
            raise record
        group.append((entry.place, record))
        size += len(record) if isinstance(record, str) else sum(len(str(m)) for m in record[MESSAGES])
        if size >= _BATCH_CHARACTERS:
            yield first, group
            first, group, size = first + len(group), [], 0
    if group:
        yield first, group
