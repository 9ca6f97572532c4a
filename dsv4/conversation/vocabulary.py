"""Vocabulary: tokenizers and stop tokens of a served model."""

from __future__ import annotations

from dataclasses import dataclass

import deepseek_recipe as recipe

from dsv4.conversation.tool_tags import Marks
from dsv4.engine.interface import TextModel
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import DSML, END_THINK

# A model that writes one of these has begun another role's turn: its own is over.
_TURN_TOKENS = (
    recipe.SpecialToken.Bos,
    recipe.SpecialToken.User,
    recipe.SpecialToken.Assistant,
    recipe.SpecialToken.System,
    recipe.SpecialToken.LatestReminder,
)


@dataclass(frozen=True)
class Vocabulary:
    """Two tokenizers of one vocabulary, and the tokens that end an answer."""

    tokenizer: Tokenizer
    parser_tokenizer: recipe.Tokenizer  # deepseek-recipe's parser decodes with its own class
    size: int  # ids that the tokenizer knows
    num_ids: int  # ids of the model, maybe more
    stop_token_ids: frozenset[int]
    marks: Marks  # of tool calls and of reasoning

    @classmethod
    def of(cls, llm: TextModel) -> Vocabulary:
        """Vocabulary of a model. ValueError for a model without a tokenizer."""
        if llm.tokenizer is None or llm.path is None:
            raise ValueError(f"{llm.path or 'this model'} has no tokenizer, so it cannot hold a conversation")
        special = llm.tokenizer.special_tokens  # a tokenizer may lack some of the turn tokens
        turn_ids = [special[t.default_str()] for t in _TURN_TOKENS if t.default_str() in special]
        return cls(
            llm.tokenizer,
            recipe.Tokenizer.from_file(str(llm.path / "tokenizer.json")),
            llm.tokenizer.vocab_size,
            llm.config.vocab_size,
            frozenset({*llm.config.eos_token_ids, *turn_ids}),
            Marks(special.get(DSML), special.get(END_THINK)),
        )

    def is_hidden(self, token_id: int) -> bool:
        """True for a token that is counted but never shown: it ends the turn, or the tokenizer has no text for it."""
        return token_id in self.stop_token_ids or token_id >= self.size
