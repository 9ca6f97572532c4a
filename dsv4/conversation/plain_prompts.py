"""Plain prompts: text or token ids that the model continues, without a conversation, and text between two others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import FIM


class PromptTooLongError(ValueError):
    """The prompt exceeds the context. `num_tokens`: of the prompt, or a lower bound if it was not tokenized."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the prompt has at least {num_tokens} tokens")
        self.num_tokens = num_tokens


@dataclass(frozen=True)
class PlainPrompts:
    """Encodes plain prompts for one model."""

    tokenizer: Tokenizer
    bos_token_id: int
    max_model_len: int

    @property
    def fills_in(self) -> bool:
        """True if the tokenizer has the marks of a text with a hole."""
        return all(mark in self.tokenizer.special_tokens for mark in FIM)

    def encode(self, prompt: str | Sequence[int], suffix: str | None = None, begin: bool = True) -> list[int]:
        """Token ids of a prompt: text after a begin-of-sentence token, if `begin`, ids as they are.

        With a suffix the model writes what stands between both: the order is begin, prompt, hole, suffix, end.
        Spellings of special tokens in the texts stay text. PromptTooLongError; ValueError for a lone surrogate.
        """
        if not isinstance(prompt, str):
            if len(prompt) > self.max_model_len:
                raise PromptTooLongError(len(prompt))
            return list(prompt)
        texts = [prompt] if suffix is None else [prompt, suffix]
        least = sum(self.tokenizer.min_tokens(text) for text in texts)
        if least > self.max_model_len:
            raise PromptTooLongError(least)
        first = [self.bos_token_id] if begin else []
        if suffix is None:
            return self._checked([*first, *self.tokenizer.encode(prompt)])
        hole, start, end = (self.tokenizer.special_id(mark) for mark in FIM)
        before, after = self.tokenizer.encode_batch(texts)
        return self._checked([*first, start, *before, hole, *after, end])

    def _checked(self, token_ids: list[int]) -> list[int]:
        if len(token_ids) > self.max_model_len:
            raise PromptTooLongError(len(token_ids))
        return token_ids
