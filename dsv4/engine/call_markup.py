"""CallMarkup: the form in which V4 writes tool calls, taken from deepseek-recipe's rendering of an example."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import cast

from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV4Encoding,
    ToolCall,
    ToolDefinition,
    UserMessage,
)

from dsv4.tokenizer.special import EOS

TOOL, PARAMETER, TEXT, NUMBER = "<T>", "<P>", "<V>", "123454321"  # of the example


@dataclass(frozen=True)
class CallMarkup:
    """Pieces of a block of calls. Each of `begin`, `call_end` and a whole argument ends with a line break.

    block = before begin (tool[0] NAME tool[1] argument* call_end)+ end
    argument = text[0] NAME text[1] VALUE text[2], or the same of `other` around JSON
    """

    before: str  # between an answer's text and the block
    begin: str
    tool: tuple[str, str]
    text: tuple[str, str, str]  # around the name and the value of a string
    other: tuple[str, str, str]  # of any other value
    call_end: str
    end: str

    @classmethod
    @cache
    def of(cls) -> CallMarkup:
        """The pieces. AssertionError if deepseek-recipe no longer writes one tag per line."""
        arguments = json.dumps({PARAMETER: TEXT, f"{PARAMETER}2": int(NUMBER)})
        before, block = _rendered(ToolCall("1", TOOL, arguments))
        lines = block.splitlines(keepends=True)
        assert len(lines) == 6, f"deepseek-recipe writes a call with two arguments as {block!r}"
        begin, tool, text, other, call_end, end = lines
        return cls(
            before,
            begin,
            cast("tuple[str, str]", _cut(tool, TOOL)),
            cast("tuple[str, str, str]", _cut(text, PARAMETER, TEXT)),
            cast("tuple[str, str, str]", _cut(other, f"{PARAMETER}2", NUMBER)),
            call_end,
            end,
        )


def _rendered(call: ToolCall) -> tuple[str, str]:
    """(what precedes the block, the block) of an answer that is one call."""
    answer, end = "<answer>", "<next>"
    conversation = Conversation(
        [UserMessage(""), AssistantMessage(answer, None, [call]), UserMessage(end)],
        tools=[ToolDefinition(TOOL, None, {})],
        thinking_mode=False,
    )
    rendered = DeepseekV4Encoding().render_conversation(conversation).prompt
    written = rendered.partition(answer)[2].partition(EOS)[0]
    block = written.lstrip("\n")
    return written[: len(written) - len(block)], block


def _cut(line: str, *values: str) -> tuple[str, ...]:
    """A line around the values of the example, each of which it has once."""
    pieces: list[str] = []
    for value in values:
        piece, found, line = line.partition(value)
        assert found and value not in line, f"deepseek-recipe no longer writes {value!r} once"
        pieces.append(piece)
    return (*pieces, line)
