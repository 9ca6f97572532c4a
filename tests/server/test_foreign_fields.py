"""Fields of another API, or of another server: done where they can be, refused with a hint where not."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4.engine import SamplingParams

CHAT, MESSAGES, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"
CHATS = (CHAT, MESSAGES, RESPONSES)
USER = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    MESSAGES: {"messages": USER, "max_tokens": 20},
    RESPONSES: {"input": "x"},
    COMPLETIONS: {"prompt": "x"},
}


def post(server: Any, path: str, **fields: Any) -> Any:
    return server.http().post(path, json={"model": "tiny"} | BODIES[path] | fields)


@pytest.fixture
def seen(server: Any, monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """Sampling parameters that reached the engine."""
    params: list[SamplingParams] = []
    stream = server.engine.stream
    monkeypatch.setattr(
        server.engine, "stream", lambda ids, given, user: params.append(given) or stream(ids, given, user)
    )
    return params


@pytest.mark.parametrize("path", BODIES)
def test_a_seed_counts_in_every_api(server: Any, seen: list[SamplingParams], path: str) -> None:
    for seed in (7, 7, 8, None):
        assert post(server, path, seed=seed).status_code == 200
    first, second, third, last = [params.seed for params in seen]
    assert first == second != third and None not in (first, third) and last is None
    for wrong in (-1, 1.5, "7", 1 << 63):
        refused = post(server, path, seed=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "seed", refused.text


def test_the_most_tokens_may_have_another_apis_name(server: Any, seen: list[SamplingParams]) -> None:
    for path in (CHAT, RESPONSES, COMPLETIONS):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            assert post(server, path, **{name: 6}).status_code == 200
            assert seen[-1].max_tokens == 6, (path, name)
    assert post(server, RESPONSES, max_output_tokens=5, max_tokens=9).status_code == 200
    assert seen[-1].max_tokens == 5


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": False}}, False),
        ({"output_config": {"effort": "none"}}, False),
        ({"enable_thinking": False}, False),
    ],
)
def test_thinking_is_switched_in_every_spelling(server: Any, path: str, fields: dict[str, Any], thinks: bool) -> None:
    assert post(server, path, **fields).status_code == 200
    prompt = server.engine.llm.tokenizer.decode(server.model.prompts[-1])
    assert prompt.endswith("<think>") is thinks, prompt


def test_own_switches_count_before_those_of_others(server: Any) -> None:
    for path, fields in (
        (CHAT, {"reasoning_effort": "high", "reasoning": {"effort": "none"}}),
        (MESSAGES, {"thinking": {"type": "enabled"}, "reasoning_effort": "none"}),
        (RESPONSES, {"reasoning": {"effort": "high"}, "thinking": {"type": "disabled"}}),
    ):
        assert post(server, path, **fields).status_code == 200
        assert server.engine.llm.tokenizer.decode(server.model.prompts[-1]).endswith("<think>"), path


@pytest.mark.parametrize(
    ("path", "fields", "place", "hint"),
    [
        (CHAT, {"stop_sequences": ["a"]}, "stop_sequences", "`stop`"),
        (CHAT, {"instructions": "be kind"}, "instructions", "role system"),
        (CHAT, {"previous_response_id": "a"}, "previous_response_id", "`messages`"),
        (CHAT, {"text": {"format": {"type": "json_object"}}}, "text.format", "`response_format`"),
        (CHAT, {"reasoning": "high"}, "reasoning", "an object"),
        (MESSAGES, {"repetition_penalty": 1.2}, "repetition_penalty", "not implemented"),
        (MESSAGES, {"stop_token_ids": [1]}, "stop_token_ids", "strings only"),
        (MESSAGES, {"functions": [{"name": "f"}]}, "functions", "`tools`"),
        (MESSAGES, {"reasoning_effort": 3}, "reasoning_effort", "a text"),
        (MESSAGES, {"continue_final_message": True}, "continue_final_message", "`prefix` in Chat Completions"),
        (RESPONSES, {"thinking": True}, "thinking", "disabled"),
        (RESPONSES, {"system": "be kind"}, "system", "`instructions`"),
        (RESPONSES, {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format", "`text.format`"),
        (RESPONSES, {"mirostat": 2}, "mirostat", "not implemented"),
        (COMPLETIONS, {"thinking": {"type": "enabled"}}, "thinking", "Chat Completions"),
        (COMPLETIONS, {"reasoning_effort": "high"}, "reasoning_effort", "Chat Completions"),
        (COMPLETIONS, {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs", "Chat Completions"),
        (COMPLETIONS, {"messages": USER}, "messages", "Chat Completions"),
    ],
)
def test_the_rest_is_refused_with_a_hint(server: Any, path: str, fields: dict[str, Any], place: str, hint: str) -> None:
    refused = post(server, path, **fields)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == place and hint in error["message"], refused.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allowed_token_ids", [5, 6]),
        ("chat_template", "{{x}}"),
        ("add_generation_prompt", False),
        ("documents", [{"text": "d"}]),
        ("stop_regex", "a+"),
        ("min_new_tokens", 50),
        ("custom_logit_processor", "x"),
        ("lora_path", "x"),
    ],
)
def test_what_would_change_the_answer_on_other_servers_is_refused(
    server: Any, path: str, name: str, value: object
) -> None:
    refused = post(server, path, **{name: value})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == name and name in error["message"], refused.text


@pytest.mark.parametrize("path", CHATS)
def test_several_candidates_are_refused_but_in_completions(server: Any, path: str) -> None:
    refused = post(server, path, best_of=5)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "best_of", refused.text
    assert post(server, path, best_of=1).status_code == 200
    assert post(server, COMPLETIONS, best_of=2).status_code == 200


def test_a_completion_is_not_told_to_call_tools(server: Any) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        refused = post(server, COMPLETIONS, tool_choice=choice)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice", refused.text
    for choice in ("none", "auto", None):
        assert post(server, COMPLETIONS, tool_choice=choice).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_nobody_knows_have_no_effect(server: Any, path: str) -> None:
    quiet = {"dsh_session_log": 1, "text": {"format": {"type": "text"}}, "functions": [], "modalities": ["text"]}
    quiet |= {"add_generation_prompt": True, "documents": [], "chat_template": None, "best_of": None}
    quiet |= {"thinking": {"type": "disabled"}, "reasoning_effort": "none", "repetition_penalty": 1.0, "seed": None}
    assert post(server, path, **quiet).status_code == 200
