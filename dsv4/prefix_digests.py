"""Digests of prefixes in whole blocks: two machines compare what they hold without its tokens.

The digest of a block stands for the block and all before it, and for the salt. 8 bytes: two prefixes of one digest are
taken for one only by whoever chooses a machine by them, which costs time and no more.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from dsv4.config import PAGE_TOKENS

DIGEST_BYTES = 8


def root_digest(salt: str | None) -> bytes:
    """Digest before the first block of a prompt."""
    return b"" if salt is None else _digest(b"salt:" + salt.encode())


def next_digest(before: bytes, tokens: bytes) -> bytes:
    """Digest of a block after the block of another digest. `tokens`: the block's, as 32-bit numbers."""
    return _digest(before + tokens)


def block_digests(token_ids: Sequence[int], salt: str | None) -> list[bytes]:
    """Digests of a prompt's whole blocks, the first block's first. Token ids outside 32 bits have none."""
    digests: list[bytes] = []
    digest = root_digest(salt)
    for end in range(PAGE_TOKENS, len(token_ids) + 1, PAGE_TOKENS):
        try:
            block = array("i", token_ids[end - PAGE_TOKENS : end])
        except (OverflowError, TypeError):  # the engine refuses such a prompt
            break
        digest = next_digest(digest, block.tobytes())
        digests.append(digest)
    return digests


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
