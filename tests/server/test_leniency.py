import json

import pytest

from dsv4.server.chat_completions import CHAT
from dsv4.server.errors import RequestError
from dsv4.server.messages import MESSAGES
from dsv4.server.responses import RESPONSES


def chat(**request):
    return json.loads(CHAT.adapted(json.dumps(request).encode()).body)


def messages(**request):
    return json.loads(MESSAGES.adapted(json.dumps(request).encode()).body)


def responses(**request):
    return json.loads(RESPONSES.adapted(json.dumps(request).encode()).body)


def test_role_developer_is_read_as_system() -> None:
    got = chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}])
    assert [message["role"] for message in got["messages"]] == ["system", "user"]


def test_max_completion_tokens_stands_in_for_max_tokens() -> None:
    assert chat(max_completion_tokens=5)["max_tokens"] == 5
    assert chat(max_completion_tokens=5, max_tokens=7)["max_tokens"] == 7


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"chat_template_kwargs": {"thinking": False}}, {"type": "disabled"}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"type": "enabled"}),
        ({"enable_thinking": False}, {"type": "disabled"}),
        ({"enable_thinking": False, "thinking": {"type": "enabled"}}, {"type": "enabled"}),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, None),
        ({"chat_template_kwargs": None, "enable_thinking": None}, None),
    ],
)
def test_thinking_switches_of_other_servers_count_unless_the_request_has_its_own(request_, expected) -> None:
    assert chat(**request_).get("thinking") == expected


def test_effort_of_the_template_arguments_counts() -> None:
    assert chat(chat_template_kwargs={"reasoning_effort": "max"})["reasoning_effort"] == "max"


def test_template_arguments_count_in_messages_and_responses() -> None:
    off, low = {"chat_template_kwargs": {"thinking": False}}, {"chat_template_kwargs": {"reasoning_effort": "low"}}
    assert messages(**off)["thinking"] == {"type": "disabled"}
    assert messages(**low)["output_config"] == {"effort": "low"}
    assert messages(**low, output_config={"effort": "max"})["output_config"] == {"effort": "max"}
    assert messages(**off, thinking={"type": "enabled"})["thinking"] == {"type": "enabled"}
    assert responses(**off)["reasoning"] == {"effort": "none"} == responses(enable_thinking=False)["reasoning"]
    assert responses(**low, reasoning={"summary": "auto"})["reasoning"] == {"summary": "auto", "effort": "low"}
    assert responses(**off, reasoning={"effort": "max"})["reasoning"] == {"effort": "max"}


@pytest.mark.parametrize(("fields", "place"), [
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinking": "yes"}}, "chat_template_kwargs.thinking"),
    ({"chat_template_kwargs": {"reasoning_effort": 5}}, "chat_template_kwargs.reasoning_effort"),
    ({"enable_thinking": 1}, "enable_thinking"),
])  # fmt: skip
@pytest.mark.parametrize("read", [chat, messages, responses])
def test_template_arguments_of_the_wrong_kind_are_refused_with_their_place(read, fields, place: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(**fields)
    assert (refused.value.status, refused.value.param) == (400, place)


def test_reasoning_and_untyped_tool_calls_of_the_history_are_read() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "", "reasoning": "r", "tool_calls": [call]}
    got = chat(messages=[message])["messages"][0]
    assert got["reasoning_content"] == "r" and got["tool_calls"][0]["type"] == "function"
    kept = chat(messages=[{"role": "assistant", "reasoning": "r", "reasoning_content": "own"}])["messages"][0]
    assert kept["reasoning_content"] == "own"
    empty = chat(messages=[{"role": "assistant", "reasoning": "r", "reasoning_content": ""}])["messages"][0]
    assert empty["reasoning_content"] == "r"


def test_a_body_without_changes_keeps_its_bytes() -> None:
    nested = b'{"x": ' * 700 + b"1" + b"}" * 700  # json parses it, but copying it exceeds Python's recursion limit
    for body in (b'{ "model" : "x", "messages": [] }', b"{broken", b"[1]", b"[" * 50_000, nested):
        assert CHAT.adapted(body).body is body and MESSAGES.adapted(body).body is body


def test_custom_tools_are_tools_and_redacted_thinking_is_skipped() -> None:
    got = messages(
        tools=[{"type": "custom", "name": "f"}, {"type": "web_search_20250305", "name": "w"}],
        messages=[
            {"role": "assistant", "content": [{"type": "redacted_thinking"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "redacted_thinking"}]},
        ],
    )
    assert got["tools"] == [{"name": "f"}, {"type": "web_search_20250305", "name": "w"}]
    assert [message["content"] for message in got["messages"]] == [[{"type": "text", "text": "a"}], ""]


def test_the_long_context_suffix_is_dropped() -> None:
    assert chat(model="m[1m]")["model"] == messages(model="m[1m]")["model"] == "m"
