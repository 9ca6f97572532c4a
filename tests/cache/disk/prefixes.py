"""Sequences whose cache contents follow from their number, so that whatever is loaded can be checked."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv4.cache import Cache
from dsv4.cache.disk import DiskCache, DiskMatch, LoadedPrefix, PrefixKeys
from dsv4.cache.disk.packing import unpack_pages
from dsv4.cache.state import Snapshot
from dsv4.config import PAGE_TOKENS

from ...model.tiny import tiny_config

CONFIG = tiny_config(schedule=(0, 4, 128), head_dim=8, qk_rope_head_dim=4, index_head_dim=8)
IDENTITY = b"a model"


def new_cache() -> Cache:
    return Cache(CONFIG, 1, 64 * PAGE_TOKENS, torch.device("cpu"), torch.float32)


def open_disk(
    path: Path, cache: Cache | None = None, max_bytes: int | None = None, replay: int | None = None,
    identity: bytes = IDENTITY,
) -> DiskCache:  # fmt: skip
    return DiskCache(path, identity, cache or new_cache(), max_bytes, replay)


def tokens_of(number: int, start: int, stop: int) -> list[int]:
    return [(number * 31 + position * 7) % 97 for position in range(start, stop)]


def keys_of(disk: DiskCache, number: int, salt: str | None = None) -> PrefixKeys:
    return disk.keys(lambda start, stop: tokens_of(number, start, stop), salt)


def fill(cache: Cache, number: int, length: int) -> tuple[list[int], Snapshot]:
    """Pages with the contents of a sequence, and a snapshot after `length` tokens of it."""
    pages = list(range(-(-length // PAGE_TOKENS)))
    size = cache.page_bytes // 4
    for page in pages:
        content = torch.full((1, size), float(number * 1000 + page)).view(torch.uint8)
        for compressor, entries in zip(
            (c for layer in cache.layers for c in layer.compressors()), unpack_pages(cache, content), strict=True
        ):
            compressor.write_pages([page], entries)
    snapshot = cache.snapshot(0)
    for tensor in snapshot.fields().values():
        tensor.fill_(number + length / 4096)
    return pages, Snapshot(length, snapshot.layers)


def store(disk: DiskCache, number: int, length: int, salt: str | None = None, state: bool = True) -> None:
    pages, snapshot = fill(disk.cache, number, length)
    disk.store(keys_of(disk, number, salt), length, pages, snapshot if state else None)


def find(disk: DiskCache, number: int, count: int, salt: str | None = None) -> DiskMatch | None:
    return disk.find(keys_of(disk, number, salt), count)


def check(disk: DiskCache, number: int, count: int, first: int = 0) -> int:
    """Tokens of a sequence that can be loaded, 0 for a miss; AssertionError where anything of them is wrong."""
    match = find(disk, number, count)
    loaded = None if match is None or not match.length else disk.load(match, first)
    if match is None or loaded is None:
        return 0
    check_loaded(disk, number, match, loaded, first)
    return match.length


def check_loaded(disk: DiskCache, number: int, match: DiskMatch, loaded: LoadedPrefix, first: int = 0) -> None:
    compressors = [c for layer in disk.cache.layers for c in layer.compressors()]
    for compressor, entries in zip(compressors, loaded.entries, strict=True):
        n = compressor.entries_per_page
        blocks = range(first, match.num_blocks)
        for row, block in enumerate(blocks):
            assert (entries[row * n : (row + 1) * n] == number * 1000 + block).all()
        if match.state is not None and match.length % PAGE_TOKENS:
            there = match.length % PAGE_TOKENS // compressor.ratio
            tail = entries[len(blocks) * n :]
            assert (tail[:there] == number * 1000 + match.length // PAGE_TOKENS).all() and not tail[there:].any()
    if loaded.snapshot is not None:
        assert loaded.snapshot.length == match.length
        for tensor in loaded.snapshot.fields().values():
            assert (tensor == torch.tensor(number + match.length / 4096)).all()


def bytes_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
