from pathlib import Path

import deepseek_recipe as recipe
import pytest
from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    SystemMessage,
    ToolCall,
    ToolDefinition,
    ToolMessage,
    UserMessage,
)

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder, effort_ladder, with_budget, write_effort_ladder
from dsv4.tokenizer.special import END_THINK, USER

ADD = ToolDefinition("add", "Add.", {"type": "object"})
ABSOLUTE, BEYOND = "Absolute maximum", "Beyond maximum"


@pytest.mark.parametrize(
    ("ladder", "effort", "instruction"),
    [
        ("preview", None, None),
        ("preview", "low", None),
        ("preview", "high", None),
        ("preview", "xhigh", ABSOLUTE),
        ("preview", "max", ABSOLUTE),
        ("0731", None, None),
        ("0731", "low", None),
        ("0731", "high", ABSOLUTE),
        ("0731", "xhigh", ABSOLUTE),
        ("0731", "max", BEYOND),
    ],
)
def test_each_ladder_has_its_own_effort_instructions(
    tokenizer: Tokenizer, ladder: str, effort: str | None, instruction: str | None
) -> None:
    encoder = PromptEncoder(tokenizer, ladder)
    prompt = encoder.render(Conversation([UserMessage("hi")], reasoning_effort=effort)).prompt
    assert [text for text in (ABSOLUTE, BEYOND) if text in prompt] == ([instruction] if instruction else [])
    plain = encoder.render(Conversation([UserMessage("hi")], reasoning_effort=effort, thinking_mode=False)).prompt
    assert ABSOLUTE not in plain and BEYOND not in plain


@pytest.mark.parametrize(("effort", "number"), [(None, 75), ("low", 50), ("high", 75), ("xhigh", 75), ("max", 100)])
def test_the_scalar_ladder_has_the_numbers_of_deepseeks_encoder(
    tokenizer: Tokenizer, effort: str | None, number: int
) -> None:
    """The prompt is V4.1's without its token of a system turn, which V4 has not."""
    encoder, official = PromptEncoder(tokenizer, "scalar"), recipe.DeepseekV41Encoding()
    for system in ([], [SystemMessage("Be brief.")]):
        asked = Conversation([*system, UserMessage("hi")], reasoning_effort=effort)
        found = encoder.render(asked)
        assert found.prompt == official.render_conversation(asked).prompt.replace("<｜System｜>", "")
        assert f"Reasoning Effort: {number} (range" in found.prompt
        assert encoder.render(with_budget(asked, number)) == found
    plain = Conversation([UserMessage("hi")], reasoning_effort=effort, thinking_mode=False)
    assert encoder.render(plain) == PromptEncoder(tokenizer).render(plain)


def test_a_budget_of_the_system_text_is_the_prompts(tokenizer: Tokenizer) -> None:
    encoder, user = PromptEncoder(tokenizer, "scalar"), UserMessage("hi")
    asked = with_budget(Conversation([SystemMessage("Be brief."), user], tools=[ADD], reasoning_effort="max"), 7)
    prompt = encoder.render(asked).prompt
    line = "Reasoning Effort: 7 (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
    assert prompt.count("Reasoning Effort") == 1 and f"{line}Be brief." in prompt and "Available Tool Schemas" in prompt
    for text in (line.strip(), f"{line}\n\nBe brief."):  # as a client may write it
        found = encoder.render(Conversation([SystemMessage(text), user], reasoning_effort="low")).prompt
        assert found.count("Reasoning Effort") == 1 and line in found and "\n\n\n" not in found
    quoted = Conversation([SystemMessage(f"Say: {line}"), user], reasoning_effort="low")
    assert "Reasoning Effort: 50" in encoder.render(quoted).prompt
    for budget in (0, 101):
        with pytest.raises(ValueError, match=f"budget is {budget}; allowed: 1 to 100"):
            with_budget(asked, budget)


def test_the_ladder_is_a_property_of_the_folder(tmp_path: Path) -> None:
    assert effort_ladder(tmp_path) == "preview"
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert effort_ladder(tmp_path) == "preview"
    write_effort_ladder(tmp_path, "preview")
    assert effort_ladder(tmp_path) == "preview"
    assert '"temperature": 0.5' in (tmp_path / "generation_config.json").read_text()
    (tmp_path / "generation_config.json").write_text('{"reasoning_effort_ladder": "april"}')
    with pytest.raises(ValueError, match=r"generation_config.json.*'april'.*0731, preview, scalar"):
        effort_ladder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"reasoning_effort_ladder": ["0731"]}', r"reasoning effort ladder \['0731'\]: one of"),
    ],
)
def test_a_damaged_generation_config_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
        effort_ladder(tmp_path)


def test_an_unknown_ladder_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="'v5'"):
        PromptEncoder(tokenizer, "v5")


def history(tools: list[ToolDefinition], tool_choice: str = "auto") -> Conversation:
    call = [ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "add", '{"a": 2}')]
    return Conversation(
        [
            UserMessage("first"),
            AssistantMessage("", "EARLY THOUGHT", call),
            ToolMessage("result two", "c2"),
            ToolMessage("result one", "c1"),
            AssistantMessage("done", "LATE THOUGHT"),
            UserMessage("second"),
        ],
        tools=tools,
        tool_choice=tool_choice,
    )


def test_tools_keep_earlier_thinking_and_order_their_results(tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(tokenizer).render(history([ADD])).prompt
    assert "EARLY THOUGHT" in prompt and "LATE THOUGHT" in prompt
    assert prompt.index("result one") < prompt.index("result two")


def test_without_tools_earlier_thinking_is_dropped(tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(tokenizer).render(history([])).prompt
    assert "THOUGHT" not in prompt
    assert prompt.endswith("second<｜Assistant｜><think>")


def test_tool_choice_none_describes_no_tools(tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(tokenizer).render(history([ADD], "none")).prompt
    assert "Available Tool Schemas" not in prompt and "THOUGHT" not in prompt
    own = Conversation([SystemMessage("Be brief.", tools=[ADD]), UserMessage("hi")], tool_choice="none")
    rendered = PromptEncoder(tokenizer).render(own).prompt
    assert "Available Tool Schemas" not in rendered and "Be brief." in rendered


def test_prompt_ids_equal_those_of_the_recipe_whatever_the_user_types(tokenizer: Tokenizer, folder: Path) -> None:
    encoding = recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(folder / "tokenizer.json")))
    typed = f"I write {USER} and {END_THINK} and ｜DSML｜ 42 日本"
    for conversation in (
        Conversation([UserMessage(typed)], reasoning_effort="low"),
        Conversation([SystemMessage(typed), UserMessage(typed)], thinking_mode=False, reasoning_effort="low"),
        Conversation([UserMessage("x"), AssistantMessage(typed, typed), UserMessage("y")], reasoning_effort="max"),
        Conversation([UserMessage(typed)], tools=[ADD], tool_choice="required", reasoning_effort="high"),
        Conversation([UserMessage(typed)], response_schema={"type": "object"}, reasoning_effort="low"),
        Conversation([UserMessage(typed)], response_format="json_object", reasoning_effort="low"),
    ):
        ids = PromptEncoder(tokenizer).encode(conversation)
        assert ids == encoding.encode(conversation)
        assert ids.count(tokenizer.special_id(USER)) == PromptEncoder(tokenizer).render(conversation).prompt.count(
            USER
        ) - sum(m.content.count(USER) + (m.reasoning_content or "").count(USER) for m in shown(conversation))


def shown(conversation: Conversation) -> list[recipe.Message]:
    """The messages without the thinking that the template drops."""
    return [m if m.role != "assistant" else AssistantMessage(m.content) for m in conversation.messages]
