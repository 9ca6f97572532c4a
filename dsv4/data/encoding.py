"""Records to token ids: a text between BOS and EOS, a conversation as in inference, with its loss mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import deepseek_recipe as recipe
import numpy as np

from dsv4.conversation.tool_arguments import read_object
from dsv4.data.records import CONVERSATION, MESSAGES, Record
from dsv4.server.chat_completions import CHAT
from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import json_objects
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder, with_budget, with_messages
from dsv4.tokenizer.quick_instructions import QuickInstruction, encode_quick_training, quick_instruction
from dsv4.tokenizer.special import BOS, EOS

THINKS = "conversation thinks"  # key of a part of a conversation: the whole one's mode, which the part may not show
TASK = "task"  # key of a message: the quick instruction that follows it
_MODEL = "training"  # name of the model in the requests that a conversation is read from
_OPTIONS = recipe.ConversionOptions().with_model_alias(_MODEL, recipe.ModelVersion.DeepseekV4Pro)


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
        if asks_quick_instruction(record):
            conversation, name, answer = read_quick_instruction(record)
            check_effort(record, self._prompts.ladder)
            ids, mask = encode_quick_training(self._prompts, conversation, name, answer)
            said = sum(len(message.content.encode()) for message in conversation.messages) + len(answer.encode())
            return Encoded(np.array(ids, np.uint32), np.array(mask, np.uint8), said)
        conversation, target = read_conversation(record)
        check_effort(record, self._prompts.ladder)
        context = _context(record, conversation)
        ids, mask = encode_training(self._prompts, conversation, target, context=context)
        said = sum(len(message.content.encode()) for message in (*conversation.messages, target))
        return Encoded(np.array(ids, np.uint32), np.array(mask, np.uint8), said)


def read_conversation(record: dict[str, Any]) -> tuple[recipe.Conversation, recipe.AssistantMessage]:
    """Split a Chat Completions request whose last message is the assistant's into the prompt and the answer.

    It is read as the API server reads it. Thinking mode is on if a message of the assistant has reasoning, or if THINKS
    says so. `reasoning_effort` may be a number too, a budget of 1 to 100. ValueError names what is wrong, with its
    place.
    """
    messages = [_adapted(message, f"messages[{place}]") for place, message in enumerate(record[MESSAGES])]
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("a conversation ends with a message of the assistant, the answer to train on")
    thinks = _thinks(record)
    if thinks and record.get("reasoning_effort") == "none":
        raise ValueError("reasoning_effort is none, but a message has reasoning: leave one of them out")
    answered = _answered(messages[-1])
    conversation = _converted(record, [*messages[:-1], *answered], thinks)
    _check_arguments(messages)
    end = len(conversation.messages) - len(answered)
    target = cast(recipe.AssistantMessage, conversation.messages[end])
    return with_messages(conversation, conversation.messages[:end]), target


def asks_quick_instruction(record: dict[str, Any]) -> bool:
    """True if a message of a conversation has a `task`, as the official encoder calls a quick instruction."""
    return any(isinstance(message, dict) and message.get(TASK) is not None for message in record[MESSAGES])


def read_quick_instruction(record: dict[str, Any]) -> tuple[recipe.Conversation, QuickInstruction, str]:
    """Split a Chat Completions request into the conversation, the quick instruction about it and its answer.

    The message before the last has the `task`; the last, the assistant's, has the answer's text alone. Thinking mode is
    on as in `read_conversation`, or if there is an effort. ValueError names what is wrong, with its place.
    """
    messages: list[Any] = record[MESSAGES]
    asked = len(messages) - 2
    for place, message in enumerate(messages):
        if place != asked and isinstance(message, dict) and message.get(TASK) is not None:
            raise ValueError(f"messages[{place}].task: allowed on the message before the last, whose answer is learned")
    name = quick_instruction(messages[asked].get(TASK), f"messages[{asked}].task")
    answer = _adapted(messages[-1], f"messages[{asked + 1}]")
    text = answer.get("content")
    others = sorted(key for key, value in answer.items() if key not in ("role", "content") and value)
    if answer.get("role") != "assistant" or not isinstance(text, str) or not text or others:
        shown = f" with {', '.join(others)}" if others else ""
        raise ValueError(
            f"messages[{asked + 1}]: a message of the {answer.get('role')}{shown} answers the task {name}; allowed: "
            "one of the assistant with a text as content, and nothing else"
        )
    thinks = _thinks(record) or record.get("reasoning_effort") not in (None, "none")
    conversation = _converted(record, [_adapted(one, f"messages[{n}]") for n, one in enumerate(messages[:-1])], thinks)
    _check_arguments(messages)
    return conversation, name, text


def read_prompt(record: dict[str, Any], thinking: bool) -> recipe.Conversation:
    """Conversation of a Chat Completions request, which awaits an answer. ValueError names what is wrong."""
    messages = [_adapted(message, f"messages[{place}]") for place, message in enumerate(record[MESSAGES])]
    conversation = _converted(record, messages, thinking)
    _check_arguments(messages)
    return conversation


def check_effort(record: dict[str, Any], ladder: str) -> None:
    """ValueError for a request whose effort is a number, for which the model's ladder has no prompt."""
    if isinstance(record.get("reasoning_effort"), int) and ladder != "scalar":
        raise ValueError(
            f"reasoning_effort is {record['reasoning_effort']}, a number, and the model's ladder of efforts is "
            f"{ladder}; allowed: a level, or the ladder scalar"
        )


def is_learned(message: dict[str, Any]) -> bool:
    """True for a message of the assistant that is trained on: `weight` 0 makes it context, as for OpenAI."""
    return message.get("weight") is None or bool(message["weight"])


def has_reasoning(message: dict[str, Any]) -> bool:
    """True for a message of the assistant with reasoning, under either of its names."""
    return message.get("role") == "assistant" and bool(message.get("reasoning_content") or message.get("reasoning"))


def _thinks(record: dict[str, Any]) -> bool:
    """True if a message of the assistant has reasoning, or the whole conversation of which this is a part thinks."""
    return record.get(THINKS) is True or any(has_reasoning(message) for message in record[MESSAGES])


def _converted(record: dict[str, Any], messages: list[dict[str, Any]], thinking: bool) -> recipe.Conversation:
    """The conversation of a request. ValueError with the API's words: every refusal of a conversation comes by here."""
    request = {name: record[name] for name in CONVERSATION if record.get(name) is not None} | {
        "model": _MODEL,
        "messages": messages,
        "thinking": {"type": "enabled" if thinking else "disabled"},
    }
    effort: object = request.get("reasoning_effort")
    budget = effort if isinstance(effort, int) and not isinstance(effort, bool) else None
    if budget is not None:
        del request["reasoning_effort"]
    try:
        conversation = CHAT.read(json.dumps(request).encode(), _OPTIONS).converted.conversation
    except RequestError as error:
        raise ValueError(error.message) from error
    except (TypeError, RecursionError) as error:  # a table's date or bytes; too deep
        raise ValueError(f"no JSON: {error}") from error
    return conversation if budget is None else with_budget(conversation, budget)


def _adapted(message: object, place: str) -> dict[str, Any]:
    """A message for the API, which refuses an empty list of calls and overlooks some fields.

    ValueError for a field that it would overlook, and that changes what is to be learned.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{place}: {type(message).__name__}; messages are objects with a role")
    fields = cast("dict[str, Any]", message)
    if fields.get("role") == "assistant":
        if not isinstance(fields.get("reasoning"), (str, type(None))):
            raise ValueError(f"{place}.reasoning: {type(fields['reasoning']).__name__}; a text is allowed")
        if fields.get("function_call") is not None:
            raise ValueError(f"{place}.function_call: calls are allowed in tool_calls")
        if fields.get("weight") not in (None, 0, 1):
            raise ValueError(f"{place}.weight: {fields['weight']!r}; 0 and 1 are allowed")
    left_out = ("weight", TASK)
    return {
        name: value for name, value in fields.items() if name not in left_out and (name != "tool_calls" or value != [])
    }


def _context(record: dict[str, Any], conversation: recipe.Conversation) -> set[int]:
    """Turns of the assistant before the answer that have weight 0, counted from 0. ValueError if the answer has."""
    answers = [message for message in record[MESSAGES] if message.get("role") == "assistant"]
    found = {turn for turn, message in enumerate(answers) if not is_learned(message)}
    if len(answers) - 1 in found:
        raise ValueError("the last answer has weight 0: leave it out, since nothing follows")
    turns = sum(isinstance(message, recipe.AssistantMessage) for message in conversation.messages)
    if found and turns != len(answers) - 1:
        raise ValueError(f"weight 0 among {len(answers)} answers, of which the prompt shows {turns} before the last")
    return found


def _answered(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer as the API reads it in a history: its calls have ids, and empty results after it."""
    calls: object = answer.get("tool_calls")
    if not isinstance(calls, list):
        return [answer]
    named: list[object] = [
        {**call, "id": call.get("id") or f"answer-{number}"} if isinstance(call, dict) else call
        for number, call in enumerate(cast("list[object]", calls))
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": ""} for call in json_objects(named)]
    return [answer | {"tool_calls": named}, *results]


def _check_arguments(messages: list[dict[str, Any]]) -> None:
    """ValueError for a call in valid messages whose arguments the model could not write."""
    for place, message in enumerate(messages):
        calls = message.get("tool_calls") if message.get("role") == "assistant" else None
        for number, call in enumerate(calls or ()):
            arguments: str = call["function"]["arguments"]
            if read_object(arguments) is None:
                shown = arguments if len(arguments) <= 80 else f"{arguments[:80]}..."
                raise ValueError(
                    f"messages[{place}].tool_calls[{number}].function.arguments: {shown!r}; a JSON object is allowed, "
                    'with names without any of "<> and line breaks'
                )
