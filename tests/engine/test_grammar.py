"""Constrained decoding with the real embedded model: what comes out is what was asked for, whatever the seed."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema
import pytest

from dsv4.engine import LLM, RequestOutput, SamplingParams
from dsv4.engine.constraint import allows
from dsv4.engine.grammar import KEPT_GRAMMARS, LIMITS, MAX_GRAMMAR_BYTES, GrammarCompiler
from dsv4.engine.request import Request
from dsv4.engine.step import ScheduledChunk

PROMPT = "The answer is "
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "größe", "日本"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SHORT = SamplingParams(max_tokens=24, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_model_len=512)


@pytest.fixture
def compiler(llm: LLM) -> GrammarCompiler:
    assert llm.core.limits.grammars is not None
    return llm.core.limits.grammars


def outputs_of_seeds(llm: LLM, params: SamplingParams, count: int) -> list[RequestOutput]:
    return llm.generate([PROMPT] * count, [replace(params, seed=seed) for seed in range(count)])


def reached(llm: LLM, params: SamplingParams, text: str) -> bool:
    """True if the constraint lets `text` be written and end."""
    constraint = llm.core.limits.grammars.compile(params)
    for token in llm.tokenizer.encode(text):
        (mask,) = constraint.masks()
        if not allows(mask, token):
            return False
        constraint.advance(token)
    return allows(constraint.masks()[0], llm.config.eos_token_ids[0])


def test_every_output_of_a_hundred_seeds_is_valid_json_of_the_schema(llm) -> None:
    params = SamplingParams(max_tokens=150, json_schema=PERSON)
    outputs = outputs_of_seeds(llm, params, 100)
    for output in outputs:
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), PERSON)
        assert not set(output.token_ids) & set(llm.tokenizer.special_tokens.values()), "special tokens are no text"
    assert len({output.text for output in outputs}) > 30, "the model still chooses"
    as_text = outputs_of_seeds(llm, replace(params, json_schema=json.dumps(PERSON)), 5)
    assert [output.text for output in as_text] == [output.text for output in outputs[:5]]


REGEXES = (r"\d{3}-[a-f]{2,5}", r"^(yes|no), é{1,3}日本[0-9]$", r"[^a\n]{3,9}", r"(?i)abc/\\\.\#?")
TOO_MUCH = "|".join(f"[a-{'bcdefg'[i % 6]}]{{{i}}}x" for i in range(20_000))


@pytest.mark.parametrize("regex", REGEXES)
def test_every_output_matches_the_whole_regex(llm, regex: str) -> None:
    for output in outputs_of_seeds(llm, SamplingParams(max_tokens=60, regex=regex), 20):
        assert output.finish_reason == "stop"
        assert re.fullmatch(regex, output.text), output.text


def test_every_output_is_one_of_the_choices(llm) -> None:
    choices = ["a", "ab", 'quote " and \\ and /', "line\nbreak", "größe 日本 🙂", "x.*+?()[]{}|^$#"]
    found = {output.text for output in outputs_of_seeds(llm, SamplingParams(choice=choices, temperature=9.0), 80)}
    assert found == set(choices)


def test_a_lark_grammar_is_followed_and_ends_the_request(llm) -> None:
    grammar = 'start: "(" start ")" | NUMBER\nNUMBER: /[1-9][0-9]?/'
    for output in outputs_of_seeds(llm, SamplingParams(max_tokens=60, grammar=grammar, temperature=0.8), 20):
        if output.finish_reason == "stop":
            depth = output.text.count("(")
            assert re.fullmatch(rf"\({{{depth}}}[1-9][0-9]?\){{{depth}}}", output.text)


def test_any_json_object_is_an_object(llm) -> None:
    outputs = outputs_of_seeds(llm, SamplingParams(max_tokens=60, json_object=True), 12)
    whole = [output for output in outputs if output.finish_reason == "stop"]
    assert all(isinstance(json.loads(output.text), dict) for output in whole) and whole
    params = SamplingParams(json_object=True)
    assert reached(llm, params, '{"a": [1, {"b": null}], "c": "x"}') and reached(llm, params, "{}")
    assert not reached(llm, params, "[1]") and not reached(llm, params, '{"a": 1')


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_that_forbids_nothing_gives_the_tokens_of_a_free_run(llm, temperature: float) -> None:
    special = set(llm.tokenizer.special_tokens.values()) - {llm.config.eos_token_ids[0]}
    # Of what is no text, min_p leaves half characters out, and the bias special tokens: here they are likely enough.
    params = SamplingParams(
        max_tokens=40, temperature=temperature, min_p=0.05, logprobs=3, logit_bias=dict.fromkeys(special, -100.0)
    )
    for seed in range(10):
        free = llm.generate(PROMPT, replace(params, seed=seed))[0]
        loose = llm.generate(PROMPT, replace(params, seed=seed, regex=r"(.|\n)*"))[0]
        assert replace(loose, timings=None) == replace(free, timings=None)


def test_logprobs_are_the_models_own_under_a_constraint(llm) -> None:
    params = SamplingParams(temperature=0.0, logprobs=2, choice=["zebra"])
    output = llm.generate(PROMPT, params)[0]
    prompt = output.prompt_token_ids
    scored = llm.generate([[*prompt, *output.token_ids]], SamplingParams(max_tokens=1, prompt_logprobs=True))[0]
    assert output.text == "zebra" and output.logprobs == scored.prompt_logprobs[len(prompt) :]


def test_neighbours_change_nothing(llm) -> None:
    params = [
        SamplingParams(seed=1, max_tokens=60, json_schema=PERSON),
        SamplingParams(seed=2, max_tokens=20),
        SamplingParams(seed=3, choice=["cat", "dog"]),
        SamplingParams(seed=4, max_tokens=30, regex=r"[a-z ]{20,30}", presence_penalty=0.5, logit_bias={300: 5.0}),
        SamplingParams(seed=1, max_tokens=60, json_schema=PERSON),
    ]
    together = llm.generate([PROMPT] * 5, params)
    alone = [llm.generate(PROMPT, param)[0] for param in params]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert together[0].token_ids == together[4].token_ids, "one schema, two states"


def test_the_request_ends_with_the_grammar_and_not_before(llm) -> None:
    output = llm.generate(PROMPT, replace(SHORT, choice=["abc"]))[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "stop", None)
    eos = llm.config.eos_token_ids[0]
    assert eos not in output.token_ids
    open_end = llm.generate(PROMPT, replace(SHORT, regex="a{1,9}", logit_bias={eos: 100.0}))[0]
    assert (open_end.text, open_end.finish_reason, open_end.stop_reason) == ("a", "stop", eos), "also with ignore_eos"
    cut = llm.generate(PROMPT, replace(SHORT, regex="[0-9]{90}", max_tokens=4))[0]
    assert cut.finish_reason == "length" and cut.text.isdigit()
    stopped = llm.generate(PROMPT, replace(SHORT, choice=["one two"], stop="two"))[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("one ", "stop", "two")


def test_a_character_may_be_split_over_tokens(llm) -> None:
    tokens = llm.tokenizer.encode("日🙂")
    assert len(tokens) > 2, "nano's vocabulary has no such characters"
    output = llm.generate(PROMPT, replace(SHORT, choice=["日🙂"]))[0]
    assert output.text == "日🙂" and len(output.token_ids) > 2
    pieces = [event.text for event in llm.stream(PROMPT, replace(SHORT, choice=["日🙂"]))]
    assert "".join(pieces) == "日🙂" and "\ufffd" not in "".join(pieces)


def test_a_constraint_begins_after_the_end_of_the_reasoning(llm) -> None:
    end = llm.tokenizer.special_tokens["</think>"]
    params = replace(SHORT, choice=["yes", "no"], grammar_after=(end,), max_tokens=40)
    short = replace(SHORT, temperature=0.0, logit_bias={end: -100.0})
    free = llm.generate(PROMPT, short)[0]
    before = llm.generate(PROMPT, replace(short, choice=["yes"], grammar_after=(end,)))[0]
    special = set(llm.tokenizer.special_tokens.values())
    text = next((i for i, token in enumerate(free.token_ids) if token in special), len(free.token_ids))
    assert text > 2 and before.token_ids[:text] == free.token_ids[:text], "the reasoning is free"
    eos = llm.config.eos_token_ids[0]
    wants_end = llm.generate(
        PROMPT, replace(short, choice=["yes"], grammar_after=(end,), logit_bias={eos: 100.0, end: -100.0})
    )[0]
    assert not special & {*before.token_ids, *wants_end.token_ids} and wants_end.finish_reason == "length"
    soon = llm.generate(PROMPT, replace(params, logit_bias={end: 100.0}))[0]
    assert soon.token_ids[0] == end and soon.text.removeprefix("</think>") in ("yes", "no")
    assert soon.finish_reason == "stop"


def constrained(llm: LLM, params: SamplingParams) -> Request:
    return llm.core.new_request(llm.encode(PROMPT), params)


def test_drafts_get_masks_of_their_own_and_the_state_comes_back(llm) -> None:
    request = constrained(llm, replace(SHORT, regex="[0-9]{2}[a-z]"))
    digit, letter = llm.tokenizer.encode("1")[-1], llm.tokenizer.encode("q")[-1]
    drafts = (digit, digit, letter, letter)
    for _ in range(2):
        masks = [row.allowed for row in ScheduledChunk(request, 0, request.num_tokens, drafts).sample_requests()]
        assert [None if mask is None else allows(mask, digit) for mask in masks] == [True, True, False, False, None]
        assert [None if mask is None else allows(mask, letter) for mask in masks] == [False, False, True, False, None]
    wrong = [row.allowed for row in ScheduledChunk(request, 0, request.num_tokens, (letter, digit)).sample_requests()]
    assert wrong[0] is not None and wrong[1:] == [None, None], "nothing stands behind a draft that is not allowed"


def test_drafts_over_the_beginning_leave_no_trace(compiler) -> None:
    constraint = compiler.compile(SamplingParams(regex="ab", grammar_after=(7,)))
    a = next(token for token in range(8192) if compiler._tokenizer.token_bytes(token) == b"a")
    constraint.advance(3)
    (reasoning,) = constraint.masks()
    eos, special = compiler.eos_token_ids[0], compiler._tokenizer.special_tokens
    assert allows(reasoning, a) and allows(reasoning, 7), "before it begins: any text"
    assert not allows(reasoning, eos), "and no end"
    assert not any(allows(reasoning, token) for token in special.values() if token != 7)
    for _ in range(2):
        assert [allows(mask, a) for mask in constraint.masks((7, a))] == [True, True, False]
        assert constraint.masks()[0].tolist() == reasoning.tolist() and not constraint.complete
    constraint.advance(7)
    (before,) = constraint.masks()
    constraint.advance(a)
    (after,) = constraint.masks()
    assert before is not None and after is not None and allows(before, a) and not allows(after, a)


NUM_WORDS = 2600
WORDS = [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(NUM_WORDS)]
ANY_WORD = "\n".join(
    ["word: " + " | ".join(f"w{i}" for i in range(NUM_WORDS)), *map('w{0[0]}: "{0[1]}" "a"+'.format, enumerate(WORDS))]
)
# After "b" more rules are open than the parser follows; after "c" no mask can be made.
BROKEN_BY_B = 'start: part+\npart: "a" | "b" word\n' + ANY_WORD
BREAKS_AT_B = 'start: "aa" "b" word\n' + ANY_WORD
BROKEN_BY_C = 'start: part+\npart: "a" | "c" nothing\nnothing: NONE\nNONE: /a/ & /b/'
BREAKS_AT_C = 'start: "aa" "c" NONE\nNONE: /a/ & /b/'


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [(BROKEN_BY_B, "length"), (BROKEN_BY_C, "length"), (BREAKS_AT_B, "abort"), (BREAKS_AT_C, "abort")],
    ids=["parser, rejected", "mask, rejected", "parser, stands", "mask, stands"],
)
def test_a_constraint_broken_by_drafts_breaks_only_where_they_stand(
    llm, grammar: str, reason: str, monkeypatch
) -> None:
    """Right and wrong drafts that the parser cannot follow: the answer, and its end, is that without drafts."""
    a, b, c = (llm.tokenizer.encode(letter)[0] for letter in "abc")
    params = SamplingParams(temperature=0.0, max_tokens=6, grammar=grammar, logit_bias={a: 100.0, b: 50.0, c: 50.0})
    (plain,) = llm.generate([PROMPT], params)
    assert plain.finish_reason == reason
    schedule = llm.core.scheduler.schedule
    eos = llm.config.eos_token_ids[0]
    for drafts in ((b,), (c,), (a, b), (a, c), (a, a, b), (a, a, c), (a, a, b, eos), (a, a, c, eos, eos), (a, c, a)):
        with monkeypatch.context() as patched:
            patched.setattr(
                llm.core.scheduler,
                "schedule",
                lambda: [
                    ScheduledChunk(one.request, one.start, one.stop, drafts if one.num_samples else ())  # noqa: B023
                    for one in schedule()
                ],
            )
            (got,) = llm.generate([PROMPT], params)
        assert (got.token_ids, got.text, got.stop_reason) == (plain.token_ids, plain.text, plain.stop_reason)


@pytest.mark.parametrize("seed", range(3))
def test_right_and_wrong_drafts_give_the_same_answer(llm, seed: int, monkeypatch) -> None:
    params = SamplingParams(seed=seed, max_tokens=60, json_schema=PERSON)
    plain = llm.generate(PROMPT, params)[0]
    schedule = llm.core.scheduler.schedule

    def with_drafts() -> list[ScheduledChunk]:
        chunks = []
        for chunk in schedule():
            done = len(chunk.request.output.token_ids)
            drafts = list(plain.token_ids[done : done + 3])
            if done % 2 and len(drafts) == 3:
                drafts[1] = (drafts[1] + 1) % 8192
            if not chunk.num_samples:
                drafts = []
            chunks.append(ScheduledChunk(chunk.request, chunk.start, chunk.stop, tuple(drafts)))
        return chunks

    monkeypatch.setattr(llm.core.scheduler, "schedule", with_drafts)
    assert llm.generate(PROMPT, params)[0].token_ids == plain.token_ids


# Every keyword of JSON Schema that restricts: one that is not supported must be refused, not passed over.
KEYWORDS = {
    "type": "integer", "enum": [1], "const": 2, "multipleOf": 3, "maximum": 5, "exclusiveMaximum": 5, "minimum": 5,
    "exclusiveMinimum": 5, "maxLength": 1, "minLength": 4, "pattern": "^b+$", "items": {"type": "null"},
    "prefixItems": [{"type": "null"}], "maxItems": 1, "minItems": 3, "uniqueItems": True, "contains": {"const": 7},
    "minContains": 2, "maxContains": 0, "maxProperties": 1, "minProperties": 3, "required": ["z"],
    "properties": {"a": {"type": "null"}}, "patternProperties": {"^a": {"type": "null"}},
    "additionalProperties": False, "propertyNames": {"maxLength": 0}, "dependentRequired": {"a": ["z"]},
    "dependentSchemas": {"a": {"required": ["z"]}}, "dependencies": {"a": ["z"]}, "if": {"type": "string"},
    "allOf": [{"type": "integer"}], "anyOf": [{"type": "integer"}], "oneOf": [{"type": "integer"}, {"type": "null"}],
    "not": {"type": "string"}, "unevaluatedItems": False, "unevaluatedProperties": False, "format": "date",
    "additionalItems": False,
}  # fmt: skip
REFUSED = {
    "uniqueItems", "contains", "minContains", "maxContains", "propertyNames", "dependentRequired", "dependentSchemas",
    "dependencies", "if", "not", "unevaluatedItems", "unevaluatedProperties",
}  # fmt: skip
VALUES = (1, 4, 5, 9, 2.5, "aaa", "bb", "", [], [1, 1], [2, 1, 1], {}, {"a": 1}, {"a": 1, "b": 2}, None, True)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_is_enforced_or_refused(llm, keyword: str) -> None:
    # Each keyword acts on the values of its types alone; its whole schema is compared with jsonschema's judgement.
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", keyword: KEYWORDS[keyword]}
    if keyword == "if":
        schema["then"] = {"maxLength": 1}
    if keyword in ("minContains", "maxContains"):
        schema["contains"] = {"const": 1}
    if keyword == "additionalItems":
        schema |= {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}]}
    params = SamplingParams(json_schema=schema)
    try:
        llm.core.limits.grammars.compile(params)
    except ValueError as error:
        assert "SamplingParams.json_schema cannot be compiled: " in str(error)
        assert keyword in REFUSED
        return
    assert keyword not in REFUSED
    check = jsonschema.validators.validator_for(schema)(schema, format_checker=jsonschema.FormatChecker())
    for value in VALUES:
        if reached(llm, params, json.dumps(value)):
            assert check.is_valid(value), f"{value} was allowed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, 'json_schema cannot be compiled: .*"uniqueItems"'),
        ({"json_schema": {"uniqueItems": True, "x-guidance": {"lenient": True}}}, "uniqueItems"),
        ({"json_schema": {"items": {"uniqueItems": True, "x-guidance": {"lenient": True}}}}, "uniqueItems"),
        ({"grammar": 'start: %json {"uniqueItems": true, "x-guidance": {"lenient": true}}'}, "uniqueItems"),
        ({"json_schema": {"type": "string", "format": "no-such"}}, "Unknown format: no-such"),
        ({"json_schema": {"$ref": "https://example.org/schema"}}, "does not fetch"),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "Unsatisfiable"),
        ({"json_schema": {"type": "object", "x-guidance": 3}}, "x-guidance 3; allowed: an object"),
        ({"regex": "a(?=b)"}, "regex cannot be compiled: .*look-ahead"),
        ({"regex": "["}, "unclosed character class"),
        ({"grammar": "start: nothing"}, 'grammar cannot be compiled: .*unknown name: "nothing"'),
        ({"grammar": 'x: "a"'}, "no start rule"),
        ({"grammar": 'start: "a" <[5]>'}, "names tokens with <...>"),
        ({"grammar": 'start: "<" /</ <｜User｜> # <'}, "names tokens with <...>"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, f"allowed: {MAX_GRAMMAR_BYTES}"),
        ({"regex": TOO_MUCH}, "regex cannot be compiled: .*fuel"),
        ({"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}, "too deeply nested"),
    ],
)
def test_a_constraint_that_cannot_be_kept_is_refused_before_anything_runs(llm, fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.core.new_request([5], SamplingParams(**fields))


def test_a_grammar_may_write_the_marks_of_tokens_as_text(llm) -> None:
    output = llm.generate(PROMPT, replace(SHORT, grammar='start: "<" /<｜User｜>/ // <[5]>'))[0]
    assert output.text == "<<｜User｜>"
    assert not set(output.token_ids) & set(llm.tokenizer.special_tokens.values())


def test_a_constraint_that_becomes_too_complex_ends_its_request_alone(llm, compiler, monkeypatch) -> None:
    assert LIMITS.max_lexer_states == 25_000
    requests = [constrained(llm, replace(SHORT, regex="[a-z]{9}")), constrained(llm, replace(SHORT, max_tokens=6))]
    for request in requests:
        llm.core.add(request)
    llm.core.step()
    broken = requests[0].constraint
    assert broken is not None
    broken.advance(llm.config.eos_token_ids[0])  # which the regex does not allow here: its parser goes no further
    while llm.core.has_work:
        llm.core.step()
    output = requests[0].output
    assert output.finish_reason == "abort" and "the constraint cannot be followed" in str(output.stop_reason)
    assert output.text.isalpha()
    assert requests[1].output.finish_reason == "length"


def test_a_model_without_a_tokenizer_refuses_constraints(model) -> None:
    with pytest.raises(ValueError, match="a constraint of the output needs a tokenizer"):
        LLM(model).generate([[5]], SamplingParams(regex="a"))


def test_compiled_grammars_are_kept_and_their_number_is_bounded(compiler) -> None:
    for number in range(KEPT_GRAMMARS + 3):
        compiler.compile(SamplingParams(regex=f"a{number}"))
    assert len(compiler._compiled) == KEPT_GRAMMARS
    first = compiler.compile(SamplingParams(regex="ab"))
    first.advance(compiler._tokenizer.encode("a")[0])
    second = compiler.compile(SamplingParams(regex="ab"))
    assert first.masks()[0].tolist() != second.masks()[0].tolist(), "a kept grammar stays at its beginning"
