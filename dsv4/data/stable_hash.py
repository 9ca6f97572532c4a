"""Seeds from names and numbers, the same in every process."""

import hashlib


def stable_hash(*parts: object) -> int:
    """Hash the parts to 64 bits, the same in every process (Python's own hash is salted)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
