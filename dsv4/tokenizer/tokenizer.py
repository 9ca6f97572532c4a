"""Text to token ids and back for a model folder; special tokens come from marked ranges only, never from text."""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsv4.config import settings_folder
from dsv4.text import check_text
from dsv4.tokenizer.length_bound import LengthBound, keeps_every_byte
from dsv4.tokenizer.special import EOS


class TokenizerMissingError(FileNotFoundError):
    """The model folder has no tokenizer; everything that needs only token ids still works."""


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet: character -> byte; bytes not printable in Latin-1 map to characters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class DecodeStream:
    """Decode ids one at a time; a character is returned with its last byte.

    Bytes that are not UTF-8 become U+FFFD; all pushes and the flush together equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now certain, which may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the text: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A `tokenizer.json` with byte-level BPE.

    `encode` never returns a special token's id; `encode_rendered` returns them for the given ranges only.
    """

    def __init__(self, definition: str) -> None:
        data: dict[str, Any] = json.loads(definition)
        self._added: dict[str, int] = {token["content"]: token["id"] for token in data["added_tokens"]}
        full = tokenizers.Tokenizer.from_str(definition)
        # The same model without its added tokens: no spelling in plain text can match one. transformers saves the
        # truncation and padding of its last call in the file.
        plain = data | {"added_tokens": [], "truncation": None, "padding": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = {
            token_id: bytes(alphabet[c] for c in text)
            for text, token_id in self._plain.get_vocab().items()
            if text not in self._added
        }
        # With ignore_merges, an added token that is also in the vocabulary may match plain text.
        written = [text.encode() for text in self._added] if data["model"].get("ignore_merges") else []
        self._bound = LengthBound([*self._bytes.values(), *written] if keeps_every_byte(data) else [])
        self._bytes |= {token_id: text.encode() for text, token_id in self._added.items()}
        self.vocab_size: int = full.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int = self.special_id(EOS)

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None) -> "Tokenizer":
        """Load `tokenizer.json` of a model folder, "nano", or owner/name, of which no weights are fetched.

        TokenizerMissingError where there is none, ValueError for a damaged one.
        """
        path = settings_folder(folder, revision) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerMissingError(
                f"{folder}: no tokenizer.json, so text cannot be encoded or decoded here; token ids still work"
            )
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"{path}: not a byte-level BPE tokenizer with an end-of-sentence token: {type(error).__name__}: {error}"
            ) from error

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of every added token."""
        return dict(self._added)

    def spells_as(self, other: "Tokenizer") -> bool:
        """True if every token id stands for the same bytes in both, and the same ids are special tokens."""
        return self._bytes == other._bytes and self._added == other._added

    def special_id(self, spelling: str) -> int:
        """Return the id of a special token; KeyError names an unknown spelling."""
        if spelling not in self._added:
            raise KeyError(f"{spelling!r} is not a special token of this tokenizer")
        return self._added[spelling]

    def encode(self, text: str) -> list[int]:
        """Encode plain text; spellings of special tokens stay text. Other Python threads run meanwhile.

        ValueError for half a surrogate pair.
        """
        check_text(text)
        return self._encodings([text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode plain texts; faster than one by one. ValueError names the text that holds half a surrogate pair."""
        for place, text in enumerate(texts):
            check_text(text, f"text {place}")
        return [encoding.ids for encoding in self._encodings(list(texts))]

    def encode_rendered(self, prompt: str, special_ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Encode a rendered prompt: each range (start, end) of `prompt` is one special token, all else plain text."""
        check_text(prompt, "the prompt")
        ids: list[int] = []
        pieces, specials = self._split(prompt, special_ranges)
        for encoding, special in zip(self._encodings(pieces), (*specials, None), strict=True):
            ids += encoding.ids
            if special is not None:
                ids.append(special)
        return ids

    def count_rendered(self, prompt: str, special_ranges: Iterable[tuple[int, int]]) -> int:
        """Count the tokens of `encode_rendered` without building the list."""
        pieces, specials = self._split(prompt, special_ranges)
        return len(specials) + sum(len(encoding) for encoding in self._encodings(pieces))

    def min_tokens(self, text: str) -> int:
        """Lower bound on the tokens of plain text, from its bytes; 0 if this tokenizer allows no bound."""
        return self._bound.tokens(text)

    def min_tokens_rendered(self, prompt: str, special_ranges: Iterable[tuple[int, int]]) -> int:
        """Lower bound on the tokens of `encode_rendered`."""
        pieces, specials = self._split(prompt, special_ranges)
        return len(specials) + self.min_tokens("".join(pieces))

    def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
        # `tokenizers` holds the GIL during a single `encode`; a batch releases it.
        return self._plain.encode_batch_fast(texts, add_special_tokens=False)

    def _split(self, prompt: str, special_ranges: Iterable[tuple[int, int]]) -> tuple[list[str], list[int]]:
        """Plain pieces of a rendered prompt (maybe empty), and the special ids between them."""
        pieces: list[str] = []
        specials: list[int] = []
        end = 0
        for start, stop in special_ranges:
            if not end <= start < stop <= len(prompt):
                raise ValueError(
                    f"special range ({start}, {stop}): ascending ranges in {end} to {len(prompt)} are allowed"
                )
            pieces.append(prompt[end:start])
            specials.append(self.special_id(prompt[start:stop]))
            end = stop
        pieces.append(prompt[end:])
        return pieces, specials

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; a special token gives its spelling."""
        if token_id not in self._bytes:
            raise ValueError(f"token id {token_id}: ids 0 to {self.vocab_size - 1} are allowed")
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text, special tokens to their spellings; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(token_id) for token_id in ids).decode("utf-8", errors="replace")

    def decode_stream(self) -> DecodeStream:
        """Start decoding ids one at a time."""
        return DecodeStream(self)
