"""Quick instructions: a special token behind a live conversation asks for a short text about it (report, Quick
Instruction).

    action                            "Search" or an answer          after the prompt, which awaits an answer
    query, authority, domain          search queries, their sources  right after the user's text
    read_url                          whether to fetch a URL         the same; the text ends with EXTRACTED_URL and it
    title                             the conversation's title       after the assistant's EOS

The tokens before it are those of the conversation, so that it goes on from their cache. The answer has no thinking and
ends with EOS. What the report does not say, the texts of the answers, is the user's.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

from deepseek_recipe import AssistantMessage, Conversation

from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder, with_messages
from dsv4.tokenizer.special import ASSISTANT, QUICK_INSTRUCTIONS

QuickInstruction = Literal["action", "query", "authority", "domain", "read_url", "title"]
NAMES: tuple[QuickInstruction, ...] = get_args(QuickInstruction)
TOKENS: dict[QuickInstruction, str] = {name: f"<｜{name}｜>" for name in NAMES}
EXTRACTED_URL = "<｜extracted_url｜>"
assert {*TOKENS.values(), EXTRACTED_URL} == {*QUICK_INSTRUCTIONS}


def quick_instruction(name: object, place: str) -> QuickInstruction:
    """A name of a quick instruction. ValueError for another, with its place."""
    if name not in NAMES:
        raise ValueError(f"{place}: {name!r}; allowed: {', '.join(NAMES)}")
    return cast(QuickInstruction, name)


def encode_quick_instruction(prompts: PromptEncoder, conversation: Conversation, name: QuickInstruction) -> list[int]:
    """Token ids of a conversation and a quick instruction about it, ready for the model to answer.

    For `title` the conversation ends with the assistant's answer, whose thinking stays; else with a message of the
    user. ValueError for another end, or for `read_url` without EXTRACTED_URL in the last text.
    """
    messages, token = conversation.messages, prompts.tokenizer.special_id(TOKENS[name])
    last = messages[-1] if messages else None
    wanted = "assistant" if name == "title" else "user"
    if last is None or last.role != wanted:
        found = "is empty" if last is None else f"ends with a message of the {last.role}"
        raise ValueError(f"{name}: the conversation {found}; allowed: one that ends with the {wanted}'s")
    if isinstance(last, AssistantMessage):
        asked = with_messages(conversation, messages[:-1])
        return [*encode_training(prompts, asked, last)[0], token]
    if name == "action":
        return [*prompts.encode(conversation), token]
    rendered = prompts.render(conversation)
    text, ranges = rendered.prompt, list(rendered.special_ranges)
    end = max(start for start, stop in ranges if text[start:stop] == ASSISTANT)
    ranges = [(start, stop) for start, stop in ranges if stop <= end]
    if name == "read_url":
        place = text.rfind(EXTRACTED_URL, ranges[-1][1], end)
        if place < 0:
            raise ValueError(
                f"read_url: the user's text has no {EXTRACTED_URL}; allowed: one that ends with it and a URL"
            )
        ranges.append((place, place + len(EXTRACTED_URL)))
    return [*prompts.tokenizer.encode_rendered(text[:end], ranges), token]


def encode_quick_training(
    prompts: PromptEncoder, conversation: Conversation, name: QuickInstruction, answer: str
) -> tuple[list[int], list[int]]:
    """Encode a quick instruction and its answer as (ids, mask); mask 1, with loss: the answer and its EOS."""
    ids = encode_quick_instruction(prompts, conversation, name)
    written = [*prompts.tokenizer.encode(answer), prompts.tokenizer.eos_token_id]
    return ids + written, [0] * len(ids) + [1] * len(written)
