"""Records to token ids: a text between BOS and EOS, a conversation as in inference, with its loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe
import numpy as np

from dsv4.data.records import Record
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder, with_budget
from dsv4.tokenizer.special import BOS, EOS

_MODEL = "training"  # name of the model in the requests that a conversation is read from


@dataclass(frozen=True)
class Encoded:
    """Ids of a record as uint32, its loss mask as uint8 or None if every token is a target, UTF-8 bytes of its text."""

    ids: np.ndarray
    mask: np.ndarray | None
    num_bytes: int

    @property
    def targets(self) -> int:
        """Tokens with loss."""
        return len(self.ids) if self.mask is None else int(np.count_nonzero(self.mask))


class RecordEncoder:
    """Encodes records: texts with the tokenizer of `prompts`, conversations as `prompts` renders them."""

    def __init__(self, prompts: PromptEncoder) -> None:
        self._prompts, self._tokenizer = prompts, prompts.tokenizer
        self._bos, self._eos = self._tokenizer.special_id(BOS), self._tokenizer.special_id(EOS)

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Encode records, texts in one batch. ValueError for a conversation that cannot be trained on."""
        texts = [record for record in records if isinstance(record, str)]
        ids = iter(self._tokenizer.encode_batch(texts))
        return [
            Encoded(np.array([self._bos, *next(ids), self._eos], np.uint32), None, len(record.encode()))
            if isinstance(record, str)
            else self._conversation(record)
            for record in records
        ]

    def _conversation(self, record: dict[str, Any]) -> Encoded:
        conversation, target = read_conversation(record)
        if isinstance(record.get("reasoning_effort"), int) and self._prompts.ladder != "scalar":
            raise ValueError(
                f"reasoning_effort is {record['reasoning_effort']}, a number, and the model's ladder of efforts is "
                f"{self._prompts.ladder}; allowed: a level, or the ladder scalar"
            )
        ids, mask = encode_training(self._prompts, conversation, target)
        said = [message.get("content") or "" for message in record["messages"]]
        return Encoded(np.array(ids, np.uint32), np.array(mask, np.uint8), sum(len(text.encode()) for text in said))


def read_conversation(record: dict[str, Any]) -> tuple[recipe.Conversation, recipe.AssistantMessage]:
    """Split a Chat Completions request whose last message is the assistant's into the prompt and the answer.

    Thinking mode is on if any assistant's message has reasoning_content. `reasoning_effort` may be a number too, a
    budget of 1 to 100. ValueError names what is wrong.
    """
    messages = [_without_nulls(message) for message in record["messages"]]
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("a conversation ends with a message of the assistant, the answer to train on")
    last = messages[-1]
    thinks = any(message.get("reasoning_content") for message in messages)
    conversation = read_prompt(record | {"messages": messages[:-1]}, thinks)
    calls = [
        recipe.ToolCall(call.get("id", ""), call["function"]["name"], call["function"]["arguments"])
        for call in last.get("tool_calls", ())
    ]
    return conversation, recipe.AssistantMessage(
        last.get("content") or "", last.get("reasoning_content") if thinks else None, calls or None
    )


def read_prompt(record: dict[str, Any], thinking: bool) -> recipe.Conversation:
    """Conversation of a Chat Completions request, which awaits an answer. ValueError names what is wrong."""
    request = _without_nulls(record) | {
        "model": _MODEL,
        "messages": [_without_nulls(message) for message in record["messages"]],
        "thinking": {"type": "enabled" if thinking else "disabled"},
    }
    options = recipe.ConversionOptions().with_model_alias(_MODEL, recipe.ModelVersion.DeepseekV4Pro)
    try:
        return recipe.ChatCompletionRequest(request).convert(options).conversation
    except recipe.ConversionError as error:  # which is no ValueError
        raise ValueError(str(error)) from error


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """The set values: Parquet gives every struct every key."""
    return {key: value for key, value in values.items() if value is not None}
