"""Sources of API keys: the command line, the environment variable DSV4_API_KEY, a file."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "DSV4_API_KEY"

logger = logging.getLogger("dsv4.server")


def collect_keys(
    given: Sequence[str], file: str | Path | None = None, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Unique keys of all three sources. ValueError names a source that holds no key or an empty one."""
    keys = [check_key(key, "--api-key") for key in given]
    if VARIABLE in environment:
        # A variable that is set but empty is an error: the user wanted a locked server, not an open one.
        keys += [check_key(key, VARIABLE) for key in environment[VARIABLE].split(",")]
    if file is not None:
        keys += read_key_file(file)
    return list(dict.fromkeys(keys))


def read_key_file(path: str | Path) -> list[str]:
    """Keys of a file: one per line, comments after #. Warns if other users can read the file."""
    path = Path(path)
    if os.name == "posix" and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        logger.warning("%s has mode %04o: others can read the API keys in it; chmod 600 %s", path, mode, path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error
    texts = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    keys = [check_key(text, f"{path} line {number}") for number, text in texts if text]
    if not keys:
        raise ValueError(f"{path} holds no API key; allowed: one per line, comments after #")
    return keys


def check_key(key: str, place: str) -> str:
    """The key without surrounding white space. ValueError for an empty key or one that no header can carry."""
    key = key.strip()
    if not key:
        raise ValueError(
            f"an API key is an empty string ({place}); give keys of at least 1 character, or no key at all"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"an API key ({place}) holds white space or characters beyond ASCII, which no header carries")
    return key
