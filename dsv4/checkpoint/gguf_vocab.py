"""tokenizer.json -> the vocabulary of a GGUF file, for tokenizers that llama.cpp's pre-tokenizer deepseek-v3 fits."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.shards import read_json
from dsv4.config import ModelConfig

_PRE_TOKENIZER = "deepseek-v3"
_DIGITS = (r"\p{N}{1,3}", r"\p{N}")
_SPLITS = (
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of llama.cpp


def vocabulary(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """`tokenizer.ggml.*` keys of a model folder; without tokenizer.json a vocabulary of numbers alone."""
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
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.add_bos_token": bool(flags.get("add_bos_token", False)),
        "tokenizer.ggml.add_eos_token": bool(flags.get("add_eos_token", False)),
    }


def _check(file: Path, content: dict[str, Any]) -> list[list[str]]:
    """The merges of a tokenizer that llama.cpp's deepseek-v3 splits and merges alike; CheckpointError on any other."""
    model: dict[str, Any] = content.get("model") or {}
    for key, allowed in (("type", "BPE"), ("ignore_merges", False), ("byte_fallback", False), ("unk_token", None)):
        if model.get(key, None if key == "type" else allowed) != allowed:
            raise CheckpointError(file, f"model.{key} = {allowed!r}, as GGUF is written", repr(model.get(key)))
    if content.get("normalizer") is not None:
        raise CheckpointError(file, "no normalizer, as GGUF is written", repr(content["normalizer"]))
    splitter: dict[str, Any] = content.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = splitter.get("pretokenizers", [])
    patterns: list[Any] = [step["pattern"].get("Regex") if "pattern" in step else step.get("type") for step in steps]
    if patterns[:1] not in ([[digits] for digits in _DIGITS]) or patterns[1:] != [*_SPLITS, "ByteLevel"]:
        expected = f"DeepSeek's pre-tokenizer, which llama.cpp calls {_PRE_TOKENIZER}"
        raise CheckpointError(file, expected, f"splits {patterns}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    if patterns[0] == r"\p{N}":
        # deepseek-v3 puts up to three digits into one piece: the same tokens unless a merge joins two of them.
        for left, right in merges:
            if _joins_digits(_text_bytes(left + right)):
                expected = f"no merge across digits, since llama.cpp's {_PRE_TOKENIZER} keeps three together"
                raise CheckpointError(file, expected, repr([left, right]))
    return merges


@cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable bytes are themselves, the others follow from U+0100 on."""
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
    """Could these bytes stand in a run of digits, across the border of two?"""
    cuts = [i for i in range(1, len(piece)) if piece[i] & 0xC0 != 0x80]
    parts = [piece[start:end] for start, end in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
    return bool(cuts) and all(_is_digit_part(part, i == 0, i == len(cuts)) for i, part in enumerate(parts))


def _is_digit_part(part: bytes, first: bool, last: bool) -> bool:
    def fits(digit: bytes) -> bool:
        return digit == part or (first and digit.endswith(part)) or (last and digit.startswith(part))

    candidates: Iterator[bytes] = (digit for digit in _digits() if fits(digit))
    return next(candidates, None) is not None
