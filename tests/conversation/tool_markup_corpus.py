"""Answers with tool markup as models have written it: (name, answer, expected text, expected calls)."""

from __future__ import annotations

from typing import Any

M = "｜DSML｜"
TOOLS: dict[str, dict[str, Any]] = {
    "weather": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}},
    "run": {"arguments": {"type": "object"}},
    "now": {},
}
Case = tuple[str, str, str, list[tuple[str, dict[str, Any]]]]


def invoke(body: str, name: str = "weather") -> str:
    return f'<{M}invoke name="{name}">\n{body}\n</{M}invoke>'


def block(*invokes: str) -> str:
    return "\n".join([f"<{M}tool_calls>", *invokes, f"</{M}tool_calls>"])


def parameter(name: str, value: str, string: str | None = "true") -> str:
    attribute = "" if string is None else f' string="{string}"'
    return f'<{M}parameter name="{name}"{attribute}>{value}</{M}parameter>'


OPEN = f'<{M}tool_calls>\n<{M}invoke name="weather">\n'
PARIS = parameter("city", "Paris")
CITY = ("weather", {"city": "Paris"})
BIG = 123456789012345678901234567890

UNDERSTOOD: list[Case] = [
    ("a backslash in a name", block(invoke(parameter("a\\q", "1", "false"))), "", [("weather", {"a\\q": 1})]),
    ("a backslash in a JSON name", block(invoke('{"a\\\\q": 1}')), "", [("weather", {"a\\q": 1})]),
    ("a tab in a JSON name", block(invoke('{"a\\tq": 1}')), "", [("weather", {"a\tq": 1})]),
    ("a space in a name", block(invoke(parameter("first name", "1", "false"))), "", [("weather", {"first name": 1})]),
    ("a call", block(invoke(PARIS)), "", [CITY]),
    (
        "two values",
        block(invoke(PARIS + "\n" + parameter("days", "3", "false"))),
        "",
        [("weather", {"city": "Paris", "days": 3})],
    ),
    ("two calls", block(invoke(PARIS), invoke(parameter("city", "Rome"))), "", [CITY, ("weather", {"city": "Rome"})]),
    ("no arguments", block(f'<{M}invoke name="now">\n</{M}invoke>'), "", [("now", {})]),
    ("blank body", block(invoke("", "now")), "", [("now", {})]),
    ("text before", "I look.\n\n" + block(invoke(PARIS)), "I look.", [CITY]),
    ("a tool nobody offered", block(invoke(PARIS, "nope")), "", [("nope", {"city": "Paris"})]),
    (
        "an object",
        block(invoke(parameter("more", '{"a": [1, {"b": null}]}', "false"))),
        "",
        [("weather", {"more": {"a": [1, {"b": None}]}})],
    ),
    (
        "markup-like text",
        block(invoke(parameter("city", "a < b > c & <tool_calls>"))),
        "",
        [("weather", {"city": "a < b > c & <tool_calls>"})],
    ),
    ("lines in a value", block(invoke(parameter("city", "one\ntwo\n"))), "", [("weather", {"city": "one\ntwo\n"})]),
    (
        "JSON in an invoke",
        block(invoke('{"city": "Paris", "days": 3}')),
        "",
        [("weather", {"city": "Paris", "days": 3})],
    ),
    ("fenced JSON", block(invoke('```json\n{"city": "Paris"}\n```')), "", [CITY]),
    ("JSON without arguments", block(invoke("{}", "now")), "", [("now", {})]),
    (
        "JSON of an object",
        block(invoke('{"more": {"city": "x", "n": [1, 2]}, "days": 1}')),
        "",
        [("weather", {"more": {"city": "x", "n": [1, 2]}, "days": 1})],
    ),
    ("no string attribute, text", block(invoke(parameter("city", "Paris", None))), "", [CITY]),
    ("no string attribute, number", block(invoke(parameter("days", "3", None))), "", [("weather", {"days": 3})]),
    (
        "no string attribute, number for text",
        block(invoke(parameter("city", "75001", None))),
        "",
        [("weather", {"city": "75001"})],
    ),
    (
        "no string attribute, unknown name",
        block(invoke(parameter("zip", "75001", None))),
        "",
        [("weather", {"zip": 75001})],
    ),
    ("string maybe", block(invoke(parameter("city", "Paris", "maybe"))), "", [CITY]),
    (
        "no JSON where JSON is said",
        block(invoke(parameter("days", "three", "false"))),
        "",
        [("weather", {"days": "three"})],
    ),
    ("NaN", block(invoke(parameter("days", "NaN", "false"))), "", [("weather", {"days": "NaN"})]),
    (
        "other order of attributes",
        block(invoke(f'<{M}parameter string="true" name="city">Paris</{M}parameter>')),
        "",
        [CITY],
    ),
    ("wrapped", block(invoke(parameter("arguments", '{"city": "Paris"}', "false"))), "", [CITY]),
    ("wrapped in a text", block(invoke(parameter("arguments", '{"city": "Paris"}', "true"))), "", [CITY]),
    (
        "wrapped JSON",
        block(invoke('{"arguments": {"city": "Paris", "days": 2}}')),
        "",
        [("weather", {"city": "Paris", "days": 2})],
    ),
    ("wrapped with its name", block(invoke('{"name": "weather", "arguments": {"city": "Paris"}}')), "", [CITY]),
    ("wrapped as input", block(invoke('{"input": {"city": "Paris"}}')), "", [CITY]),
    (
        "a tool that has arguments",
        block(invoke(parameter("arguments", '{"x": 1}', "false"), "run")),
        "",
        [("run", {"arguments": {"x": 1}})],
    ),
    (
        "inner names nobody knows",
        block(invoke('{"arguments": {"town": "Paris"}}')),
        "",
        [("weather", {"arguments": {"town": "Paris"}})],
    ),
    ("a long integer", block(invoke(parameter("days", str(BIG), "false"))), "", [("weather", {"days": BIG})]),
    ("a long integer in JSON", block(invoke(f'{{"days": {BIG}}}')), "", [("weather", {"days": BIG})]),
    ("a value twice", block(invoke(PARIS + parameter("city", "Rome"))), "", [("weather", {"city": "Rome"})]),
    ("no block around", "hello " + invoke(PARIS), "hello", [CITY]),
    ("no end of the block", f"<{M}tool_calls>\n" + invoke(PARIS), "", [CITY]),
    ("no end of the call", f'<{M}tool_calls>\n<{M}invoke name="weather">\n{PARIS}\n</{M}tool_calls>', "", [CITY]),
    ("no end at all", f'<{M}tool_calls>\n<{M}invoke name="weather">\n{PARIS}', "", [CITY]),
    (
        "no end of the first",
        f'<{M}tool_calls>\n<{M}invoke name="weather">{PARIS}' + invoke(PARIS) + f"</{M}tool_calls>",
        "",
        [CITY, CITY],
    ),
    ("words beside a call", block("please", invoke(PARIS)), "please", [CITY]),
    ("words beside a value", block(invoke("so: " + PARIS)), "so:", [CITY]),
    (
        "single quotes",
        block(
            f"<{M}invoke name='weather'>\n<{M}parameter name='city' string='true'>Paris</{M}parameter>\n</{M}invoke>"
        ),
        "",
        [CITY],
    ),
    (
        "no quotes",
        block(f"<{M}invoke name=weather>\n<{M}parameter name=city string=true>Paris</{M}parameter>\n</{M}invoke>"),
        "",
        [CITY],
    ),
    ("a call in one tag", block(f'<{M}invoke name="now"/>'), "", [("now", {})]),
    ("another name of the block", f"<{M}function_calls>\n{invoke(PARIS)}\n</{M}function_calls>", "", [CITY]),
    ("spaced tags", f"<{M} calls>\n{invoke(PARIS)}\n</{M} calls>", "", [CITY]),
    ("wrapped in a JSON text", block(invoke('{"arguments": "{\\"city\\": \\"Paris\\"}"}')), "", [CITY]),
    ("a name twice in JSON", block(invoke('{"city": "Rome", "city": "Paris"}')), "", [CITY]),
    ("a bracket in an attribute", block(f'<{M}invoke name="weather" note="a>b">{PARIS}</{M}invoke>'), "", [CITY]),
    (
        "a mark in a value",
        block(invoke(parameter("city", f"a <{M} b <{M}x> c </{M}tool_calls> d"))),
        "",
        [("weather", {"city": f"a <{M} b <{M}x> c </{M}tool_calls> d"})],
    ),
    (
        "a mark in JSON",
        block(invoke(f'{{"city": "a <{M}x> b"}}')),
        "",
        [("weather", {"city": f"a <{M}x> b"})],
    ),
    (
        "a number beyond floats",
        block(invoke(parameter("days", "1e400", "false"))),
        "",
        [("weather", {"days": "1e400"})],
    ),
    (
        "half a character in JSON",
        block(invoke(parameter("more", '{"a": "\\ud800"}', "false"))),
        "",
        [("weather", {"more": {"a": "\ufffd"}})],
    ),
    (
        "escapes in JSON",
        block(invoke(parameter("more", r'{"a": "\ud83d\ude00 \\ud83d \n"}', "false"))),
        "",
        [("weather", {"more": {"a": "\U0001f600 \\ud83d \n"}})],
    ),
    ("half a call, then a whole one", block(f'<{M}invoke name="weather">', invoke(PARIS)), "", [CITY]),
]
TEXT: list[Case] = [
    ("plain", "Nothing here: a < b, <tag>, </x>.", "Nothing here: a < b, <tag>, </x>.", []),
    ("half an opening", "a <｜DS", "a <｜DS", []),
    ("the mark alone", "a ｜DSML｜ b", "a ｜DSML｜ b", []),
    ("words in an invoke", block(invoke("please do it")), "please do it", []),
    ("broken JSON", block(invoke('{"city": ')), '{"city":', []),
    ("an array", block(invoke("[1, 2]")), "[1, 2]", []),
    ("no name", block(f"<{M}invoke>\n{PARIS}\n</{M}invoke>"), "Paris", []),
    ("a value without a name", block(invoke(f"<{M}parameter>Paris</{M}parameter>")), "Paris", []),
    ("a stray end", f"text </{M}tool_calls> more", "text  more", []),
    ("an unknown tag", f"a <{M}foo> b", "a b", []),
    ("an empty block", f"a<{M}tool_calls>\n</{M}tool_calls>", "a", []),
    (
        "a mark in a text",
        f"The mark <{M} begins a call. Then much more: x > y.",
        "The mark begins a call. Then much more: x > y.",
        [],
    ),
    (
        "half a tag in a text",
        f'`<{M}invoke name="f"` is the way.\n\nThe end.',
        '`invoke name="f"` is the way. The end.',
        [],
    ),
    ("a name no tag can hold", block(f"<{M}invoke name='a\"b'>{PARIS}</{M}invoke>"), "Paris", []),
    (
        "half a tag before a value",
        block(invoke(f'{PARIS}\n<{M}parameter name="days string="false">3</{M}parameter>')),
        'Paris parameter name="days string="false">3',
        [],
    ),
    ("more than JSON", block(invoke('{"city": "Paris"} please')), '{"city": "Paris"} please', []),
    ("a value in a value", block(invoke(f'<{M}parameter name="a" string="true">x{parameter("b", "y")}')), "xy", []),
]
# Where the model has stopped in the middle of a call: what there is of its arguments.
STOPPED: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("in a value", f'{OPEN}<{M}parameter name="city" string="true">Par', "", [("weather", '{"city": "Par')]),
    ("in a tag", f'<{M}tool_calls>\n<{M}invoke name="weather">\n<{M}parameter na', "", [("weather", "{")]),
    ("before a value", OPEN, "", [("weather", "{")]),
    (
        "in the end of a value",
        f'{OPEN}<{M}parameter name="city" string="true">Par</{M}para',
        "",
        [("weather", '{"city": "Par')],
    ),
    ("after a value", f"{OPEN}{PARIS}\n<{M}", "", [("weather", '{"city": "Paris"')]),
    (
        "in a second value",
        f'{OPEN}{PARIS}\n<{M}parameter name="days" string="false">12',
        "",
        [("weather", '{"city": "Paris", "days": ')],
    ),
    (
        "in an object that looks whole",
        f'{OPEN}<{M}parameter name="days" string="false">12}}',
        "",
        [("weather", '{"days": ')],
    ),
    (
        "in a value with a mark",
        f'{OPEN}<{M}parameter name="city" string="true">a <{M}! b',
        "",
        [("weather", f'{{"city": "a <{M}! b')],
    ),
    ("in a value whose type the schema says", f'{OPEN}<{M}parameter name="city">7', "", [("weather", '{"city": "7')]),
    ("in JSON", f'{OPEN}{{"city": "Par', "", [("weather", "{")]),
    ("in words", f"{OPEN}please", "", [("weather", "{")]),
    (
        "in a value in a value",
        f'{OPEN}<{M}parameter name="days" string="false">1<{M}parameter name="city">Par',
        "",
        [("weather", "{")],
    ),
    (
        "in a second call",
        f"<{M}tool_calls>\n{invoke(PARIS)}\n" + OPEN.partition("\n")[2] + PARIS.removesuffix(f"</{M}parameter>"),
        "",
        [CITY, ("weather", '{"city": "Paris')],
    ),
    (
        "in a call behind text",
        f"I look.\n\n<{M}tool_calls>\nplease\n" + OPEN.partition("\n")[2],
        "I look. please",
        [("weather", "{")],
    ),
]
