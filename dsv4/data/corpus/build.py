"""Corpus of packages: per package one JSONL file, in `validation/` or `train/`; unique lines; resumed per package."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dsv4.checkpoint.atomic import new_file
from dsv4.data.corpus.debian import (
    DebianPackage,
    borrowed_licences,
    copyright_files,
    fetch_package,
    read_licences,
    unpack,
    write_text,
)
from dsv4.data.corpus.formats import is_whole, read_documents, sample_archive
from dsv4.data.corpus.unique_lines import SeenLines

VERSION = "2"  # of the texts that a package gives: increase it when a reader changes
_EVERYWHERE = ("*",)
_NEVER = ("*/changelog*", "*/copyright", "*/NEWS*", "*.svg", "*/genindex*", "*/searchindex*")
_FILES_AT_ONCE = 16
_FOR_WORKERS = 200  # files: starting processes takes seconds


@dataclass(frozen=True)
class Wanted:
    """A package of the corpus. Paths are relative to the package's root; `sample`: one source file in so many."""

    name: str
    group: str
    held_out: bool = False
    include: tuple[str, ...] = _EVERYWHERE
    exclude: tuple[str, ...] = ()
    sample: int = 0

    @property
    def file(self) -> str:
        """Name of its JSONL file in the corpus."""
        return f"{'validation' if self.held_out else 'train'}/{self.group}/{self.name}.jsonl"


@dataclass(frozen=True)
class Made:
    """A package in the data card."""

    name: str
    version: str
    group: str
    split: str
    file: str
    archive: str
    archive_bytes: int
    archive_sha256: str
    licences: list[str]
    documents: int
    bytes_before: int  # UTF-8 bytes of the extracted text, before lines were made unique
    bytes: int
    sha256: str
    seconds: float = field(default=0.0, compare=False)


def ordered(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Held-out packages first, so that no line of theirs is in the training texts."""
    return sorted(wanted, key=lambda package: not package.held_out)


class Builder:
    """Adds packages to the corpus in `folder` one after the other, in the order of `ordered`."""

    def __init__(self, folder: Path, mirror: str, workers: int) -> None:
        self._folder, self._mirror, self._workers = folder, mirror, workers
        self._seen = SeenLines()
        self._chain = VERSION  # hash of all packages so far: each one's unique lines depend on those before it

    def add(self, wanted: Wanted, package: DebianPackage, clock: Callable[[], float]) -> tuple[Made, bool]:
        """Add a package; True if an earlier call had done so, with the same packages before it."""
        parts = [self._chain, package.sha256, json.dumps(asdict(wanted))]
        self._chain = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        state, hashes = (self._folder / "state" / f"{wanted.name}{suffix}" for suffix in (".json", ".npy"))
        done = _read_state(state, self._chain)
        if done is not None and (self._folder / wanted.file).is_file():
            self._seen.add(np.load(hashes))
            return done, True
        started = clock()
        made = self._make(wanted, package)
        made = replace(made, seconds=round(clock() - started, 1))
        state.parent.mkdir(parents=True, exist_ok=True)
        with new_file(hashes) as temporary:
            buffer = BytesIO()
            np.save(buffer, self._seen.finish_package())
            temporary.write_bytes(buffer.getvalue())
        write_text(state, json.dumps({"chain": self._chain, "made": asdict(made)}, indent=1) + "\n")
        return made, False

    def _make(self, wanted: Wanted, package: DebianPackage) -> Made:
        archive = fetch_package(self._mirror, package, self._folder / "archives")
        root = self._folder / "unpacked" / wanted.name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        try:
            unpack(archive, root)
            copyrights = "\n\n".join(path.read_text("utf-8", "replace") for path in copyright_files(root))
            write_text(self._folder / "licences" / f"{wanted.name}.txt", copyrights)
            licences = (not copyrights and borrowed_licences(root)) or read_licences(copyrights)
            documents, before, after = self._write(wanted, root)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        with (self._folder / wanted.file).open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        return Made(
            wanted.name, package.version, wanted.group, "validation" if wanted.held_out else "train", wanted.file,
            package.filename, package.size, package.sha256, licences, documents, before, after, sha256,
        )  # fmt: skip

    def _write(self, wanted: Wanted, root: Path) -> tuple[int, int, int]:
        """Write the package's JSONL file; return its documents, the bytes of text before and after."""
        target = self._folder / wanted.file
        target.parent.mkdir(parents=True, exist_ok=True)
        documents = before = after = 0
        with new_file(target) as temporary, temporary.open("w", encoding="utf-8") as file:
            for name, text, whole in self._texts(wanted, root):
                cleaned = self._seen.clean(text, whole)
                before += len(text.encode("utf-8", "replace"))
                if cleaned:
                    documents, after = documents + 1, after + len(cleaned.encode())
                    record = {"text": cleaned, "package": wanted.name, "path": name}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return documents, before, after

    def _texts(self, wanted: Wanted, root: Path) -> Iterator[tuple[str, str, bool]]:
        """(name, text, is whole) of every document of a package, in the order of the paths."""
        if wanted.sample:
            for archive in sorted(root.rglob("*.tar.*")):
                for name, text in sample_archive(archive, wanted.sample):
                    yield name, text, True
            return
        paths = choose_files(wanted, root)
        if self._workers > 1 and len(paths) >= _FOR_WORKERS:
            with ProcessPoolExecutor(self._workers, get_context("spawn")) as pool:
                yield from _named(root, paths, pool.map(read_documents, paths, chunksize=_FILES_AT_ONCE))
        else:
            yield from _named(root, paths, map(read_documents, paths))


def choose_files(wanted: Wanted, root: Path) -> list[Path]:
    """Files of an unpacked package that the corpus takes, in order."""
    chosen: list[Path] = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        included = any(fnmatch(name, pattern) for pattern in wanted.include)
        excluded = any(fnmatch(name, pattern) for pattern in (*_NEVER, *wanted.exclude))
        if included and not excluded and path.is_file() and not path.is_symlink():
            chosen.append(path)
    return chosen


def _named(root: Path, paths: Sequence[Path], texts: Iterator[list[str]]) -> Iterator[tuple[str, str, bool]]:
    for path, documents in zip(paths, texts, strict=True):
        for text in documents:
            yield path.relative_to(root).as_posix(), text, is_whole(path)


def _read_state(path: Path, chain: str) -> Made | None:
    """The result of an earlier call for a package, if the packages before it were the same."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Made(**values["made"]) if values["chain"] == chain else None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged; remove it: {error!r}") from error
