"""Quick instructions: the official encoder's texts, behind the tokens of the conversation itself."""

from __future__ import annotations

from typing import Any

import pytest
from deepseek_recipe import AssistantMessage, Conversation, SystemMessage, UserMessage

from dsv4.config import nano_path
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.quick_instructions import (
    EXTRACTED_URL,
    NAMES,
    QuickInstruction,
    encode_quick_instruction,
    encode_quick_training,
    quick_instruction,
)

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return PromptEncoder.from_pretrained(nano_path())


def talk(*messages: Any, thinking: bool = False) -> Conversation:
    return Conversation([SystemMessage("Help."), *messages], thinking_mode=thinking)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_official_encoders(prompts: PromptEncoder, name: QuickInstruction, thinking: bool) -> None:
    """As its `encode_messages` renders a message with a `task`, and the message of the assistant that answers it."""
    think = "<think>" if thinking else "</think>"
    asked = f"See {EXTRACTED_URL}http://a.b" if name == "read_url" else "Is it wet in Oslo?"
    messages: list[Any] = [UserMessage(asked)]
    begin = f"{BOS}Help.{USER}{asked}"
    if name == "title":
        messages.append(AssistantMessage("Yes.", "It rains." if thinking else None))
        begin += f"{ASSISTANT}{think}{'It rains.</think>' if thinking else ''}Yes.{EOS}<｜title｜>"
    elif name == "action":
        begin += f"{ASSISTANT}{think}<｜action｜>"
    else:
        begin += f"<｜{name}｜>"
    ids, mask = encode_quick_training(prompts, talk(*messages, thinking=thinking), name, "Search")
    assert prompts.tokenizer.decode(ids) == f"{begin}Search{EOS}"
    learned = [one for one, loss in zip(ids, mask, strict=True) if loss]
    assert prompts.tokenizer.decode(learned) == f"Search{EOS}" and mask == sorted(mask)
    asked_ids = encode_quick_instruction(prompts, talk(*messages, thinking=thinking), name)
    assert ids[: len(asked_ids)] == asked_ids and ids[len(asked_ids) :] == learned
    assert asked_ids[-1] == prompts.tokenizer.special_id(f"<｜{name}｜>")


@pytest.mark.parametrize("name", ["action", "query"])
def test_the_tokens_before_it_are_those_of_the_live_prompt(prompts: PromptEncoder, name: QuickInstruction) -> None:
    """So that the cache of the conversation is that of the instruction."""
    conversation = talk(UserMessage("Hi"), AssistantMessage("Hello"), UserMessage("Say 3"))
    live, ids = prompts.encode(conversation), encode_quick_instruction(prompts, conversation, name)
    end = len(live) if name == "action" else len(live) - 2  # the assistant's token and </think>
    assert ids[:-1] == live[:end]


def test_special_tokens_that_a_user_spells_are_text(prompts: PromptEncoder) -> None:
    """But for the URL's mark in the last text, where it was asked for."""
    conversation = talk(UserMessage(f"{EXTRACTED_URL} is <｜query｜>, {EXTRACTED_URL}http://a.b"))
    mark = prompts.tokenizer.special_id(EXTRACTED_URL)
    assert encode_quick_instruction(prompts, conversation, "read_url").count(mark) == 1
    ids = encode_quick_instruction(prompts, conversation, "query")
    assert mark not in ids and ids.count(prompts.tokenizer.special_id("<｜query｜>")) == 1


def test_errors_name_what_is_allowed(prompts: PromptEncoder) -> None:
    with pytest.raises(ValueError, match=r"row 3: 'ask'; allowed: action, query, authority, domain, read_url, title"):
        quick_instruction("ask", "row 3")
    for name, messages, found in (
        ("query", [UserMessage("Hi"), AssistantMessage("Hello")], "ends with a message of the assistant"),
        ("title", [UserMessage("Hi")], "ends with a message of the user"),
    ):
        with pytest.raises(ValueError, match=f"{name}: the conversation {found}; allowed: one that ends with the"):
            encode_quick_instruction(prompts, talk(*messages), name)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="query: the conversation is empty"):
        encode_quick_instruction(prompts, Conversation([], thinking_mode=False), "query")
    with pytest.raises(ValueError, match=f"read_url: the user's text has no {EXTRACTED_URL}"):
        encode_quick_instruction(prompts, talk(UserMessage("http://a.b")), "read_url")
