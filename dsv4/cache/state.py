"""Snapshot of the state of one sequence: named fields, to and from bytes. Its entries stay in their pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dsv4.cache.tensors import CompressorState, LayerCache

FORMAT = "dsv4 cache state"
VERSION = 1
MTP_STREAMS = "mtp.streams"


@dataclass(frozen=True)
class CompressorSnapshot:
    """Rows of one compressor that later entries may need: kv, score fp32 [tokens kept, channels]."""

    kv: Tensor
    score: Tensor


@dataclass(frozen=True)
class LayerSnapshot:
    """One layer: window [WINDOW, head_dim], and the compressors that the layer has."""

    window: Tensor
    main: CompressorSnapshot | None = None
    index: CompressorSnapshot | None = None

    def fields(self) -> Iterator[tuple[str, Tensor]]:
        yield "window", self.window
        for name, compressor in (("main", self.main), ("index", self.index)):
            if compressor is not None:
                yield f"{name}.kv", compressor.kv
                yield f"{name}.score", compressor.score


@dataclass(frozen=True)
class Snapshot:
    """State of one sequence after `length` tokens.

    `mtp_streams` [hc_mult, d]: the main model's streams of the last token, which the MTP block reads next; None where
    the block has not read the tokens before it, so that its window is not theirs.
    """

    length: int
    layers: tuple[LayerSnapshot, ...]
    mtp_streams: Tensor | None = None

    def fields(self) -> dict[str, Tensor]:
        """Tensors by name: layers.3.window, layers.3.main.kv, layers.3.index.score and so on; mtp.streams."""
        fields = {f"layers.{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.fields()}
        return fields if self.mtp_streams is None else fields | {MTP_STREAMS: self.mtp_streams}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.fields().values())

    def to_bytes(self) -> bytes:
        """A safetensors file of the fields, whose metadata has one entry: FORMAT -> version and length, JSON."""
        metadata = {FORMAT: json.dumps({"version": VERSION, "length": self.length})}  # of several the order would vary
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.fields().items()}
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """The snapshot whose `to_bytes` gave data, on the CPU.

        ValueError for data of another format or version, and for data that is cut or has other fields. Whether shapes
        and dtypes are a cache's is checked when the snapshot is restored there.
        """
        length = _length(data)
        try:
            fields = safetensors.torch.load(data)
        except SafetensorError as error:
            raise ValueError(f"cache state of {len(data)} bytes is cut or damaged: {error}") from error
        mtp_streams = fields.pop(MTP_STREAMS, None)
        layers: list[LayerSnapshot] = []
        while f"layers.{len(layers)}.window" in fields:
            layers.append(_pop_layer(fields, f"layers.{len(layers)}."))
        if fields or not layers:
            raise ValueError(f"cache state has wrong fields: {', '.join(fields) or 'none'}")
        return cls(length, tuple(layers), mtp_streams)


@dataclass(frozen=True)
class SavedRow:
    """All that a cache row held: its state, and the entries of its pages [rows, width] of each compressor."""

    snapshot: Snapshot
    entries: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.snapshot.num_bytes + sum(entries.nbytes for entries in self.entries)


def layer_views(layer: LayerCache, slot: int) -> LayerSnapshot:
    """The state of a slot as it lies in a layer's tensors."""

    def rows(compressor: CompressorState | None) -> CompressorSnapshot | None:
        return None if compressor is None else CompressorSnapshot(compressor.kv[slot], compressor.score[slot])

    return LayerSnapshot(layer.window[slot], rows(layer.main), rows(layer.index))


def clone(layer: LayerSnapshot) -> LayerSnapshot:
    """A copy of a layer's tensors."""

    def rows(compressor: CompressorSnapshot | None) -> CompressorSnapshot | None:
        return None if compressor is None else CompressorSnapshot(compressor.kv.clone(), compressor.score.clone())

    return LayerSnapshot(layer.window.clone(), rows(layer.main), rows(layer.index))


def check_same_kind(snapshot: Snapshot, place: Snapshot) -> None:
    """ValueError unless two snapshots have the same fields, of the same shapes and dtypes."""
    given, wanted = snapshot.fields(), place.fields()
    for name in given | wanted:
        found, expected = _kind(given.get(name)), _kind(wanted.get(name))
        if found != expected:
            raise ValueError(f"snapshot of another model: {name} is {found}, in this cache {expected}")


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"


def _length(data: bytes) -> int:
    """Length that the header of a snapshot names; ValueError if data is none, or of another version."""
    about = _about(data)
    if about is None:
        raise ValueError(f"not a {FORMAT}, or one that is cut in its header")
    version, length = about.get("version"), about.get("length")
    if version != VERSION:
        raise ValueError(f"{FORMAT} of version {version}; this program reads version {VERSION}")
    if type(length) is not int or length < 0:
        raise ValueError(f"{FORMAT} of length {length!r}; allowed are whole numbers from 0 on")
    return length


def _about(data: bytes) -> dict[str, Any] | None:
    """The metadata's entry FORMAT of a safetensors file, None if there is none."""
    size = int.from_bytes(data[:8], "little")
    try:
        about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][FORMAT])
    except (ValueError, KeyError, TypeError):
        return None
    return about if isinstance(about, dict) else None


def _pop_layer(fields: dict[str, Tensor], prefix: str) -> LayerSnapshot:
    def rows(name: str) -> CompressorSnapshot | None:
        kv, score = fields.pop(f"{prefix}{name}.kv", None), fields.pop(f"{prefix}{name}.score", None)
        if kv is None and score is None:
            return None
        if kv is None or score is None:
            raise ValueError(f"cache state has wrong fields: {prefix}{name} lacks {'kv' if kv is None else 'score'}")
        return CompressorSnapshot(kv, score)

    return LayerSnapshot(fields.pop(f"{prefix}window"), rows("main"), rows("index"))
