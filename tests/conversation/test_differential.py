"""Generated answers: well-formed ones as deepseek-recipe parses them, others the same however they are cut.

Whatever the model writes, no tag of the markup reaches reasoning or content, with and without tools.
"""

from __future__ import annotations

import json
import re
from typing import Any

import deepseek_recipe as recipe
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from dsv4.conversation.tool_calls import Call, understand
from dsv4.conversation.tool_markup import Token, ToolMarkup
from dsv4.conversation.tool_tags import Marks
from tests.conversation.parsing import PROTOCOLS, Parsed, cut, own_items, parsed
from tests.conversation.tool_markup_corpus import PARIS, STOPPED, TEXT, TOOLS, UNDERSTOOD, M, block, invoke, parameter

OPENINGS = (f"<{M}", f"</{M}")
GENERATED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
CHARACTERS = st.characters(exclude_categories=("Cs",))
# What texts that look like markup are made of.
FRAGMENTS = (
    *("<", "</", ">", "/>", "｜", "｜DSML", "DSML｜", M, f"<{M}", f"</{M}", "\n", "\n\n", " ", "a", "é", "🙂"),
    *(
        "tool_calls>",
        "invoke",
        'invoke name="weather">',
        'parameter name="city" string="true">',
        "parameter>",
        '"',
        "'",
    ),
    *(f"<{M}tool_calls>", f"</{M}tool_calls>", f'<{M}invoke name="weather">', f"</{M}invoke>", f"<{M}foo>", "{", "}"),
    *(f'<{M}parameter name="city" string="true">', f"</{M}parameter>", '{"city": "Paris"}', PARIS, "<think>"),
    *("</think>", "```json"),
)
TEXTS = st.one_of(st.text(CHARACTERS, max_size=20), st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join))
PLAIN_TEXTS = TEXTS.filter(lambda text: "</think>" not in text and not any(mark in text for mark in OPENINGS))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(CHARACTERS, max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(CHARACTERS, max_size=5), inner, max_size=3),
    max_leaves=6,
)
STRINGS = TEXTS.filter(lambda text: M not in text)
CALLS = st.tuples(
    st.sampled_from(sorted(TOOLS)), st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), STRINGS | VALUES)
)


def written(reasoning: str, content: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool) -> str:
    """An answer as deepseek-recipe writes it into a prompt."""
    made = [recipe.ToolCall(f"c{i}", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls)]
    message = recipe.AssistantMessage(content, reasoning if thinking else None, made or None)
    results = [recipe.ToolMessage("r", call.id) for call in made]
    conversation = recipe.Conversation(
        [recipe.UserMessage("x"), message, *results, recipe.UserMessage("y")],
        thinking_mode=thinking,
        tools=[recipe.ToolDefinition("weather")],
    )
    prompt = recipe.DeepseekV4Encoding().render_conversation(conversation).prompt
    turn = prompt.rpartition("<｜Assistant｜>")[0].rpartition("<｜end▁of▁sentence｜>")[0]
    return (
        turn[turn.rindex("<｜Assistant｜>") :]
        .removeprefix("<｜Assistant｜>")
        .removeprefix("<think>" if thinking else "</think>")
    )


def stripped(found: Parsed) -> Parsed:
    return Parsed(found.reasoning.strip(), found.content.strip(), found.calls)


def no_markup(found: Parsed) -> bool:
    return not any(mark in text for text in (found.reasoning, found.content) for mark in OPENINGS)


@GENERATED
@given(PLAIN_TEXTS, PLAIN_TEXTS, st.lists(CALLS, max_size=3), st.booleans(), st.data())
def test_well_formed_answers_are_what_deepseek_recipe_makes_of_them(
    reasoning: str, content: str, calls: list[Any], thinking: bool, data: st.DataObject
) -> None:
    assume(all(isinstance(value, (str, int, float, list, dict, type(None))) for _, a in calls for value in a.values()))
    answer = written(reasoning, content, calls, thinking)
    assume("<｜" not in reasoning + content or M in reasoning + content)
    cuts = [range(len(answer)), data.draw(st.lists(st.integers(0, max(len(answer), 1)))), []]
    for protocol in PROTOCOLS:
        wanted, whole = parsed(protocol, [answer], thinking, tools=True)
        assert wanted.calls == whole.calls and [name for name, _ in wanted.calls] == [name for name, _ in calls]
        for places in cuts:
            found = parsed(protocol, own_items(cut(answer, places), TOOLS, thinking, protocol), thinking, tools=True)
            assert found == (wanted, whole), (protocol, answer)


def calls_of(markup: ToolMarkup, tokens: list[Token]) -> list[Call]:
    for token in tokens:
        markup.push(token)
    markup.finish(False)
    return markup.calls


INVOKES = st.sampled_from(
    [
        *(invoke(body) for body in (PARIS, "", '{"city": "Rome"}', "please", f"{PARIS}\n{PARIS}", f" {PARIS}", "[1]")),
        *(invoke(parameter("days", value, "false")) for value in ("3", " 3 ", "three", '{"a": "</think>"}')),
        *(
            invoke(parameter("city", value))
            for value in ("a\nb", "</think>", f"<{M} x", f"</{M}tool_calls>", f"<{M}x>")
        ),
        invoke(parameter("arguments", '{"city": "Oslo"}', "false")),
        invoke(f'<{M}parameter name="city">Oslo'),
        f'<{M}invoke name="now"/>',
        f'<{M}invoke name="weather">\n{PARIS}',
    ]
)


@GENERATED
@given(st.lists(st.tuples(INVOKES, st.sampled_from(("\n", "", " ", "\nplease\n"))), max_size=5), st.data())
def test_calls_that_come_one_by_one_are_those_of_the_whole_block(
    parts: list[tuple[str, str]], data: st.DataObject
) -> None:
    answer = f"<{M}tool_calls>\n" + "".join(written + between for written, between in parts) + f"</{M}tool_calls>"
    wanted = understand(answer, TOOLS, "block").calls
    drawn = data.draw(st.lists(st.integers(0, len(answer))))
    for places in ([], range(len(answer)), drawn):
        pieces = [Token(0, piece) for piece in cut(answer, places)]
        assert calls_of(ToolMarkup(TOOLS, False, False), pieces) == wanted


@GENERATED
@given(
    st.lists(st.dictionaries(st.sampled_from(("city", "a b", "q")), TEXTS, max_size=2), min_size=1, max_size=3),
    st.booleans(),
    st.data(),
)
def test_where_marks_are_tokens_values_may_spell_them(
    wanted: list[dict[str, str]], well_formed: bool, data: st.DataObject
) -> None:
    """Whatever ordinary tokens spell, and however they are cut, it is the text of its value."""
    values = [text for arguments in wanted for text in arguments.values()]
    numbers = iter(range(len(values)))
    invokes = [
        invoke("\n".join(parameter(name, f"#{next(numbers)}#") for name in arguments)).replace("\n\n", "\n")
        for arguments in wanted
    ]
    answer = block(*invokes)
    if not well_formed:
        answer = answer.replace("tool_calls", "function_calls")
    tokens: list[Token] = []
    for part in re.split(f"({M})", answer):
        if part == M:
            tokens.append(Token(7, M))
            continue
        text = re.sub("#([0-9]+)#", lambda number: values[int(number[1])], part)
        places = data.draw(st.lists(st.integers(0, max(len(text), 1)), max_size=4))
        tokens += [Token(0, piece) for piece in cut(text, places) if piece]
    found = calls_of(ToolMarkup(TOOLS, False, False, Marks(7, 8)), tokens)
    assert [json.loads(call.arguments_json) for call in found] == wanted


def mutated(draw: Any) -> str:
    """An answer that was well-formed before parts of it were lost, repeated or put in."""
    _, answer, *_ = draw(st.sampled_from([*UNDERSTOOD, *TEXT, *STOPPED]))
    answer = draw(st.sampled_from(("", "I think.\n\n", "so</think>", "a<"))) + answer
    for _ in range(draw(st.integers(1, 3))):
        begin, end = sorted((draw(st.integers(0, len(answer))), draw(st.integers(0, len(answer)))))
        kind = draw(st.sampled_from(("lose", "repeat", "put", "cut")))
        if kind == "lose":
            answer = answer[:begin] + answer[min(end, begin + 12) :]
        elif kind == "repeat":
            answer = answer[:end] + answer[begin:]
        elif kind == "put":
            answer = answer[:begin] + draw(st.sampled_from(FRAGMENTS)) + answer[begin:]
        else:
            answer = answer[:end]
    return answer


MALFORMED = st.composite(mutated)() | st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@GENERATED
@given(MALFORMED, st.booleans(), st.booleans(), st.data())
@example(f"<<{M}foo>{M}invoke>", False, True, None)
@example(f"<｜DS<{M}foo>ML｜invoke>", True, False, None)
@example(f"<</think>{M}invoke>", False, False, None)
@example(f"<<{M}tool_calls>{M}</{M}tool_calls>", False, True, None)
@example(f"<<{M}tool_calls><</{M}tool_calls>{M}x>", False, True, None)
@example(f"<{M}tool_calls><<{M}foo>{M}invoke></{M}tool_calls>", False, True, None)
def test_malformed_answers_are_the_same_however_they_are_cut(
    answer: str, thinking: bool, tools: bool, data: st.DataObject | None
) -> None:
    offered = TOOLS if tools else None
    drawn = [] if data is None else data.draw(st.lists(st.integers(0, max(len(answer), 1))))
    for protocol in PROTOCOLS:
        found: list[Parsed] = []
        for places in ([], range(len(answer)), drawn):
            found += parsed(protocol, own_items(cut(answer, places), offered, thinking, protocol), thinking, tools)
        assert all(no_markup(one) for one in found), (protocol, found)
        assert all(stripped(one) == stripped(found[0]) for one in found), (protocol, found)
        assert tools or not found[0].calls


@pytest.mark.parametrize("tools", [True, False], ids=["tools", "no tools"])
@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "plain"])
@pytest.mark.parametrize("case", [*UNDERSTOOD, *TEXT, *STOPPED], ids=lambda case: case[0])
def test_every_single_cut_of_the_corpus_gives_the_same(case: Any, thinking: bool, tools: bool) -> None:
    """One cut at each character, in Chat Completions; the other protocols are generated from the same parts."""
    answer = ("I think.</think>" if thinking else "") + case[1]
    offered = TOOLS if tools else None
    wanted = parsed("chat", own_items([answer], offered, thinking), thinking, tools)[0]
    assert no_markup(wanted) and (tools or not wanted.calls)
    items = set[tuple[str, ...]]()
    for place in range(1, len(answer)):
        items.add(("".join(own_items(cut(answer, [place]), offered, thinking)),))
    assert len(items) == 1, "what the parser reads is the same text"


def test_a_stop_inside_markup_shows_none_of_it() -> None:
    """Every beginning of an answer with calls, as if the model had stopped there."""
    answer = "I think.</think>Text.\n\n" + block(invoke(PARIS), invoke('{"city": "Rome"}'))
    for end in range(len(answer)):
        for tools in (TOOLS, None):
            found = parsed("chat", own_items(list(answer[:end]), tools, True), True, tools is not None)[0]
            assert no_markup(found), answer[:end]
