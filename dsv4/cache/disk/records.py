"""Files of records: payloads behind a header with their key and a checksum over all of it."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BLOCK, STATE = b"block", b"state"  # kinds of records
_HEADER = struct.Struct("<8s8sQ32s32s")  # MAGIC, kind, bytes of the payload, key, checksum
_MAGIC = b"dsv4kv1\n"


class DamagedFileError(Exception):
    """A file has not the record that the index says."""


class Record(NamedTuple):
    """One payload with its name."""

    kind: bytes
    key: bytes
    payload: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return _HEADER.size + len(self.payload)


class Place(NamedTuple):
    """Bytes of a record: its file by number, and where it begins there."""

    file: int
    offset: int
    num_bytes: int


def write_records(path: Path, temporary: Path, records: Sequence[Record]) -> list[tuple[int, int]]:
    """Write a file under a temporary name, bring it to the disk, rename it. Returns (offset, bytes) of each record."""
    places: list[tuple[int, int]] = []
    try:
        with temporary.open("xb") as file:
            for record in records:
                places.append((file.tell(), record.num_bytes))
                file.write(_header(record))
                file.write(record.payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return places


def read_record(data: bytes, kind: bytes, key: bytes) -> memoryview:
    """The payload of a record's bytes; DamagedFileError unless it is whole and that of this key."""
    if len(data) < _HEADER.size:
        raise DamagedFileError(f"a record of {len(data)} bytes, at least {_HEADER.size} are needed")
    payload = memoryview(data)[_HEADER.size :]
    magic, *_ = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedFileError("not a record of this program")
    if data[: _HEADER.size] != _header_of(kind, key, payload):
        raise DamagedFileError("the checksum is another, or the record is of another prefix")
    return payload


def _header(record: Record) -> bytes:
    return _header_of(record.kind, record.key, record.payload)


def _header_of(kind: bytes, key: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(_HEADER.pack(_MAGIC, kind, len(payload), key, b""))
    digest.update(payload)
    return _HEADER.pack(_MAGIC, kind, len(payload), key, digest.digest())
