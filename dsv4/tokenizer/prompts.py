"""Conversations to prompt token ids: deepseek-recipe renders the text, the model folder names the effort ladder.

A ladder maps a reasoning effort to the instruction before the conversation. deepseek-recipe renders the later ladder.

    effort      preview (April models)    0731 (later models)
    low, none   nothing                   nothing
    high        nothing                   "Absolute maximum"
    xhigh       "Absolute maximum"        "Absolute maximum"
    max         "Absolute maximum"        "Beyond maximum"

The ladder `scalar`, of models that are trained so, has V4.1's numbers in their place (effort_number.py): those of the
levels, or the one with which the system text begins.

The folder's generation_config.json holds the ladder as "reasoning_effort_ladder". Without the key it is preview:
nothing in a config tells July's models from June's, which expect April's prompts, and the later ladder would
put the strongest instruction that June's models know before every ordinary request.
"""

import json
from pathlib import Path
from typing import Any, Literal, cast

from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV4Encoding,
    Message,
    SystemMessage,
)

from dsv4.config import settings_folder
from dsv4.tokenizer.effort_number import NUMBERS, check_budget, numbered
from dsv4.tokenizer.long_integers import LongIntegers, Rendered
from dsv4.tokenizer.tokenizer import Tokenizer

Ladder = Literal["preview", "0731", "scalar"]
ReasoningEffort = Literal["low", "high", "xhigh", "max"]
LADDER_KEY = "reasoning_effort_ladder"
DEFAULT_LADDER: Ladder = "preview"
# Request effort -> the effort for which deepseek-recipe renders the wanted instruction.
LADDERS: dict[str, dict[str | None, ReasoningEffort]] = {
    "preview": {None: "low", "low": "low", "high": "low", "xhigh": "high", "max": "high"},
    "0731": {None: "low", "low": "low", "high": "high", "xhigh": "high", "max": "max"},
    "scalar": dict.fromkeys((None, "low", "high", "xhigh", "max"), "low"),  # no instruction: a number
}


def _ladder(name: object, place: str) -> Ladder:
    if not isinstance(name, str) or name not in LADDERS:
        raise ValueError(f"{place}: reasoning effort ladder {name!r}: one of {', '.join(sorted(LADDERS))} is allowed")
    return cast(Ladder, name)


def effort_ladder(folder: str | Path) -> Ladder:
    """Read the ladder of a model folder from generation_config.json; preview if the file or the key is missing."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return DEFAULT_LADDER
    return _ladder(_read_settings(path).get(LADDER_KEY, DEFAULT_LADDER), str(path))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return cast("dict[str, Any]", settings)


def write_effort_ladder(folder: str | Path, ladder: Ladder) -> None:
    """Set the ladder in generation_config.json, keeping the file's other keys; a new file gets the official keys."""
    path = Path(folder) / "generation_config.json"
    settings: dict[str, Any] = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    if path.is_file():
        settings = _read_settings(path)
    settings[LADDER_KEY] = _ladder(ladder, "write_effort_ladder")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _adapted_message(message: Message, thinking: bool, without_tools: bool) -> Message:
    if isinstance(message, SystemMessage) and without_tools:
        return SystemMessage(message.content, message.image_sources)
    if isinstance(message, AssistantMessage) and not message.reasoning_content:
        return AssistantMessage(message.content, "" if thinking else None, message.tool_calls, message.prefix)
    return message


def with_messages(conversation: Conversation, messages: list[Message], **changed: Any) -> Conversation:
    """The conversation with other messages; `changed`: other arguments of the constructor that differ."""
    kept: dict[str, Any] = {
        "thinking_mode": conversation.thinking_mode,
        "tools": conversation.tools,
        "tool_choice": conversation.tool_choice,
        "reasoning_effort": conversation.reasoning_effort,
        # With a schema or a regular expression the constructor wants the format "text".
        "response_format": "json_object" if conversation.response_format == "json_object" else "text",
        "response_schema": conversation.response_schema,
        "response_regex": conversation.response_regex,
    }
    return Conversation(messages, **kept | changed)


def with_budget(conversation: Conversation, budget: int) -> Conversation:
    """The conversation with V4.1's line of a budget of 1 to 100. ValueError for one out of range."""
    return with_messages(conversation, numbered(conversation.messages, check_budget(budget)))


class PromptEncoder:
    """Renders and encodes conversations for one model folder.

    Tools are left out if tool_choice is "none" (deepseek-recipe would still describe them), and then earlier thinking
    is dropped as in any conversation without tools. An assistant turn without reasoning (None or "") is rendered as
    the model generates it: with an empty think block in thinking mode, with none otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, effort_ladder: str = "0731") -> None:
        self.tokenizer = tokenizer
        self.ladder = _ladder(effort_ladder, "PromptEncoder")
        self._encoding = DeepseekV4Encoding()

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None) -> "PromptEncoder":
        """Load the tokenizer and the ladder of a model folder, "nano", or owner/name."""
        folder = settings_folder(folder, revision)
        return cls(Tokenizer.from_pretrained(folder), effort_ladder(folder))

    def render(self, conversation: Conversation) -> Rendered:
        """Render the prompt's text and the ranges of its special tokens."""
        integers = LongIntegers()
        rendered = self._encoding.render_conversation(self._adapted(conversation, integers))
        return integers.restore(Rendered(rendered.prompt, rendered.special_ranges))

    def encode(self, conversation: Conversation) -> list[int]:
        """Encode the prompt, ready for the model to continue."""
        rendered = self.render(conversation)
        return self.tokenizer.encode_rendered(rendered.prompt, rendered.special_ranges)

    def _adapted(self, conversation: Conversation, integers: LongIntegers) -> Conversation:
        thinking, without_tools = conversation.thinking_mode, conversation.tool_choice == "none"
        messages = conversation.messages
        if thinking and self.ladder == "scalar":
            messages = numbered(messages, NUMBERS[conversation.reasoning_effort])
        return with_messages(
            conversation,
            [integers.hide(_adapted_message(known, thinking, without_tools)) for known in messages],
            tools=[] if without_tools else conversation.tools,
            reasoning_effort=LADDERS[self.ladder][conversation.reasoning_effort],
        )
