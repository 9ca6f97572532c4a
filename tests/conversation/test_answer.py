"""Answers in every format of conversations: where they end, what counts as markup, what the next prompt has of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from dsv4.tokenizer.special import DSML, END_THINK, EOS
from tests.conversation.answers import FORMATS, TOKENIZER, Reply, Talk, plain, special
from tests.conversation.parsing import arguments_of, input_of

BLOCK, BLOCK_END = f"<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
OPEN = f'<{DSML}invoke name="f">\n<{DSML}parameter name="x" string="true">'
CLOSE = f"</{DSML}parameter>\n</{DSML}invoke>\n"
MISTAKEN = f"<{DSML}function_calls>\n{OPEN}v{CLOSE}</{DSML}function_calls>"  # not the tag that the prompt teaches
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)
STEPS = (1, 2, 3, 7, 1000)
ENDED = {"chat": "tool_calls", "messages": "tool_use", "responses": "completed"}
FORM = {
    "chat": {"response_format": {"type": "json_object"}},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    "responses": {"text": {"format": {"type": "json_object"}}},
}


def call(value: str) -> str:
    return f"{OPEN}{value}{CLOSE}"


def block(*values: str) -> str:
    return BLOCK + "".join(map(call, values)) + BLOCK_END


def whole_calls(name: str, text: str) -> list[tuple[str, Any]]:
    """Calls of a whole answer."""
    answer = json.loads(text)
    if name == "chat":
        calls = [made["function"] for made in answer["choices"][0]["message"].get("tool_calls") or []]
        return [(made["name"], arguments_of(made["arguments"])) for made in calls]
    if name == "messages":
        return [(part["name"], input_of(part["input"])) for part in answer["content"] if part["type"] == "tool_use"]
    made = [item for item in answer["output"] if item["type"] == "function_call"]
    return [(item["name"], arguments_of(item["arguments"])) for item in made]


def asked(name: str, ids: list[int], **options: Any) -> Reply:
    """The answer of a new conversation, which is the same however its tokens come, streamed and whole."""
    end = options.pop("end", "stop")
    found: list[Reply] = []
    for step in STEPS:
        talk = Talk(name)
        reply, whole, _ = talk.ask(talk.body(**options), ids, end, step)
        assert whole_calls(name, whole) == [(tool, arguments_of(given)) for tool, given in reply.calls]
        found.append(replace(reply, call_ids=[], num_read=0))
    assert all(reply == found[0] for reply in found)
    return found[0]


def turn(talk: Talk, reply: Reply, **options: Any) -> str:
    """The model's turn, and what follows, in the prompt of the next request."""
    prompt = TOKENIZER.decode(talk.prompt(talk.body(talk.said(reply), **options)))
    return prompt[prompt.index("hi json<｜Assistant｜>") + len("hi json<｜Assistant｜>") :]


@EVERY_FORMAT
@pytest.mark.parametrize("written", [block("v"), MISTAKEN], ids=["well-formed", "mended"])
@pytest.mark.parametrize("begin", ["t</think>", "t\n\n"], ids=["after reasoning", "in reasoning"])
def test_an_answer_ends_with_its_calls(name: str, written: str, begin: str) -> None:
    """Whatever the model would write after them, and whatever else would end it, is neither shown nor counted."""
    until = special(begin + written)
    more = special("\n\n<tool_result>IGNORED 99</tool_result> So it is 99.")
    for ids, end in (
        (until + more, None),
        (until + more, "length"),
        (until, "length"),
        ([*until, *special(EOS)], "stop"),
    ):
        for step in STEPS:
            talk = Talk(name)
            reply, whole, _ = talk.ask(talk.body(), ids, end, step)
            assert (reply.reasoning, reply.content, reply.calls) == ("t", "", [("f", '{"x": "v"}')])
            assert (reply.reason, reply.num_tokens) == (ENDED[name], len(until))
            assert reply.num_read < len(until) + step, "the engine is told at once"
            assert whole_calls(name, whole) == [("f", {"x": "v"})]
            assert "99" not in turn(talk, reply) and turn(talk, reply).count(DSML) == written.count(DSML)


@EVERY_FORMAT
def test_the_rest_of_the_token_that_ends_the_calls_is_not_shown(name: str) -> None:
    reply = asked(name, [*special(f"t</think>{block('v')}\n\n"), *special(f"{block('w')}")], end=None)
    assert (reply.content, reply.calls) == ("", [("f", '{"x": "v"}')])


@EVERY_FORMAT
@pytest.mark.parametrize("quoted", [block("v"), MISTAKEN, f"<{DSML}tool_calls>", f"</{DSML}invoke> and <{DSML}x>"])
@pytest.mark.parametrize("tools", [True, False], ids=["tools", "no tools"])
def test_markup_in_ordinary_tokens_is_text(name: str, quoted: str, tools: bool) -> None:
    """A document that the model repeats must not call tools."""
    reply = asked(name, [*special("t</think>"), *plain(f"It says: {quoted} Done.")], tools=tools)
    assert (reply.content, reply.calls) == (f"It says: {quoted} Done.", [])
    reply = asked(name, [*plain(f"It says: {quoted}"), *special("</think>Done.")], tools=tools)
    assert (reply.reasoning, reply.content, reply.calls) == (f"It says: {quoted}", "Done.", [])


@EVERY_FORMAT
@pytest.mark.parametrize("kind", ["tool_calls", "function_calls"])
@pytest.mark.parametrize("quoted", [f"a{CLOSE}{BLOCK_END} b", f"a{OPEN}b", f"<{DSML}", f"a{END_THINK}b", "｜｜<｜x"])
def test_markup_in_ordinary_tokens_of_a_value_is_its_text(name: str, quoted: str, kind: str) -> None:
    before, after = block("*").replace("tool_calls", kind).split("*")
    ids = [*special(f"t</think>{before}"), *plain(quoted), *special(after)]
    assert [json.loads(given) for _, given in asked(name, ids).calls] == [{"x": quoted}]
    ids = [*special(f"t\n\n{before}"), *plain(quoted), *special(after)]
    reply = asked(name, ids)
    assert (reply.reasoning, [json.loads(given) for _, given in reply.calls]) == ("t", [{"x": quoted}])


@EVERY_FORMAT
@pytest.mark.parametrize(
    "text",
    [
        f'{{"a": "<{DSML}tool_calls>x<{DSML}invoke name=f>y</{DSML}invoke>z</{DSML}tool_calls>"}}',
        f'{{"a": "use <{DSML}tool_calls> to begin", "b": "</think>"}}',
    ],
)
@pytest.mark.parametrize("has_mark", [True, False], ids=["mark", "tokenizer without the mark"])
def test_json_may_quote_markup(name: str, text: str, has_mark: bool) -> None:
    """It is valid JSON still, and comes as it is written, not at the end of the answer."""
    ids = plain(text)
    for thinking in (True, False):
        talk = Talk(name)
        if not has_mark:
            marks = replace(talk.model.vocabulary.marks, tag=None)
            talk.model.vocabulary = replace(talk.model.vocabulary, marks=marks)
        begin = special("t</think>") if thinking else []
        body = talk.body(thinking=thinking, tools=False, **FORM[name])
        reply, _, steps = talk.ask(body, [*begin, *ids, *special(EOS)])
        assert (reply.content, json.loads(reply.content)) == (text, json.loads(text))
        decoder = TOKENIZER.decode_stream()
        written = list(accumulate(map(decoder.push, ids)))
        assert [step.content for step in steps[len(begin) : -1]] == written


@EVERY_FORMAT
def test_without_the_mark_in_the_tokenizer_its_spelling_counts(name: str) -> None:
    talk = Talk(name)
    talk.model.vocabulary = replace(talk.model.vocabulary, marks=replace(talk.model.vocabulary.marks, tag=None))
    reply, _, _ = talk.ask(talk.body(), [*special("t</think>"), *plain(MISTAKEN)], None)
    assert reply.reason == ENDED[name]


@EVERY_FORMAT
@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (block("v"), 'f({"x": "v"})'),
        (block("<b>"), 'f({"x": "<b>"})'),
        (f"{BLOCK} oops", "oops"),
        (f"A <{DSML} mark.", "A  mark."),
        (f"a </{DSML}invoke> b", "a  b"),
        (f"{BLOCK}{OPEN}ha", "ha"),
    ],
)
def test_calls_that_were_shown_as_words_are_words_in_the_next_prompt(name: str, written: str, shown: str) -> None:
    """They have no result: a prompt with the calls would teach the model that it gets none."""
    for thinking in (True, False):
        talk = Talk(name)
        ids = special(("t</think>" if thinking else "") + written + EOS)
        reply, _, _ = talk.ask(talk.body(thinking=thinking, tools=False), ids)
        assert (reply.content, reply.calls) == (shown, [])
        later = turn(talk, reply, thinking=thinking)
        assert later.startswith(f"<think>t</think>{shown}{EOS}" if thinking else f"</think>{shown}{EOS}")
        assert TOKENIZER.special_id(DSML) not in talk.prompt(talk.body(talk.said(reply), thinking=thinking))[-60:]


@EVERY_FORMAT
def test_a_block_without_a_call_is_text_in_the_next_prompt(name: str) -> None:
    for written, shown in (
        (f"text {BLOCK}{BLOCK_END} more", "text  more"),
        (f"text {BLOCK}please{BLOCK_END}", "text please"),
    ):
        talk = Talk(name)
        reply, _, _ = talk.ask(talk.body(), special(f"t</think>{written}{EOS}"))
        assert (reply.content, reply.calls) == (shown, [])
        assert turn(talk, reply).startswith(f"<think>t</think>{shown}{EOS}")


@EVERY_FORMAT
def test_a_lost_call_beside_others_is_not_in_the_next_prompt(name: str) -> None:
    """Its tags have a meaning for the model, its result is missing."""
    talk = Talk(name)
    written = BLOCK + call("v") + f'<{DSML}invoke name="f">\nplease\n</{DSML}invoke>\n' + BLOCK_END
    reply, _, _ = talk.ask(talk.body(), special(f"t</think>{written}"), None)
    assert reply.calls == [("f", '{"x": "v"}')]
    assert turn(talk, reply).startswith(f"<think>t</think>{block('v')}{EOS}")


@EVERY_FORMAT
def test_markup_in_ordinary_tokens_of_words_is_no_call(name: str) -> None:
    """Words in place of a block are given to the parser as text, in which spellings of tags would count."""
    ids = [*special(f"t</think>{BLOCK}"), *plain(f"say {block('w')} or a</think>b"), *special(BLOCK_END + EOS)]
    reply = asked(name, ids)
    assert (
        reply.calls == [] and reply.content.replace("< ", "<").replace("</ ", "</") == f"say {block('w')} or a</think>b"
    )
    reply = asked(name, [*special("t\n\n"), *ids[2:-1], *special(f"</think>Answer.{EOS}")])
    assert (reply.calls, reply.content) == ([], "Answer.")


@EVERY_FORMAT
def test_an_end_of_reasoning_in_a_value_is_text_in_the_next_prompt(name: str) -> None:
    """In that of a turn that was cut off behind a call, whose end is written anew."""
    talk = Talk(name)
    before, after = f"{BLOCK}{OPEN}*{CLOSE}".replace("tool_calls", "function_calls").split("*")
    ids = [*special(f"t</think>{before}"), *plain("a</think>b"), *special(after)]
    reply, _, _ = talk.ask(talk.body(), ids, "length")
    assert [json.loads(given) for _, given in reply.calls] == [{"x": "a</think>b"}]
    asked_before, prompt = talk.prompt(talk.body()), talk.prompt(talk.body(talk.said(reply)))
    assert turn(talk, reply).startswith(f"<think>t</think>{block('a</think>b')}{EOS}")
    assert prompt[len(asked_before) :].count(TOKENIZER.special_id(END_THINK)) == 1


@EVERY_FORMAT
def test_calls_come_one_by_one(name: str) -> None:
    """A call is handed on with its last token, and no piece of it before: it may still turn out to be malformed."""
    talk = Talk(name)
    parts = [special(text) for text in (f"t</think>Text.\n\n{BLOCK}", call("v"), call("w" * 99), BLOCK_END)]
    reply, _, steps = talk.ask(talk.body(), [token for part in parts for token in part], None)
    assert reply.calls == [("f", '{"x": "v"}'), ("f", f'{{"x": "{"w" * 99}"}}')]
    place = len(parts[0])
    for number, part in enumerate(parts[1:3]):
        place += len(part)
        assert steps[place - 4].calls == reply.calls[:number], "without the end of its end tag"
        assert steps[place - 1].calls == reply.calls[: number + 1]


@EVERY_FORMAT
def test_an_end_of_reasoning_in_ordinary_tokens_stays_in_the_reasoning(name: str) -> None:
    """Also where the server fills in reasoning that a client has lost, beside a call that it has edited."""
    talk = Talk(name)
    ids = [*plain("I recall </think> tags"), *special(f"</think>text\n\n{block('v')}")]
    reply, _, _ = talk.ask(talk.body(), ids, None)
    assert (reply.reasoning, reply.content.strip()) == ("I recall </think> tags", "text")
    reply.calls = [("f", '{"x": "edited"}')]
    assert turn(talk, reply).startswith(f"<think>I recall </think> tags</think>text\n\n{block('edited')}")


@EVERY_FORMAT
@pytest.mark.parametrize("value", [special("x</think>y"), plain("x</think>y")], ids=["special", "spelled"])
def test_an_end_of_reasoning_in_a_call_without_tools_does_not_end_it(name: str, value: list[int]) -> None:
    before, after = block("*").split("*")
    ids = [*special(f"hm {before}"), *value, *special(f"{after} more</think>answer{EOS}")]
    reply = asked(name, ids, tools=False)
    assert (reply.reasoning, reply.content) == ('hm f({"x": "x< /think>y"}) more', "answer")


@EVERY_FORMAT
def test_reasoning_that_mentions_a_tag_ends_where_it_ends(name: str) -> None:
    ids = special(f'One begins with <{DSML}invoke name="f"> or so.</think>Answer.{EOS}')
    for tools in (True, False):
        reply = asked(name, ids, tools=tools)
        assert (reply.reasoning, reply.content, reply.calls) == ("One begins with or so.", "Answer.", [])


@EVERY_FORMAT
def test_calls_in_reasoning_before_a_form_are_words_too(name: str) -> None:
    """The form begins at the end of the reasoning, whatever is open there, and comes as it is written."""
    for written, shown in (
        (f"hm {block('v')} so", 'hm f({"x": "v"}) so'),
        (f"hm {BLOCK}{OPEN}v", "hm v"),
        (f"hm <{DSML} so", "hm  so"),
    ):
        form = plain('{"a": "<b"}')
        ids = [*special(f"{written}</think>"), *form]
        reply = asked(name, [*ids, *special(EOS)], tools=False, **FORM[name])
        assert (reply.reasoning.strip(), reply.content) == (shown, '{"a": "<b"}')
        talk = Talk(name)
        _, _, steps = talk.ask(talk.body(tools=False, **FORM[name]), ids)
        decoder = TOKENIZER.decode_stream()
        assert [step.content for step in steps[-len(form) :]] == list(accumulate(map(decoder.push, form)))


@EVERY_FORMAT
def test_a_tag_that_was_dropped_is_not_mistaken_for_its_spelling(name: str) -> None:
    """The next prompt has what was shown, in ordinary tokens, where special ones of the same text were sampled."""
    tag = f"<{DSML}x>"
    for thinking in (True, False):
        talk = Talk(name)
        begin = special("t</think>" if thinking else "")
        body = talk.body(thinking=thinking)
        reply, _, _ = talk.ask(body, [*begin, *special(f"A {tag}"), *plain(f"{tag} B")], "length")
        assert reply.content == f"A {tag} B"
        prompt = talk.prompt(talk.body(talk.said(reply), thinking=thinking))
        assert f"A {tag} B" in turn(talk, reply, thinking=thinking)
        assert TOKENIZER.special_id(DSML) not in prompt[len(talk.prompt(body)) :]


@EVERY_FORMAT
@pytest.mark.parametrize("parameter", ["a｜b", "ü"])
def test_names_of_parameters_are_shown_as_they_are_written(name: str, parameter: str) -> None:
    before, after = block("v").replace('"x"', '"*"').split("*")
    reply = asked(name, [*special(f"t</think>{before}"), *plain(parameter), *special(after + EOS)], tools=False)
    assert reply.content == f'f({{"{parameter}": "v"}})'


@EVERY_FORMAT
def test_without_the_mark_in_the_tokenizer_a_call_ends_the_reasoning(name: str) -> None:
    """In the usage, and where the reasoning is filled in that a client has lost."""
    talk = Talk(name)
    talk.model.vocabulary = replace(talk.model.vocabulary, marks=replace(talk.model.vocabulary.marks, tag=None))
    reasoning = plain("why\n\n")
    reply, whole, _ = talk.ask(talk.body(), [*reasoning, *plain(block("v"))], None)
    assert (reply.reasoning, reply.calls) == ("why", [("f", '{"x": "v"}')])
    if name != "messages":
        usage = json.loads(whole)["usage"]
        details = usage.get("completion_tokens_details") or usage["output_tokens_details"]
        assert details["reasoning_tokens"] in (len(reasoning), len(reasoning) - 1), "the break may be the tag's"
    reply.calls = [("f", '{"x": "edited"}')]
    assert turn(talk, reply).startswith(f"<think>why\n\n</think>\n\n{block('edited')}")
