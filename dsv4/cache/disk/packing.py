"""Pages of a cache as bytes, and back: the entries of all compressors in their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.cache.cache import Cache
from dsv4.cache.tensors import CompressorState


def page_layout(cache: Cache) -> list[str]:
    """Contents of a page in words: ratio, dtype and width of each compressor's entries."""
    empty = [(c.ratio, c.read_pages([])) for c in _compressors(cache)]
    return [f"{ratio}: {entries.dtype} {list(entries.shape[1:])}" for ratio, entries in empty]


def pack_pages(cache: Cache, pages: Sequence[int]) -> Tensor:
    """Bytes of pages, uint8 [n, bytes per page] on the CPU, a copy."""
    parts = [_as_bytes(c.read_pages(pages)).reshape(len(pages), -1) for c in _compressors(cache)]
    return torch.cat(parts, dim=1) if parts else torch.empty(len(pages), 0, dtype=torch.uint8)


def pack_tail(cache: Cache, page: int, tokens: int) -> Tensor:
    """As `pack_pages`, uint8 [bytes per page], of a page that holds `tokens` tokens: zeros where no entry is yet."""
    parts: list[Tensor] = []
    for compressor in _compressors(cache):
        entries = compressor.read_pages([page])
        entries[tokens // compressor.ratio :] = 0  # what a former sequence has left there
        parts.append(_as_bytes(entries).reshape(-1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def unpack_pages(cache: Cache, data: Tensor) -> tuple[Tensor, ...]:
    """Entries of each compressor [n * entries per page, width], of what `pack_pages` gave."""
    entries: list[Tensor] = []
    first = 0
    for compressor in _compressors(cache):
        like, size = compressor.read_pages([]), compressor.page_bytes
        part = data[:, first : first + size].contiguous().reshape(-1).view(like.dtype)
        entries.append(part.reshape(-1, *like.shape[1:]).to(like.device))
        first += size
    return tuple(entries)


def _compressors(cache: Cache) -> list[CompressorState]:
    return [compressor for layer in cache.layers for compressor in layer.compressors()]


def _as_bytes(entries: Tensor) -> Tensor:
    return entries.detach().cpu().contiguous().view(torch.uint8)
