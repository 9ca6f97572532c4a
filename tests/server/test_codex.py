"""Codex's requests, as version 0.171 sends them: shortened texts and schemas, all fields and kinds of items."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.responses_api import PATCH, markup, prompt

SESSION = "01a21f86-5c17-7772-9831-8f98c6590967"


def function(name: str, **properties: str) -> dict[str, Any]:
    shape = {key: {"type": kind, "description": "d"} for key, kind in properties.items()}
    schema = {"type": "object", "properties": shape, "required": list(shape), "additionalProperties": False}
    return {"type": "function", "name": name, "description": "Does it.", "strict": False, "parameters": schema}


def message(role: str, *texts: str) -> dict[str, Any]:
    parts = [{"type": "input_text", "text": text} for text in texts]
    return {"type": "message", "id": f"msg_{role}-{len(texts)}", "role": role, "content": parts}


TOOLS = [
    function("exec_command", cmd="string", max_output_tokens="number"),
    function("write_stdin", session_id="number", chars="string"),
    function("get_goal"),
    {"type": "custom", "name": "apply_patch", "description": "Edits files.",
     "format": {"type": "grammar", "syntax": "lark", "definition": PATCH}},
    {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.",
     "tools": [function("spawn_agent", message="string"), function("close_agent", target="string")]},
    {"type": "web_search", "external_web_access": True},
]  # fmt: skip
BEGINNING = [
    message("developer", "You are a coding agent running in the Codex CLI."),
    message("developer", "<skills_instructions>\n## Skills", "<permissions instructions>\n`danger-full-access`"),
    message("user", "<environment_context>\n  <cwd>/tmp/work</cwd>"),
    message("user", "Which files are here?"),
]


def body(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "tiny",
        "stream": True,
        "input": items,
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": SESSION,
        "client_metadata": {"session_id": SESSION, "x-codex-window-id": f"{SESSION}:0"},
    }


def turn(server, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events of a turn, with the headers that Codex sends."""
    headers = {"accept": "text/event-stream", "accept-encoding": "zstd,gzip", "originator": "codex_exec"}
    headers |= {"x-codex-beta-features": "remote_compaction_v2", "session-id": SESSION, "thread-id": SESSION}
    answer = server.http().post("/v1/responses", json=body(items), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame]
    return [json.loads(data.removeprefix("data: ")) for _, data in frames]


def returned(event: dict[str, Any]) -> dict[str, Any]:
    """An item as Codex sends it back: without status, and without the text of reasoning."""
    dropped = ("status", "content") if event["item"]["type"] == "reasoning" else ("status",)
    return {name: value for name, value in event["item"].items() if name not in dropped}


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "space"),
    [
        ("exec_command", {"cmd": "ls"}, "function_call", None),
        ("multi_agent_v1__spawn_agent", {"message": "Look."}, "function_call", "multi_agent_v1"),
        ("apply_patch", {"input": "*** Begin Patch\n*** Delete File: a.txt\n*** End Patch"}, "custom_tool_call", None),
    ],
)
def test_a_turn_with_a_call_is_continued_exactly(server, name: str, arguments: dict, kind: str, space: str) -> None:
    wrote = "I look.</think>Looking.\n\n" + markup(name, **arguments)
    server.model.reply = wrote
    events = turn(server, BEGINNING)
    assert [events[0]["type"], events[-1]["type"]] == ["response.created", "response.completed"]
    assert events[-1]["response"]["usage"]["total_tokens"] > 0 and events[-1]["response"]["id"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"]["type"] for event in done] == ["reasoning", "message", kind]
    assert done[0]["item"]["summary"] == [] and done[1]["item"]["phase"] == "commentary"
    call = done[2]["item"]
    assert (call["name"], call.get("namespace")) == (name.rpartition("__")[2], space)
    assert kind == "custom_tool_call" or json.loads(call["arguments"]) == arguments
    begun = server.model.prompts[-1] + server.model.tokenizer.encode(wrote)
    output = {"type": f"{kind}_output", "call_id": call["call_id"], "output": "a.txt"}
    # A notice that arrived while the command ran stands between the call and its output.
    notice = message("developer", "<notice>")
    server.model.reply = "Seen.</think>One file."
    events = turn(server, [*BEGINNING, *map(returned, done), notice, output])
    assert events[-1]["response"]["output"][1]["content"][0]["text"] == "One file."
    assert server.model.prompts[-1][: len(begun)] == begun
    assert prompt(server).endswith("<tool_result>a.txt</tool_result>\n\n<notice><｜Assistant｜><think>")


def test_developer_messages_stay_in_their_place(server) -> None:
    """Hoisted to the top, a later one would change the beginning of every prompt."""
    turn(server, BEGINNING)
    turn(server, [*BEGINNING, message("assistant", "Hi."), message("developer", "Be quick."), message("user", "Well?")])
    first, second = (server.engine.llm.tokenizer.decode(ids) for ids in server.model.prompts)
    start = first.removesuffix("<｜Assistant｜><think>")
    assert second.startswith(start) and "Be quick.\n\nWell?" in second[len(start) :]
    assert "web_search" not in second and "multi_agent_v1__close_agent" in second
