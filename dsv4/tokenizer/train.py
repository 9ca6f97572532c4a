"""Trains a byte-level BPE with V4's special tokens and pre-tokenizer, each digit a token of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dsv4.tokenizer.special import BOS, EOS, PAD, SPECIAL_TOKENS, placeholder

NANO_VOCAB_SIZE = 8192
# V4's three splits, with one change: one digit per token instead of up to three.
DIGITS = r"\p{N}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def train_tokenizer(corpus: Iterator[str], vocab_size: int = NANO_VOCAB_SIZE) -> tokenizers.Tokenizer:
    """Train on plain texts; the result has exactly `vocab_size` ids, with placeholders where the corpus is too small.

    Special tokens take the first ids. ValueError for a vocabulary smaller than the 256 bytes and the special tokens.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size}: at least {least}, the bytes and the special tokens")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (DIGITS, CJK, WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[_added(text) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    missing = vocab_size - tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.add_tokens([_added(placeholder(n)) for n in range(missing)])
    # The trainer marks all of its special tokens as special. In the official file only BOS, EOS and pad are; the others
    # survive skip_special_tokens.
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD)
    return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


def _added(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=True)


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the latter with the official settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "legacy": True,
        "model_max_length": 1048576,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
