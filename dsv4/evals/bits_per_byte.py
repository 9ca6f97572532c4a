"""Bits per byte of texts under a model, beside those of `xz -9` on the same bytes."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4.data.nano.entries import texts
from dsv4.evals.ledger import Ledger
from dsv4.evals.likelihood import log_likelihoods
from dsv4.model.transformer import Transformer
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS

XZ_PRESET = 9


@dataclass(frozen=True)
class Compressed:
    """A package: its bytes, and the bits that a model and xz need for them."""

    name: str
    num_bytes: int
    model_bits: float
    xz_bits: float

    @property
    def model(self) -> float:
        """Bits per byte of the model."""
        return self.model_bits / self.num_bytes

    @property
    def xz(self) -> float:
        """Bits per byte of xz."""
        return self.xz_bits / self.num_bytes


def held_out_texts(corpus: Path, limit: int | None = None) -> dict[str, str]:
    """Text of each held-out package of a corpus, its documents one after the other; its first `limit` bytes."""
    found: dict[str, str] = {}
    for path in sorted((corpus / "validation").glob("*/*.jsonl")):
        whole = "\n\n".join(texts(path)).encode()
        found[path.stem] = whole[:limit].decode("utf-8", "ignore")
    if not found:
        raise ValueError(f"{corpus}/validation holds no packages: bits per byte need the corpus of the run")
    return found


def text_bits(model: Transformer, tokenizer: Tokenizer, text: str, context: int) -> float:
    """Bits of `text` in pieces of `context` tokens, each predicted from the piece's beginning on."""
    pieces = _pieces(tokenizer, text, context)
    return -sum(log_likelihoods(model, pieces, [1] * len(pieces))) / math.log(2)


def compress(
    model: Transformer, tokenizer: Tokenizer, name: str, text: str, context: int, ledger: Ledger | None = None
) -> Compressed:
    """Bits of a package's text by the model, in pieces of `context` tokens, and by `xz -9` as a whole."""
    ledger = ledger or Ledger(None)
    data, key = text.encode(), f"bytes {name} {len(text)} {context}"
    bits = ledger.get(key)
    if bits is None:
        bits = ledger.put(key, text_bits(model, tokenizer, text, context))
    return Compressed(name, len(data), bits, 8.0 * len(lzma.compress(data, preset=XZ_PRESET)))


def pooled_bits(found: Sequence[Compressed]) -> Compressed:
    """All packages as one."""
    return Compressed(
        "all",
        sum(part.num_bytes for part in found),
        sum(part.model_bits for part in found),
        sum(part.xz_bits for part in found),
    )


def _pieces(tokenizer: Tokenizer, text: str, context: int) -> list[list[int]]:
    """Ids of the text in pieces of `context`, BOS before each; none of it is left out."""
    ids, bos = tokenizer.encode(text), tokenizer.special_id(BOS)
    return [[bos, *ids[start : start + context - 1]] for start in range(0, len(ids), context - 1)]


def to_lines(found: Sequence[Compressed]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| held-out package | bytes | model | xz -9 |"
    yield "| --- | --- | --- | --- |"
    for part in [*found, pooled_bits(found)]:
        yield f"| {part.name} | {part.num_bytes:,} | {part.model:.3f} | {part.xz:.3f} |"
