"""Custom tools of the Responses API: their input keeps to its grammar, whatever the model would rather write."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dsv4.server.custom_tools import check_formats
from dsv4.server.errors import RequestError
from dsv4.server.responses import RESPONSES
from tests.server.responses_api import DSML, PATCH, QUESTION, STREAMED, WEATHER, ask, markup, output, prompt, refused

STEPS = 'start: verb " " NUMBER\nverb: "go" | "stop"\nNUMBER: /[0-9]{1,3}/  // up to 999 steps'
EDIT = """*** Begin Patch
*** Update File: src/a.py
@@ def f():
-    return "<old> & {x}"
+    return "new"
*** Add File: b.txt
+é 🙂
*** End Patch"""


def custom(name: str, definition: str, syntax: str = "lark") -> dict[str, Any]:
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    return {"type": "custom", "name": name, "description": "Steers.", "format": form}


def script(server, thinking: bool, forced: bool, block: str) -> dict[str, Any]:
    """Lets the model write a block of calls; returns the request's reasoning. A forced one is opened by the prompt."""
    begun = forced and not thinking
    server.model.reply = ("I think.</think>\n\n" if thinking else "") + (
        block.partition("tool_calls>\n")[2] if begun else block
    )
    return {"reasoning": {"effort": "low" if thinking else "none"}}


def parameter(name: str, value: str, text: bool) -> str:
    return f'{DSML}parameter name="{name}" string="{str(text).lower()}">{value}</｜DSML｜parameter>\n'


def block(name: str, parameters: str) -> str:
    """A block of one call with parameters in the model's markup."""
    call = f'{DSML}invoke name="{name}">\n{parameters}</｜DSML｜invoke>\n'
    return f"{DSML}tool_calls>\n{call}</｜DSML｜tool_calls>"


def calls(response: Any) -> list[Any]:
    return [item for item in response.output if item.type.endswith("_call")]


@STREAMED
@pytest.mark.parametrize(("syntax", "definition", "allowed"), [
    ("lark", STEPS, r"(go|stop) [0-9]{1,3}"),
    ("lark", 'start: pair (", " pair){0,2}\npair: /[a-c]/ "=" /[0-9]/', r"[a-c]=[0-9](, [a-c]=[0-9]){0,2}"),
    ("regex", "^[0-9]{3}-(a|b)$", r"[0-9]{3}-(a|b)"),
    ("regex", r"go|stop\$", r"go|stop\$"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["apply_patch", "shell"])
def test_a_call_keeps_to_its_grammar(server, streamed: bool, syntax: str, definition: str, allowed: str, name) -> None:
    """Required and named, and beside another tool: the model begins a call and would go on with something else."""
    tool = custom(name, definition, syntax)
    block = markup(name, input="whatever comes to mind")
    for thinking in (True, False):
        for tools, choice in (([tool], "required"), ([tool, WEATHER], {"type": "custom", "name": name})):
            options = script(server, thinking, True, block)
            answer = output(server, streamed, tools=tools, tool_choice=choice, parallel_tool_calls=False, **options)
            (call,) = calls(answer)
            assert (call.type, call.name) == ("custom_tool_call", name) and re.fullmatch(allowed, call.input), call
            assert answer.status == "completed"
        options = script(server, thinking, False, block)
        (call,) = calls(output(server, streamed, tools=[WEATHER, tool], parallel_tool_calls=False, **options))
        assert re.fullmatch(allowed, call.input)
    server.model.reply = "I think.</think>No."
    assert output(server, streamed, tools=[tool]).output_text == "No.", "nothing has to be called"


@STREAMED
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("space", [None, "files"])
def test_codexs_patches_pass_and_are_replayed(server, streamed: bool, thinking: bool, space: str | None) -> None:
    tool = custom("apply_patch", PATCH)
    tools = [{"type": "namespace", "name": space, "description": "d", "tools": [WEATHER, tool]}] if space else [tool]
    known = f"{space}__apply_patch" if space else "apply_patch"
    named = {"type": "custom", "name": "apply_patch"} | ({"namespace": space} if space else {})
    for choice in ("auto", "required", named):
        options = script(server, thinking, choice != "auto", markup(known, input=EDIT))
        answer = output(server, streamed, input=[QUESTION], tools=tools, tool_choice=choice, **options)
        (call,) = calls(answer)
        assert (call.type, call.name, call.namespace) == ("custom_tool_call", "apply_patch", space)
        assert call.input == EDIT and call.id.startswith("ctc_")
        wrote = server.model.prompts[-1] + server.model.tokenizer.encode(server.model.reply)
        result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done!"}
        server.model.reply = "Well.</think>Done." if thinking else "Done."
        history = [QUESTION, call.model_dump(exclude_none=True), result]
        assert ask(server, input=history, tools=tools, **options).output_text == "Done."
        if choice != named:  # without thinking, deepseek-recipe offers only the tool that is named
            assert server.model.prompts[-1][: len(wrote)] == wrote
        if choice == "auto":
            history[1] = {"type": "custom_tool_call", "call_id": "other", "name": "apply_patch", "input": EDIT}
            history[1] |= {"namespace": space} if space else {}
            ask(server, input=[*history[:2], result | {"call_id": "other"}], tools=tools, **options)
            assert f'invoke name="{known}"' in prompt(server) and EDIT in prompt(server)


def test_a_patch_that_breaks_off_its_grammar_does_not(server) -> None:
    tool = custom("apply_patch", 'start: "*** Begin Patch\\n" ("+" /[a-z]/ "\\n"){1,3} "*** End Patch"')
    server.model.reply = "</think>\n\n" + markup("apply_patch", input="*** Begin Patch\n+a\nI would rather talk")
    (call,) = calls(ask(server, tools=[tool], parallel_tool_calls=False))
    assert re.fullmatch(r"\*\*\* Begin Patch\n(\+[a-z]\n){1,3}\*\*\* End Patch", call.input)


def test_text_is_free(server) -> None:
    for form in ({"format": {"type": "text"}}, {"format": None}, {}):
        server.model.reply = "</think>\n\n" + markup("shell", input="any <thing>\n at all")
        (call,) = calls(ask(server, tools=[{"type": "custom", "name": "shell", **form}]))
        assert call.input == "any <thing>\n at all"


@STREAMED
@pytest.mark.parametrize("thinking", [True, False])
def test_a_forced_call_has_a_text(server, streamed: bool, thinking: bool) -> None:
    """The model would call without an input."""
    tool = {"type": "custom", "name": "shell"}
    for choice in ("required", {"type": "custom", "name": "shell"}):
        options = script(server, thinking, True, block("shell", "") + "ls</｜DSML｜parameter>" * 9)
        asked = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 400}
        assert not {call.input for call in calls(output(server, streamed, **asked, **options))} & {"", "{}"}


def test_free_text_is_seen_to_where_calls_are_constrained() -> None:
    tools = [{"type": "custom", "name": "shell"}, WEATHER]
    for fields, strict in (({}, False), ({"tool_choice": "required"}, True), ({"parallel_tool_calls": False}, True)):
        structure = RESPONSES.structure({"tools": tools, **fields})
        assert [tool.strict for tool in structure.tools] == [strict, False]


@STREAMED
def test_a_free_call_without_a_text_has_one_all_the_same(server, streamed: bool) -> None:
    number, other = parameter("input", "[5, 6]", text=False), parameter("command", "ls", text=True)
    for written, wanted in ((number, "[5, 6]"), ("", ""), (other, '{"command": "ls"}')):
        server.model.reply = "</think>\n\n" + block("shell", written)
        (call,) = calls(output(server, streamed, tools=[{"type": "custom", "name": "shell"}]))
        assert call.input == wanted


@pytest.mark.parametrize(("form", "place", "words"), [
    ({"type": "grammar", "syntax": "bnf", "definition": "x"}, "syntax", "lark and regex"),
    ({"type": "grammar", "syntax": "lark"}, "definition", "text of a grammar"),
    ({"type": "sometimes"}, "type", "text and grammar"),
    ({"type": "grammar", "syntax": "lark", "definition": "start: missing"}, "definition", "1(8): unknown name"),
    ({"type": "grammar", "syntax": "lark", "definition": "start: <[5]>"}, "definition", "names tokens"),
    ({"type": "grammar", "syntax": "lark", "definition": 'start: "x" } other: {'}, "definition", "expecting rule"),
    ({"type": "grammar", "syntax": "lark", "definition": 'start: %json {"type": "object"}'}, "definition", "%json"),
    ({"type": "grammar", "syntax": "lark", "definition": ""}, "definition", "Empty"),
    ({"type": "grammar", "syntax": "regex", "definition": "a(b"}, "definition", "regex"),
    ({"type": "grammar", "syntax": "regex", "definition": "a(?=b)"}, "definition", "look-around"),
])  # fmt: skip
def test_a_format_that_cannot_be_had_is_refused_with_its_place(server, form: Any, place: str, words: str) -> None:
    tool = {"type": "custom", "name": "shell", "format": form}
    space = {"type": "namespace", "name": "n", "description": "d", "tools": [WEATHER, tool]}
    for tools, where in (([WEATHER, tool], "tools[1]"), ([space], "tools[0].tools[1]")):
        param, message = refused(server, tools=tools)
        assert param == f"{where}.format.{place}" and words in message
    assert refused(server, tools=[tool | {"format": "text"}])[0] == "tools[0].format"


def test_a_long_chain_of_rules_does_not_reach_the_parser() -> None:
    """llguidance follows it on the stack, and would take the process with it."""
    chain = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(9000)) + '\nr9000: "x"'
    with pytest.raises(RequestError, match="the grammar has 9002 rules; allowed: 1000") as error:
        check_formats(json.loads(json.dumps([custom("shell", chain)])))
    assert error.value.param == "tools[0].format.definition"
