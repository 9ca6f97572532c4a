"""Limits of the parser end an output at the same place whatever was drafted."""

from __future__ import annotations

import pytest
from llguidance import LLParserLimits

from dsv4.engine import LLM, SamplingParams, grammar
from dsv4.engine.constraint import Constraint
from dsv4.engine.grammar import GrammarCompiler


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_model_len=512)


def end_of(constraint: Constraint, tokens: list[int], right: int, wrong: int) -> tuple[int, str | None]:
    """(tokens that a constraint follows, its error), with `right` drafts that stand before one that does not."""
    done = 0
    while done < len(tokens):
        drafts = [*tokens[done : done + right], wrong] if right else []
        masks = constraint.masks(drafts)
        for token in tokens[done : done + right + 1]:
            assert masks.pop(0) is not None
            constraint.advance(token)
            if constraint.error is not None:
                return done, constraint.error
            done += 1
    return done, None


def test_a_limit_of_states_does_not_depend_on_drafts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the lexer grow with each mask until a limit ends the output: at the same place with drafts."""
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(max_lexer_states=80))
    params = SamplingParams(regex=r"(a|b)*a(a|b){9}c")
    assert llm.tokenizer is not None
    tokenizer = llm.tokenizer
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    tokens = [a if place * place % 7 < 3 else b for place in range(200)]

    def end(right: int) -> tuple[int, str | None]:
        compiler = GrammarCompiler(tokenizer, llm.config.vocab_size, llm.config.eos_token_ids)
        return end_of(compiler.compile(params), tokens, right, c)

    done, error = end(0)
    assert error is not None and 5 < done < 190
    assert [end(right) for right in (1, 2, 5)] == [(done, error)] * 3
