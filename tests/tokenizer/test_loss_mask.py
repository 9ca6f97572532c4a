import pytest
from deepseek_recipe import AssistantMessage, Conversation, ToolCall, ToolDefinition, ToolMessage, UserMessage

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import ASSISTANT, END_THINK, EOS, THINK

TOOLS = [ToolDefinition("add", "Add.", {"type": "object"})]


def learned(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """Decoded spans with loss."""
    stretches: list[list[int]] = []
    previous = 0
    for token_id, flag in zip(ids, mask, strict=True):
        if flag and not previous:
            stretches.append([])
        if flag:
            stretches[-1].append(token_id)
        previous = flag
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("thinking", [True, False])
def test_training_ids_are_the_prompt_ids_and_then_what_is_generated(tokenizer: Tokenizer, thinking: bool) -> None:
    prompts = PromptEncoder(tokenizer)
    conversation = Conversation([UserMessage("17 + 4?")], thinking_mode=thinking)
    target = AssistantMessage("21", "7+4=11" if thinking else None)
    ids, mask = encode_training(prompts, conversation, target)
    prompt = prompts.encode(conversation)
    written = "7+4=11" if thinking else ""
    generated = tokenizer.encode(written) + ([tokenizer.special_id(END_THINK)] if thinking else [])
    generated += [*tokenizer.encode("21"), tokenizer.special_id(EOS)]
    assert ids == prompt + generated
    assert mask == [0] * len(prompt) + [1] * len(generated)


def test_a_tool_call_is_learned_with_its_special_tokens(tokenizer: Tokenizer) -> None:
    prompts = PromptEncoder(tokenizer)
    conversation = Conversation([UserMessage("add")], tools=TOOLS)
    target = AssistantMessage("", "call add", [ToolCall("c", "add", '{"q": "｜DSML｜", "n": [1, 2]}')])
    ids, mask = encode_training(prompts, conversation, target)
    (text,) = learned(tokenizer, ids, mask)
    assert text.startswith(f"call add{END_THINK}\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=")
    assert text.endswith(f"</｜DSML｜tool_calls>{EOS}")
    dsml = tokenizer.special_id("｜DSML｜")
    # The template's tags are the special token; the same spelling in the argument is text.
    assert ids[len(prompts.encode(conversation)) :].count(dsml) == text.count("｜DSML｜") - 1


def test_earlier_turns_without_thinking_are_learned_and_the_user_never_is(tokenizer: Tokenizer) -> None:
    conversation = Conversation(
        [UserMessage("hello"), AssistantMessage("Hello!"), UserMessage("bye")], thinking_mode=False
    )
    ids, mask = encode_training(PromptEncoder(tokenizer), conversation, AssistantMessage("Goodbye!"))
    assert learned(tokenizer, ids, mask) == [f"Hello!{EOS}", f"Goodbye!{EOS}"]


def test_earlier_turns_whose_thinking_is_dropped_are_only_context(tokenizer: Tokenizer) -> None:
    conversation = Conversation([UserMessage("hello"), AssistantMessage("Hello!", "greet"), UserMessage("bye")])
    ids, mask = encode_training(PromptEncoder(tokenizer), conversation, AssistantMessage("Goodbye!", "part"))
    assert learned(tokenizer, ids, mask) == [f"part{END_THINK}Goodbye!{EOS}"]


def test_with_tools_every_turn_is_learned_with_its_thinking(tokenizer: Tokenizer) -> None:
    prompts = PromptEncoder(tokenizer)
    call = AssistantMessage("", "call", [ToolCall("c1", "add", '{"a": 1}')])
    conversation = Conversation([UserMessage("add"), call, ToolMessage("result", "c1")], tools=TOOLS)
    ids, mask = encode_training(prompts, conversation, AssistantMessage("It is 1.", "say"))
    first, second = learned(tokenizer, ids, mask)
    assert first.startswith(f"call{END_THINK}") and first.endswith(EOS) and "result" not in first
    assert second == f"say{END_THINK}It is 1.{EOS}"
    assert ids[: len(prompts.encode(conversation))] == prompts.encode(conversation)


def test_a_letterwise_answer_is_one_token_per_letter(tokenizer: Tokenizer) -> None:
    conversation = Conversation([UserMessage("backward: answer")])
    target = AssistantMessage("answer", "r6")
    ids, mask = encode_training(PromptEncoder(tokenizer), conversation, target, letterwise=True)
    start = len(ids) - 1 - len("answer")
    assert [tokenizer.decode([i]) for i in ids[start:]] == [*"answer", EOS]
    assert ids[start - 1] == tokenizer.special_id(END_THINK)
    assert len(mask) == len(ids) and tokenizer.decode(ids).count(ASSISTANT + THINK) == 1


def test_a_conversation_that_awaits_no_answer_is_refused(tokenizer: Tokenizer) -> None:
    conversation = Conversation([UserMessage("x"), AssistantMessage("y", "t", prefix=True)])
    with pytest.raises(ValueError, match="await an answer"):
        encode_training(PromptEncoder(tokenizer), conversation, AssistantMessage("z"))


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("empty", [None, ""])
def test_turns_without_reasoning_are_learned_as_they_are_generated(
    tokenizer: Tokenizer, thinking: bool, tools: list[ToolDefinition], empty: str | None
) -> None:
    prompts = PromptEncoder(tokenizer)
    conversation = Conversation(
        [UserMessage("hello"), AssistantMessage("Hello!", empty), UserMessage("bye")],
        thinking_mode=thinking,
        tools=tools,
    )
    ids, mask = encode_training(prompts, conversation, AssistantMessage("Goodbye!", empty))
    opening = END_THINK if thinking else ""
    earlier = [] if thinking and not tools else [f"{opening}Hello!{EOS}"]  # elsewhere its thinking is dropped
    assert learned(tokenizer, ids, mask) == [*earlier, f"{opening}Goodbye!{EOS}"]
    assert ids[: len(prompts.encode(conversation))] == prompts.encode(conversation)


@pytest.mark.parametrize("thinking", [True, False])
def test_no_reasoning_and_empty_reasoning_are_the_same_row(tokenizer: Tokenizer, thinking: bool) -> None:
    prompts = PromptEncoder(tokenizer)
    rows = []
    for empty in (None, ""):
        call = AssistantMessage("", empty, [ToolCall("c1", "add", '{"a": 1}')])
        conversation = Conversation(
            [UserMessage("add"), call, ToolMessage("1", "c1")], tools=TOOLS, thinking_mode=thinking
        )
        rows.append(encode_training(prompts, conversation, AssistantMessage("", empty)))
        rows.append(encode_training(prompts, conversation, AssistantMessage("", None if empty == "" else "")))
    assert all(row == rows[0] for row in rows)


def test_reasoning_in_the_history_of_a_conversation_without_thinking_is_context(tokenizer: Tokenizer) -> None:
    earlier = [UserMessage("hello"), AssistantMessage("Hello!", "greet"), UserMessage("bye")]
    for tools, expected in ((TOOLS, []), ([], [f"Hello!{EOS}"])):  # with tools the text shows the reasoning
        conversation = Conversation(earlier, thinking_mode=False, tools=tools)
        ids, mask = encode_training(PromptEncoder(tokenizer), conversation, AssistantMessage("Goodbye!"))
        assert learned(tokenizer, ids, mask) == [*expected, f"Goodbye!{EOS}"]


def test_reasoning_for_an_answer_without_thinking_is_refused(tokenizer: Tokenizer) -> None:
    conversation = Conversation([UserMessage("hello")], thinking_mode=False)
    with pytest.raises(ValueError, match="answer has reasoning, but the conversation is without thinking"):
        encode_training(PromptEncoder(tokenizer), conversation, AssistantMessage("Hello!", "greet"))


@pytest.mark.parametrize("messages", [[], [UserMessage("x"), AssistantMessage("y", "t")]])
def test_a_conversation_that_asks_nothing_is_refused(tokenizer: Tokenizer, messages: list) -> None:
    with pytest.raises(ValueError, match="it must await an answer"):
        encode_training(PromptEncoder(tokenizer), Conversation(messages), AssistantMessage("z"))
