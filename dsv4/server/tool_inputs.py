"""Tool-call inputs of a whole Messages answer, taken from its stream events to keep every digit of long integers."""

from __future__ import annotations

import json
from typing import cast

from dsv4.server.unchecked_json import Json


class ToolInputs:
    """Collects the inputs of an answer's tool calls from its stream events."""

    def __init__(self) -> None:
        self._parts: dict[int, str] = {}  # place of a content block -> JSON text of its input

    def add(self, event_json: str) -> None:
        if "input_json_delta" in event_json:
            event = cast(Json, json.loads(event_json))
            if event.get("type") == "content_block_delta":
                place = cast(int, event["index"])
                self._parts[place] = self._parts.get(place, "") + cast(str, event["delta"].get("partial_json", ""))

    def restore(self, message_json: str) -> str:
        """Puts the collected inputs into the answer: deepseek-recipe's have integers beyond 64 bits as floats."""
        if not self._parts:
            return message_json
        message = cast(Json, json.loads(message_json))
        for place, block in enumerate(cast("list[Json]", message["content"])):
            if block["type"] == "tool_use" and self._parts.get(place):
                block["input"] = json.loads(self._parts[place])
        return json.dumps(message, ensure_ascii=False, separators=(",", ":"))
