"""Constrained decoding: a JSON schema, a regex, choices or a grammar becomes a mask of allowed tokens for each step.

llguidance parses the constraint and follows the output (constraint.py), byte by byte, so that a character may be split
over tokens in any way the vocabulary allows. Every tokenization of an allowed text is allowed: among them the model's
own probabilities choose, and a constraint that forbids nothing changes nothing.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from dsv4.engine.constraint import Constraint
from dsv4.engine.errors import GrammarError
from dsv4.engine.lark import ALL_TOKENIZATIONS, check_names_no_token, escape, json_rule, reason_of, regex_terminal
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.tool_grammar import ToolGrammar
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import DSML
from dsv4.tools import Tool

MAX_GRAMMAR_BYTES = 1 << 20
KEPT_GRAMMARS = 16  # compiled ones that stay for the next request

# What a grammar may cost to compile (fuel, size) and for one mask (items of the parser, states of the lexer, each about
# 2 kB): the steps of other requests wait meanwhile.
LIMITS = LLParserLimits(max_lexer_states=25_000, step_lexer_fuel=100_000, verbose_errors=False)


class GrammarCompiler:
    """Compiles constraints for one tokenizer, in the thread that submits the request: safe from any."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._tokenizer = tokenizer
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # guards _vocabulary and _compiled

    def compile(self, params: SamplingParams) -> Constraint:
        """The constraint that `params` asks for, at its beginning.

        GrammarError, with the reason, for one that cannot be compiled, asks for what llguidance does not support or is
        too large.
        """
        mark_id = self._tokenizer.special_tokens.get(DSML)
        name, text = grammar_of(params, mark_id)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self.vocab_size, self.eos_token_ids)
            vocabulary = self._vocabulary
            known = self._compiled.get(text)
            if known is not None:
                self._compiled.move_to_end(text)
        if known is None:
            with _named(name):
                try:
                    known = _compile(vocabulary.tokenizer, text)
                except ValueError as error:
                    raise self._of_one_tool(params, mark_id, error) from error
        writing = vocabulary if params.tools is None or mark_id is None else vocabulary.with_token(mark_id)
        before = vocabulary.before(params.grammar_after) if params.grammar_after else None
        constraint = Constraint(known.deep_copy(), writing, params.grammar_after, before)
        if (error := constraint.check()) is not None:  # a first mask shows what is too complex to be followed
            raise GrammarError(name, error)
        with self._lock:
            self._compiled[text] = known
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return constraint

    def _of_one_tool(self, params: SamplingParams, mark_id: int | None, error: ValueError) -> ValueError:
        """The error of the first strict tool that cannot be compiled alone, with its name; else `error`."""
        assert self._vocabulary is not None
        for tool in params.callable_tools:
            try:
                if tool.strict or tool.input_grammar is not None:
                    _compile(self._vocabulary.tokenizer, ToolGrammar([tool], mark_id).lark())
            except ValueError as own:
                return ValueError(f"tool {tool.name!r}: {own}")
        return error


class _Vocabulary:
    """The tokens as llguidance reads them, and which of them a constraint may write."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]) -> None:
        self.size = size
        ends = list(eos_token_ids)
        known = min(size, tokenizer.vocab_size)
        special = [token for token in tokenizer.special_tokens.values() if token < size]
        self.tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(tokenizer, size, known, special, ends[0])), n_vocab=size, eos_token=ends
        )
        self.ends = ends
        bits = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
        bits[:known] = 1
        bits[special] = 0
        bits[ends] = 1
        self.writable = _packed(bits)  # text and the ends
        only_ends = np.zeros_like(bits)
        only_ends[ends] = 1
        self.only_ends = _packed(only_ends)

    def before(self, begins_after: Sequence[int]) -> np.ndarray:
        """Tokens allowed before a constraint begins, as of `Constraint.masks`: text, and those that it begins after."""
        bits = np.unpackbits(self.writable.view(np.uint8), bitorder="little")
        bits[self.ends] = 0
        bits[list(begins_after)] = 1
        return _packed(bits)

    def with_token(self, token_id: int) -> _Vocabulary:
        """The same in which a constraint may write a special token, where its grammar names it."""
        vocabulary = copy.copy(self)
        vocabulary.writable = self.writable.copy()
        vocabulary.writable.view(np.uint8)[token_id // 8] |= 1 << token_id % 8
        return vocabulary


class _Tokens:
    """Tokenizer in the form that llguidance's TokenizerWrapper takes."""

    def __init__(self, tokenizer: Tokenizer, size: int, known: int, special: list[int], eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (size - known)
        self.special_token_ids = special
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _packed(bits: np.ndarray) -> np.ndarray:
    """A bit per element, the first in the lowest bit: uint32 [elements / 32]."""
    return np.packbits(bits, bitorder="little").view(np.uint32)


def grammar_of(params: SamplingParams, mark_id: int | None) -> tuple[str, str]:
    """(field, Lark text) of the constraint that `params` has. GrammarError for what is too large or no grammar.

    `mark_id`: the token in the tags of tool calls.
    """
    if params.tools is not None:
        with _named("tools"):
            text = _tools_text(params, params.callable_tools, mark_id)
        _check_size("tools", text)
        return "tools", text
    if params.grammar is not None:
        return "grammar", _checked_lark(params.grammar) + ALL_TOKENIZATIONS
    if params.regex is not None:
        name, rule = "regex", regex_terminal(params.regex)
    elif params.choice is not None:
        name, rule = "choice", regex_terminal("|".join(map(escape, params.choice)))
    else:
        assert params.json_schema is not None or params.json_object, "params without a constraint are not compiled"
        name = "json_object" if params.json_schema is None else "json_schema"
        with _named(name):
            rule = json_rule({"type": "object"} if params.schema is None else params.schema)
    _check_size(name, rule)
    return name, f"start: {rule}{ALL_TOKENIZATIONS}"


def _tools_text(params: SamplingParams, tools: Sequence[Tool], mark_id: int | None) -> str:
    schema = {"type": "object"} if params.json_object else params.schema
    required = params.tool_choice not in ("auto", "none")
    return ToolGrammar(tools, mark_id, schema).lark(required, params.parallel_tool_calls, params.tool_block_open)


def _checked_lark(text: str) -> str:
    _check_size("grammar", text)
    try:
        check_names_no_token(text)
    except ValueError as error:
        raise ValueError(f"SamplingParams.grammar: {error}") from error
    return text


def _check_size(name: str, text: str) -> None:
    size = len(text.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise GrammarError(name, f"it has {size} bytes; allowed: {MAX_GRAMMAR_BYTES}")


def _compile(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """ValueError with llguidance's reason. Other Python threads run meanwhile."""
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(reason_of(matcher.get_error()))
    warnings = matcher.get_grammar_warnings()
    if warnings:  # such as parts of a schema that would be passed over
        raise ValueError("; ".join(warnings))
    return matcher


@contextmanager
def _named(name: str) -> Generator[None]:
    """Errors say which field they belong to. A panic of llguidance, which is no Exception, becomes one of them."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError) or type(error).__name__ == "PanicException":
            raise GrammarError(name, str(error)) from error
        raise
