"""Records of text, JSONL and Parquet files and of Hugging Face datasets: texts, conversations or whole rows, in order.

Files are read in sorted order and records in the order of the file, so a record has one number for good. Compressed
files (.gz, .bz2, .zst) are read as what they hold.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Protocol, cast

Record = str | dict[str, Any]  # a text, or a conversation: an object with "messages"; or any row as an object

HUB_PREFIX = "hf:"
_COMPRESSED = (".gz", ".bz2", ".zst")
_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt", ".md", ".rst", ".text")
_OF_ROWS = (*_JSON_LINES, ".parquet")
SUFFIXES = (*_TEXT, *_OF_ROWS)
TEXT, MESSAGES = "text", "messages"
ROWS = "*"  # for a column: a record is a whole row
# Keys of a conversation that its prompt depends on; the last two are refused, as by the API.
CONVERSATION = (MESSAGES, "tools", "tool_choice", "reasoning_effort", "response_format", "functions", "system")


class RecordError(ValueError):
    """A source holds no records, or one that is neither a text nor a conversation."""


class NoRecordsError(RecordError):
    """Sources hold no records at all."""


@dataclass(frozen=True)
class Entry:
    """A record, or what is wrong with it, and its place: the file and its line or row."""

    place: str
    record: Record | RecordError


class Source(Protocol):
    """Something with numbered records."""

    @property
    def name(self) -> str:
        """Name in errors and in the index."""
        ...

    @property
    def size(self) -> int:
        """Bytes, or 0 if unknown, for the progress."""
        ...

    def digest(self) -> str:
        """sha256 over all records' bytes, or another name that changes when they do."""
        ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from number `start` on. RecordError at the first that is none."""
        ...

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Records from number `start` on with their places, and the errors of those that are none."""
        ...


@dataclass(frozen=True)
class File:
    """A text file (one record), a JSONL file (one record per line) or a Parquet file (one record per row)."""

    path: Path
    name: str
    column: str | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def digest(self) -> str:
        with self.path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest() + _of_column(self.column)

    def records(self, start: int = 0) -> Iterator[Record]:
        return _raising(self.entries(start))

    def entries(self, start: int = 0) -> Iterator[Entry]:
        kind = _kind(self.path)
        if kind == ".parquet":
            yield from self._rows(start)
        elif kind in _JSON_LINES:
            yield from self._lines(start)
        elif start == 0:
            with _open(self.path) as handle:
                text = handle.read()
            yield _entry(str(self.path), lambda place: _decode(text, place))

    def _lines(self, start: int) -> Iterator[Entry]:
        with _open(self.path) as handle:
            number = 0
            for place, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                if number >= start:
                    yield _entry(f"{self.path}:{place}", lambda where, line=line: _line(line, self.column, where))
                number += 1

    def _rows(self, start: int) -> Iterator[Entry]:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            file = parquet.ParquetFile(self.path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise RecordError(f"{self.path}: no Parquet file: {error}") from error
        with file:
            known = file.schema_arrow.names
            if self.column != ROWS and not {self.column or TEXT, MESSAGES} & {*known}:
                raise RecordError(f"{self.path}: no column {self.column or TEXT!r} or {MESSAGES!r}; it has {known}")
            wanted = known if self.column == ROWS else dict.fromkeys((self.column or TEXT, *CONVERSATION))
            columns = [name for name in wanted if name in known]
            first = 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > start:
                    try:
                        table = file.read_row_group(group, columns=columns)
                    except (pyarrow.ArrowException, OSError) as error:
                        raise RecordError(f"{self.path}, rows from {first + 1}: {error}") from error
                    for row in range(max(0, start - first), rows):

                        def read(where: str, row: int = row, table: Any = table) -> Record:
                            return _row({name: table.column(name)[row] for name in columns}, self.column, where)

                        yield _entry(f"{self.path}, row {first + row + 1}", read)
                first += rows


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the `datasets` library: its name or a folder of save_to_disk, its split and revision."""

    path: str
    column: str | None = None

    @property
    def name(self) -> str:
        return f"{HUB_PREFIX}{self.path}"

    @property
    def size(self) -> int:
        return int(getattr(self._load(), "dataset_size", None) or 0)

    def digest(self) -> str:
        return hashlib.sha256(self._load()._fingerprint.encode()).hexdigest() + _of_column(self.column)

    def records(self, start: int = 0) -> Iterator[Record]:
        return _raising(self.entries(start))

    def entries(self, start: int = 0) -> Iterator[Entry]:
        dataset = self._load()
        for number in range(start, len(dataset)):
            row = _without_nulls(dataset[number])
            yield _entry(f"{self.name}, row {number + 1}", lambda where, row=row: _record(row, self.column, where))

    def _load(self) -> Any:
        """The whole dataset, memory-mapped. `owner/name@revision:split`; without a split, "train"."""
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise RecordError(f"{self.name}: the library `datasets` is not installed: pip install datasets") from error
        where, _, split = self.path.partition(":")
        if Path(where).is_dir():
            loaded = datasets.load_from_disk(where)
            return loaded if isinstance(loaded, datasets.Dataset) else loaded[split or "train"]
        repository, _, revision = where.partition("@")
        return datasets.load_dataset(repository, split=split or "train", revision=revision or None)


def find_sources(patterns: Iterable[str], column: str | None = None) -> list[Source]:
    """Sources of files, folders (searched for the known suffixes), globs and `hf:` names, without duplicates.

    column: where a record's text is, MESSAGES for conversations only, ROWS for rows with all that they have; None:
    "text", of which no record may have both. Of files, MESSAGES and ROWS take JSON lines and Parquet alone. Files are
    sorted by path within each pattern. RecordError for a pattern that matches nothing, or a file of another kind.
    """
    found: dict[str, Source] = {}
    for pattern in patterns:
        if pattern.startswith(HUB_PREFIX):
            found[pattern] = HubDataset(pattern.removeprefix(HUB_PREFIX), column)
            continue
        for path, name in _match(pattern, _OF_ROWS if column in (MESSAGES, ROWS) else SUFFIXES):
            found.setdefault(str(path.resolve()), File(path, name, column))
    return list(found.values())


def _match(pattern: str, suffixes: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Files of one pattern, of those suffixes, each with its name relative to the pattern's folder."""
    root = Path(pattern)
    if root.is_dir():
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and _kind(path) in suffixes]
        # Hidden files are leftovers of writers, or not for readers.
        paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
        if not paths:
            raise RecordError(f"{root}: no file that ends in {', '.join(suffixes)} (or with .gz, .bz2, .zst after it)")
        return [(path, path.relative_to(root).as_posix()) for path in paths]
    if root.is_file():
        matched = [root]
    elif has_magic(pattern):
        matched = [path for path in map(Path, sorted(glob(pattern, recursive=True))) if path.is_file()]
    else:
        matched = []
    if not matched:
        raise RecordError(f"{pattern}: no such file or folder, and no files that match it")
    for path in matched:
        if _kind(path) not in suffixes:
            more = "; of a JSON array, write one object per line, as .jsonl" if _kind(path) == ".json" else ""
            raise RecordError(f"{path}: files that end in {', '.join(suffixes)} are allowed{more}")
    return [(path, path.name) for path in matched]


def _kind(path: Path) -> str:
    """Suffix that says what a file holds, without a compression's."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _open(path: Path) -> io.BufferedIOBase:
    """The decompressed bytes of a file."""
    if path.suffix not in _COMPRESSED:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression="detect")))


def _raising(entries: Iterator[Entry]) -> Iterator[Record]:
    """The records; the first error is raised."""
    for entry in entries:
        if isinstance(entry.record, RecordError):
            raise entry.record
        yield entry.record


def _entry(place: str, read: Callable[[str], Record]) -> Entry:
    try:
        return Entry(place, read(place))
    except RecordError as error:
        return Entry(place, error)


def _of_column(column: str | None) -> str:
    """Part of a digest for a column that was named."""
    return "" if column in (None, ROWS) else f", column {column}"


def _line(line: bytes, column: str | None, place: str) -> Record:
    """The record of a line of JSON."""
    text = _decode(line, place)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{place}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{place}: {type(value).__name__}; a JSON object is allowed")
    return _record(cast("dict[str, Any]", value), column, place)


def _row(cells: dict[str, Any], column: str | None, place: str) -> Record:
    """The record of a table's row."""
    try:
        values = {name: cell.as_py() for name, cell in cells.items()}
    except (ValueError, OverflowError) as error:
        raise RecordError(f"{place}: a value that cannot be read: {error}") from error
    return _record(_without_nulls(values), column, place)


def _without_nulls(value: Any) -> Any:
    """A table's value without null members of objects, at any depth: a column gives each row the keys of all rows."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _without_nulls(inner) for name, inner in fields.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in cast("list[Any]", value)]
    return value


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{place}: byte {error.start} is not UTF-8") from error


def _parsed(value: Any, name: str, place: str) -> Any:
    """A value, or what its JSON says if it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{place}: {name!r} is a text that is no JSON: {error}") from error


def _record(values: dict[str, Any], column: str | None, place: str) -> Record:
    """The text in `column`, else the conversation of an object with messages, which a table may hold as JSON.

    The object itself for ROWS.
    """
    text = values.get(column or TEXT) if column not in (MESSAGES, ROWS) else None
    if column is None and values.get(MESSAGES):
        if text:
            raise RecordError(
                f"{place}: both {TEXT!r} and {MESSAGES!r}; name one: --column {TEXT} or --column {MESSAGES}"
            )
        text = None
    if isinstance(text, str):
        return text
    values = values | {name: _parsed(values[name], name, place) for name in (MESSAGES, "tools") if name in values}
    if column == ROWS or isinstance(values.get(MESSAGES), list):
        return values
    wanted = f"no list in {MESSAGES!r}"
    if column != MESSAGES:
        wanted = f"no text in {column or TEXT!r} and {wanted}"
    raise RecordError(f"{place}: {wanted}; it has {sorted(values)}")
