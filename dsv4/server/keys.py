"""Sources of API keys: the command line, the environment variable DSV4_API_KEY, a file."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv4.server.key_limits import KeyLimits

VARIABLE = "DSV4_API_KEY"

LIMIT_NAMES = ("max_requests", "tokens_per_minute")

logger = logging.getLogger("dsv4.server")


class ApiKey(str):
    """A key that has limits of its own. Its repr, which may end up in a log, does not show it."""

    limits: KeyLimits

    @classmethod
    def limited(cls, key: str, limits: KeyLimits) -> ApiKey:
        limited = cls(key)
        limited.limits = limits
        return limited

    def __repr__(self) -> str:
        return f"ApiKey({masked(self)!r})"


def masked(key: str) -> str:
    """A key for logs and errors: its last four characters, none of a short one."""
    return f"****{key[-4:]}" if len(key) >= 12 else "****"


def collect_keys(
    given: Sequence[str], file: str | Path | None = None, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Unique keys of all three sources; one that has limits in the file keeps them, wherever else it stands.

    ValueError names a source that holds no key or an empty one.
    """
    keys = [check_key(key, "--api-key") for key in given]
    if VARIABLE in environment:
        # A variable that is set but empty is an error: the user wanted a locked server, not an open one.
        keys += [check_key(key, VARIABLE) for key in environment[VARIABLE].split(",")]
    if file is not None:
        keys += read_key_file(file)
    limited = {str(key): key for key in keys if isinstance(key, ApiKey)}
    return [limited.get(key, key) for key in dict.fromkeys(keys)]


def read_key_file(path: str | Path) -> list[str]:
    """Keys of a file: one per line, maybe with limits of its own (an ApiKey), comments after #.

    Warns if other users can read the file.
    """
    path = Path(path)
    try:
        if os.name == "posix" and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            logger.warning("%s has mode %04o: others can read the API keys in it; chmod 600 %s", path, mode, path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--api-key-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error
    texts = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    keys: list[str] = []
    for number, text in texts:
        key = _key_of_line(text, f"{path} line {number}") if text else None
        if key is not None and key in keys and isinstance(key, ApiKey):
            raise ValueError(f"{path} line {number} has limits of an API key that stands in an earlier line too")
        keys += [] if key is None else [key]
    if not keys:
        raise ValueError(f"{path} holds no API key; allowed: one per line, comments after #")
    return keys


def _key_of_line(text: str, place: str) -> str:
    """The key of a line `KEY [max_requests=N] [tokens_per_minute=N]`. ValueError for other words."""
    first, *words = text.split()
    if not words:
        return check_key(first, place)
    if any("=" not in word for word in words):
        return check_key(text, place)  # refused: white space in a key
    limits: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in LIMIT_NAMES or not value.isdecimal() or name in limits:
            allowed = ", ".join(f"{known}=N" for known in LIMIT_NAMES)
            raise ValueError(f"{place} has {word!r} beside its API key; allowed: {allowed}, each once")
        limits[name] = int(value)
    try:
        return ApiKey.limited(check_key(first, place), KeyLimits(**limits))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def check_key(key: str, place: str) -> str:
    """The key without surrounding white space. ValueError for an empty key or one that no header can carry."""
    if isinstance(key, ApiKey):
        return key  # checked when it was read
    key = key.strip()
    if not key:
        raise ValueError(
            f"an API key is an empty string ({place}); give keys of at least 1 character, or no key at all"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"an API key ({place}) holds white space or characters beyond ASCII, which no header carries")
    return key
