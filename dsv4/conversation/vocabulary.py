"""Vocabulary: the tokens of a served model, as its answers are read."""

from __future__ import annotations

from dataclasses import dataclass

import deepseek_recipe as recipe

from dsv4.engine.llm import LLM
from dsv4.tokenizer import Tokenizer

# A model that writes one of these has begun somebody else's turn: its own is over.
_TURN_TOKENS = (
    recipe.SpecialToken.Bos,
    recipe.SpecialToken.User,
    recipe.SpecialToken.Assistant,
    recipe.SpecialToken.System,
    recipe.SpecialToken.LatestReminder,
)


@dataclass(frozen=True)
class Vocabulary:
    """Two tokenizers of the same tokens, and the tokens that end an answer."""

    tokenizer: Tokenizer
    parser_tokenizer: recipe.Tokenizer  # deepseek-recipe's parser decodes with its own
    size: int
    stop_token_ids: frozenset[int]

    @classmethod
    def of(cls, llm: LLM) -> Vocabulary:
        """The vocabulary of a model. ValueError for one without a tokenizer."""
        if llm.tokenizer is None or llm.path is None:
            raise ValueError(f"{llm.path or 'this model'} has no tokenizer, so it cannot hold a conversation")
        special = llm.tokenizer.special_tokens  # which of the turn tokens a tokenizer has differs
        turn_ids = [special[t.default_str()] for t in _TURN_TOKENS if t.default_str() in special]
        return cls(
            llm.tokenizer,
            recipe.Tokenizer.from_file(str(llm.path / "tokenizer.json")),
            llm.tokenizer.vocab_size,
            frozenset({*llm.config.eos_token_ids, *turn_ids}),
        )

    def is_hidden(self, token_id: int) -> bool:
        """True for a token that is counted and never shown: it ends the turn, or the tokenizer has no text for it."""
        return token_id in self.stop_token_ids or token_id >= self.size
