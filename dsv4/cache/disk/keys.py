"""Keys of prefixes: sha256 over the model's identity, the salt, and the blocks of tokens from the first one on."""

from __future__ import annotations

import hashlib
from array import array

from dsv4.cache.prefix import TokensOf
from dsv4.config import PAGE_TOKENS

FORMAT_VERSION = 1  # of keys, records and packed pages: others are never found
TOKEN_BYTES = array("i").itemsize
WITH_MTP = b"\1"  # after the tail in the name of a state that has the MTP block's


def root_key(identity: bytes, salt: str | None) -> bytes:
    """Key of the empty prefix, from which those of a model and salt follow; `identity` covers all that changes bits."""
    digest = hashlib.sha256(b"dsv4 prefix %d\0" % FORMAT_VERSION)
    digest.update(hashlib.sha256(identity).digest())
    digest.update(b"\0" if salt is None else b"\1" + salt.encode("utf-8", "surrogatepass"))
    return digest.digest()


class PrefixKeys:
    """Keys of the whole blocks of one sequence, each hashed once. `tokens`: of a sequence that only grows."""

    def __init__(self, root: bytes, tokens: TokensOf) -> None:
        self.tokens = tokens
        self._keys = [root]

    def blocks(self, count: int) -> list[bytes]:
        """Keys of the whole blocks of the first `count` tokens; each covers all blocks before it."""
        depth = count // PAGE_TOKENS
        while len(self._keys) <= depth:
            start = (len(self._keys) - 1) * PAGE_TOKENS
            self._keys.append(
                hashlib.sha256(self._keys[-1] + token_bytes(self.tokens, start, start + PAGE_TOKENS)).digest()
            )
        return self._keys[1 : depth + 1]

    def at(self, depth: int) -> bytes:
        """Key of the first `depth` blocks together; 0: the root."""
        self.blocks(depth * PAGE_TOKENS)
        return self._keys[depth]

    def tail(self, count: int) -> bytes:
        """Tokens of the first `count` that come after their whole blocks."""
        return token_bytes(self.tokens, count - count % PAGE_TOKENS, count)

    def tails(self, depth: int, count: int) -> list[bytes]:
        """Tails of all prefixes of the first `count` tokens that have `depth` whole blocks, as states are named."""
        start = depth * PAGE_TOKENS
        rest = token_bytes(self.tokens, start, min(count, start + PAGE_TOKENS - 1))
        return [rest[:end] + mtp for end in range(0, len(rest) + 1, TOKEN_BYTES) for mtp in (b"", WITH_MTP)]


def state_key(block: bytes, tail: bytes) -> bytes:
    """Key of the state after a prefix: that of its whole blocks and the tokens after them."""
    return hashlib.sha256(b"state" + block + tail).digest()


def serving_tails(tail: bytes) -> list[bytes]:
    """Names of the states that serve as the one named `tail`: itself, and the one that has the MTP block's as well."""
    return [tail] if len(tail) % TOKEN_BYTES else [tail, tail + WITH_MTP]


def token_bytes(tokens: TokensOf, start: int, stop: int) -> bytes:
    return array("i", tokens(start, stop)).tobytes()
