"""Requests of the Responses API to a test server, through OpenAI's SDK."""

from __future__ import annotations

from typing import Any

import openai
import pytest

DSML = "<｜DSML｜"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
QUESTION = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather in Oslo?"}]}

# The grammar of Codex's apply_patch.
PATCH = r"""start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""


def markup(name: str, **arguments: str) -> str:
    """A block of one call; arguments are texts."""
    lines = [
        f'{DSML}parameter name="{key}" string="true">{value}</｜DSML｜parameter>' for key, value in arguments.items()
    ]
    return "\n".join(
        [f"{DSML}tool_calls>", f'{DSML}invoke name="{name}">', *lines, "</｜DSML｜invoke>", "</｜DSML｜tool_calls>"]
    )


CALL = "I look it up.</think>\n\n" + markup("weather", city="Oslo")


def ask(server, **options: Any):
    return server.openai().responses.create(**{"model": "tiny", "input": "Hello"} | options)


def events(server, **options: Any) -> list[Any]:
    return list(ask(server, stream=True, **options))


def refused(server, **options: Any) -> tuple[str | None, str]:
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, **options)
    return error.value.param, error.value.body["message"]


def prompt(server) -> str:
    return server.engine.llm.tokenizer.decode(server.model.prompts[-1])


def output(server, streamed: bool, **options: Any):
    """The response object, of the last event where it is streamed."""
    return events(server, **options)[-1].response if streamed else ask(server, **options)


STREAMED = pytest.mark.parametrize("streamed", [True, False])
