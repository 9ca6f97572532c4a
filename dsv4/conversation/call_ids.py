"""Ids of calls: deepseek-recipe's generators make them, and say each in the chunk with which its call begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import deepseek_recipe as recipe

Chunk = recipe.ChatCompletionChunk | recipe.MessagesStreamEvent | recipe.ResponsesStreamEvent


def begun_calls(chunks: Sequence[Chunk]) -> list[str]:
    """Ids of the calls that begin in an answer's chunks, in their order."""
    return [call_id for chunk in chunks for call_id in _of_chunk(chunk)]


def _of_chunk(chunk: Chunk) -> list[str]:
    fields: dict[str, Any] = json.loads(chunk.to_json())
    if isinstance(chunk, recipe.ChatCompletionChunk):
        calls = [call for choice in fields["choices"] for call in choice["delta"].get("tool_calls") or ()]
        return [call["id"] for call in calls if "id" in call]  # later pieces of a call have none
    if isinstance(chunk, recipe.MessagesStreamEvent):
        begins = fields["type"] == "content_block_start" and fields["content_block"]["type"] == "tool_use"
        return [fields["content_block"]["id"]] if begins else []
    begins = fields["type"] == "response.output_item.added" and "call_id" in fields["item"]
    return [fields["item"]["call_id"]] if begins else []
