"""Changes and notes for every language: what is migrated parses, says the same, and needs no second migration."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.migration.files import SourceFile
from dsv4.migration.plan import FilePlan, plan_file
from dsv4.migration.rules import TARGETS, Wishes
from dsv4.migration.syntax import Syntax

LANGUAGES = ("python", "javascript", "typescript", "go", "java", "json", "yaml", "toml", "bash")
OFF = {"thinking": {"type": "disabled"}}


def plan(text: str, language: str, **wishes: Any) -> FilePlan:
    return plan_file(SourceFile(Path("x"), language, text), Wishes(**wishes))


def migrated(text: str, language: str, **wishes: Any) -> str:
    """The new text, which must need no further change."""
    new = plan(text, language, **wishes).new_text
    assert plan(new, language, **wishes).changes == []
    return new


def rules(found: FilePlan) -> list[str]:
    return [finding.rule for _, finding in found.notes]


@pytest.mark.parametrize(
    ("language", "old", "new"),
    [
        ("python", 'MODEL = "deepseek-reasoner"\n', 'MODEL = "deepseek-flash"\n'),
        ("python", "M = f'deepseek-chat' or r'deepseek-coder'", "M = f'deepseek-flash' or r'deepseek-flash'"),
        ("javascript", "const m = `deepseek-chat`;", "const m = `deepseek-flash`;"),
        ("typescript", "const m: string = 'deepseek-reasoner'", "const m: string = 'deepseek-flash'"),
        ("go", 'Model: "deepseek-chat",', 'Model: "deepseek-flash",'),
        ("java", '.model("deepseek-reasoner")', '.model("deepseek-flash")'),
        ("json", '{"models": ["deepseek-chat"]}', '{"models": ["deepseek-flash"]}'),
        ("yaml", "model: deepseek-chat\nother: 'deepseek-chat'\n", "model: deepseek-flash\nother: 'deepseek-flash'\n"),
        ("yaml", "model: deepseek/deepseek-chat\n", "model: deepseek/deepseek-flash\n"),
        ("toml", 'model = "deepseek-chat"', 'model = "deepseek-flash"'),
        ("bash", "MODEL=deepseek-chat\r\n", "MODEL=deepseek-flash\r\n"),
        ("bash", "M=${MODEL:-deepseek-chat}", "M=${MODEL:-deepseek-flash}"),
        ("bash", "run --model=deepseek-chat", "run --model=deepseek-flash"),
    ],
)  # fmt: skip
def test_retired_ids_are_replaced(language: str, old: str, new: str) -> None:
    assert migrated(old, language) == new


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", '"""About deepseek-chat."""\nx = 1  # deepseek-reasoner\n'),
        ("javascript", "// deepseek-chat\n/* deepseek-chat */"),
        ("yaml", "# deepseek-chat\nmodel: deepseek-chat-v3-0324\n"),
        ("bash", "cat models/deepseek-chat/config deepseek-chat.json my-deepseek-chat  # deepseek-chat\n"),
        ("json", '{"model": "deepseek-v4-pro", "url": "https://api.deepseek.com/v1"}'),
        ("python", "deepseek = 3 - chat\n"),
    ],
)
def test_comments_and_other_names_stay(language: str, text: str) -> None:
    found = plan(text, language)
    assert found.changes == [] and found.notes == []


@pytest.mark.parametrize("model", TARGETS)
def test_the_model_is_the_users_choice(model: str) -> None:
    assert migrated("M='deepseek-chat'", "bash", model=model) == f"M='{model}'"


def test_a_python_request_is_told_not_to_think() -> None:
    """In a call through extra_body, in a body as a field; on a line of its own where the request has lines."""
    text = """
client.chat.completions.create(model="deepseek-chat", messages=[{"role": "user", "content": "a, (b"}], stream=True)
client.chat.completions.create(
    model="deepseek-chat",  # cheap
    messages=messages,
)
post(url, json={"model": "deepseek-chat", "messages": messages})
client.chat.completions.create(model="deepseek-reasoner", messages=messages)
client.completions.create(model="deepseek-chat", prompt=code, suffix="}")
"""
    new = migrated(text, "python")
    calls = [node for node in ast.walk(ast.parse(new)) if isinstance(node, ast.Call)]
    extra = [ast.literal_eval(word.value) for call in calls for word in call.keywords if word.arg == "extra_body"]
    assert extra == [OFF, OFF]
    assert 'json={"model": "deepseek-flash", "thinking": {"type": "disabled"}, "messages"' in new
    assert '    model="deepseek-flash",\n    extra_body={"thinking": {"type": "disabled"}},  # cheap\n' in new
    assert new.count("disabled") == 3, "neither the reasoner nor the completion is told"


def test_what_a_request_says_about_thinking_stays() -> None:
    said = 'create(model="deepseek-chat", messages=m, extra_body={"thinking": {"type": "enabled"}})'
    assert plan(said, "python").new_text.count("thinking") == 1
    other = plan('create(model="deepseek-chat", messages=m, extra_body={"user_id": "u"})', "python")
    assert len(other.changes) == 1 and rules(other) == ["thinking"]


def test_javascript_objects() -> None:
    text = "await ai.create({\r\n  model: 'deepseek-chat',\r\n  messages,\r\n});\r\n"
    text += "f({ 'model': 'deepseek-chat', messages: m })"
    new = migrated(text, "javascript")
    assert "  model: 'deepseek-flash',\r\n  thinking: { type: \"disabled\" },\r\n  messages,\r\n" in new
    assert '\'model\': \'deepseek-flash\', "thinking": {"type": "disabled"}, messages: m' in new


def test_json_stays_json() -> None:
    old = {"model": "deepseek-chat"}
    messages = {"messages": [{"role": "user", "content": '"}],'}]}
    first, second = json.loads(migrated(json.dumps([old | messages, old]), "json"))
    assert first == {"model": "deepseek-flash", **OFF, **messages}
    assert second == {"model": "deepseek-flash"}


@pytest.mark.parametrize(
    ("language", "before", "after"),
    [("bash", "curl -d '", "'"), ("go", "var b = `", "`"), ("go", 'var b = "', '"'), ("java", 'String b = "', '";')],
)
def test_json_in_a_string_is_a_request_too(language: str, before: str, after: str) -> None:
    body = '{"model": "deepseek-chat", "messages": []}'
    escaped = before.endswith('"')
    text = before + (body.replace('"', '\\"') if escaped else body) + after
    new = migrated(text, language)
    inner = new[len(before) : len(new) - len(after)]
    assert json.loads(inner.replace('\\"', '"')) == {"model": "deepseek-flash", **OFF, "messages": []}


def test_ids_of_openrouter_are_left_to_the_user() -> None:
    text = 'create(base_url="https://openrouter.ai/api/v1", model="deepseek/deepseek-chat", messages=m)'
    found = plan(text, "python")
    assert found.changes == [] and rules(found) == ["retired-id"]


def test_base_urls() -> None:
    text = 'A = "https://api.deepseek.com/v3.1_terminus_expires_on_20251015"\nB = "https://api.deepseek.com/v1"\n'
    text += (
        'C = "https://api.deepseek.com"\nD = "https://api.deepseek.com/anthropic"\nE = "https://api.deepseek.com.cn"\n'
    )
    assert migrated(text, "python") == text.replace("/v3.1_terminus_expires_on_20251015", "")
    lines = migrated(text, "python", base_url="http://127.0.0.1:8000").splitlines()
    assert [line.partition('"')[2] for line in lines] == [
        'http://127.0.0.1:8000"',
        'http://127.0.0.1:8000/v1"',
        'http://127.0.0.1:8000"',
        'http://127.0.0.1:8000/anthropic"',
        'https://api.deepseek.com.cn"',
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('create(model="deepseek-reasoner", messages=m, temperature=0.5)', "no-effect"),
        ('create(model="deepseek-v4-pro", messages=m, presence_penalty=1)', "no-effect"),
        ('create(model="deepseek-reasoner", messages=m, tool_choice="required")', "tool-choice"),
        ('create(model="deepseek-reasoner", messages=m, max_tokens=8_192)', "max-tokens"),
        ('create(model="deepseek-v4-pro", messages=m, max_tokens=400000)', "max-tokens"),
        ('deepseek({"role": "assistant", "content": "a", "prefix": True})', "prefix"),
        ('del message["reasoning_content"]', "reasoning-content"),
        ('message.pop("reasoning_content", None)', "reasoning-content"),
        ('create(model="deepseek-v4-pro", prompt=p, suffix=s)', "fim"),
        ('llm = ChatOpenAI(model="deepseek-chat")', "thinking"),
    ],
)
def test_what_a_person_has_to_decide_is_a_note(text: str, rule: str) -> None:
    assert rules(plan(text, "python")) == [rule]


@pytest.mark.parametrize(
    "text",
    [
        'create(model="deepseek-reasoner", messages=m, max_tokens=64000, tool_choice="auto")',
        'create(model="gpt-5.5", messages=m, presence_penalty=1, max_tokens=900000)',
        '# del message["reasoning_content"]',
    ],
)
def test_what_stays_right_is_no_note(text: str) -> None:
    assert plan(text, "python").notes == []


PIECES = st.sampled_from(
    [*"()[]{},:='\"`\\\n \t#/$😀", '"""', "//", "/*", "*/", "model", '"model"', "messages", "deepseek-chat", "thinking"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join), st.sampled_from(LANGUAGES))
def test_any_text_can_be_migrated(text: str, language: str) -> None:
    """Units cover the text in order; only ids change and switches are added."""
    syntax = Syntax(text, language)
    for unit, following in zip(syntax.units, syntax.units[1:], strict=False):
        assert unit.end <= following.start
    assert all(text[unit.start : unit.end] == unit.text for unit in syntax.units)
    found = plan("deepseek" + text, language)
    removed = len(found.source.text) - sum(change.end - change.start for _, change in found.changes)
    added = sum(len(change.new or "") for _, change in found.changes)
    assert len(found.new_text) == removed + added
