"""tokenizer.json -> the vocabulary of a GGUF file, for tokenizers that match llama.cpp's pre-tokenizer deepseek-v3."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.shards import read_json
from dsv4.config import ModelConfig
from dsv4.notices import warn_once

_PRE_TOKENIZER = "deepseek-v3"
_DIGITS = (r"\p{N}{1,3}", r"\p{N}")
_SPLITS = (
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_ADDED_FLAGS = ("lstrip", "rstrip", "single_word")
# All GGUF keys of tokens at which llama.cpp ends a text.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of llama.cpp


def vocabulary(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """`tokenizer.ggml.*` keys of a model folder; without tokenizer.json a vocabulary of token ids only."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {"tokenizer.ggml.model": "no_vocab"}
    content = read_json(file)
    merges = _check(file, content)
    tokens = [f"[unused {token}]" for token in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    model: dict[str, int] = content["model"]["vocab"]
    entries = [(token, text, _NORMAL) for text, token in model.items()]
    for added in content.get("added_tokens", []):
        entries.append((added["id"], added["content"], _CONTROL if added["special"] else _USER_DEFINED))
    for token, text, kind in entries:
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(file, f"token numbers from 0 to {config.vocab_size - 1}", f"{token} of {text!r}")
        tokens[token], types[token] = text, kind
    settings = folder / "tokenizer_config.json"
    flags = read_json(settings) if settings.is_file() else {}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _PRE_TOKENIZER,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        **_end_tokens(file, config),
        "tokenizer.ggml.add_bos_token": bool(flags.get("add_bos_token", False)),
        "tokenizer.ggml.add_eos_token": bool(flags.get("add_eos_token", False)),
    }


def _end_tokens(file: Path, config: ModelConfig) -> dict[str, int]:
    ids = dict.fromkeys(config.eos_token_ids)
    if len(ids) > len(_END_KEYS):
        warn_once(f"{file.parent}: GGUF holds {len(_END_KEYS)} end tokens; without {list(ids)[len(_END_KEYS) :]}")
    return {f"tokenizer.ggml.{key}": token for key, token in zip(_END_KEYS, ids, strict=False)}


def _check(file: Path, content: dict[str, Any]) -> list[list[str]]:
    """Merges of a tokenizer that splits and merges like llama.cpp's deepseek-v3; CheckpointError on any other."""
    model: dict[str, Any] = content.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(file, "model.type = 'BPE', as GGUF requires", repr(model.get("type")))
    _expect(file, "model.", model, dict.fromkeys(("ignore_merges", "byte_fallback"), False))
    _expect(file, "model.", model, dict.fromkeys(("unk_token", "dropout", *_AFFIXES)))
    if not _changes_nothing(content.get("normalizer")):
        raise CheckpointError(file, "no normalizer, as GGUF requires", repr(content["normalizer"]))
    for added in content.get("added_tokens", []):
        _expect(file, f"added token {added['content']!r}: ", added, dict.fromkeys(_ADDED_FLAGS, False))
    splitter: dict[str, Any] = content.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = splitter.get("pretokenizers", [])
    for step in steps:
        _expect(file, "pre_tokenizer.", step, {"add_prefix_space": False, "use_regex": False, "invert": False})
        _expect(file, "pre_tokenizer.", step, {"behavior": "Isolated"})
    patterns = [_pattern(step) for step in steps]
    if patterns[:1] not in ([[digits] for digits in _DIGITS]) or patterns[1:] != [*_SPLITS, "ByteLevel"]:
        expected = f"DeepSeek's pre-tokenizer, which llama.cpp calls {_PRE_TOKENIZER}"
        raise CheckpointError(file, expected, f"splits {patterns}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    if patterns[0] == r"\p{N}":
        # deepseek-v3 puts up to three digits into one piece: the tokens are the same unless a merge joins two digits.
        for left, right in merges:
            if _joins_digits(_text_bytes(left + right)):
                expected = f"no merge across digits, since llama.cpp's {_PRE_TOKENIZER} keeps three together"
                raise CheckpointError(file, expected, repr([left, right]))
    return merges


def _expect(file: Path, place: str, table: dict[str, Any], allowed: dict[str, Any]) -> None:
    for key, value in allowed.items():
        # An empty affix counts as absent.
        if key in table and (table[key] or value) != value:
            raise CheckpointError(file, f"{place}{key} = {value!r}, as GGUF requires", repr(table[key]))


def _changes_nothing(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    return normalizer.get("type") == "Sequence" and all(map(_changes_nothing, normalizer.get("normalizers", [])))


def _pattern(step: dict[str, Any]) -> str | None:
    """Regular expression of a split, with CR and LF as escapes; for any other step, its type."""
    if "pattern" not in step:
        return step.get("type")
    expression: str | None = step["pattern"].get("Regex")
    return None if expression is None else expression.replace("\r", r"\r").replace("\n", r"\n")


@cache
def _byte_of_char() -> dict[str, int]:
    """Byte-level alphabet: printable bytes map to themselves, the others to U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _text_bytes(piece: str) -> bytes:
    return bytes(_byte_of_char()[char] for char in piece)


@cache
def _digits() -> list[bytes]:
    """UTF-8 of every character that \\p{N} matches."""
    return [chr(code).encode() for code in range(0x110000) if unicodedata.category(chr(code))[0] == "N"]


def _joins_digits(piece: bytes) -> bool:
    """True if these bytes can occur in a run of digits across the border of two digits."""
    cuts = [i for i in range(1, len(piece)) if piece[i] & 0xC0 != 0x80]
    parts = [piece[start:end] for start, end in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
    return bool(cuts) and all(_is_digit_part(part, i == 0, i == len(cuts)) for i, part in enumerate(parts))


def _is_digit_part(part: bytes, first: bool, last: bool) -> bool:
    def fits(digit: bytes) -> bool:
        return digit == part or (first and digit.endswith(part)) or (last and digit.startswith(part))

    candidates: Iterator[bytes] = (digit for digit in _digits() if fits(digit))
    return next(candidates, None) is not None
