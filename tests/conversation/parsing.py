"""Answers parsed in every protocol: by this package however they are cut, and by deepseek-recipe alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import deepseek_recipe as recipe

from dsv4.conversation.tool_calls import CutCall
from dsv4.conversation.tool_markup import Text, Token, ToolMarkup
from dsv4.server.tool_inputs import ToolInputs
from dsv4.tokenizer.special import DSML

NAMES = {"m": recipe.ModelVersion.DeepseekV4Pro}
OPTIONS = recipe.ConversionOptions(messages_web_search=recipe.WebSearchBehavior.Drop).with_model_versions_by_name(NAMES)
PROTOCOLS = ("chat", "messages", "responses")
CUT_FORMS = {"chat": CutCall.unreadable, "messages": CutCall.told, "responses": CutCall.unreadable}
_REQUESTS: dict[str, Any] = {
    "chat": (recipe.ChatCompletionRequest, recipe.ChatCompletionResponse),
    "messages": (recipe.MessagesRequest, recipe.MessagesResponse),
    "responses": (recipe.ResponsesRequest, recipe.ResponsesResponse),
}


@dataclass(frozen=True)
class Parsed:
    """An answer as a client has it. Calls are (name, arguments)."""

    reasoning: str
    content: str
    calls: list[tuple[str, Any]]


def arguments_of(text: str) -> Any:
    """Arguments of a call; their text if the model has stopped in the middle of them."""
    try:
        return input_of(json.loads(text))
    except ValueError:
        return text


def input_of(given: dict[str, Any]) -> Any:
    """Arguments of a call in a Messages answer."""
    return given.get("INVALID_JSON", given)


def unreadable(text: str) -> str:
    """Arguments of a call in which the model has stopped, for clients that know text: what there is, and no JSON."""
    text += '"' * (re.sub(r"\\.", "", text).count('"') % 2)
    text = text.replace(DSML, DSML.replace("｜", "\\uff5c")) + ("" if text == "{" else ", ")
    return f'{text}"INVALID_JSON": ]}}'


def cut(answer: str, cuts: Sequence[int]) -> list[str]:
    """Pieces of an answer, cut before these characters."""
    places = sorted({0, *(place for place in cuts if place < len(answer)), len(answer)})
    return [answer[a:b] for a, b in pairwise(places)]


def own_items(
    pieces: Sequence[str], tools: Mapping[str, Any] | None, thinking: bool, protocol: str = "chat"
) -> list[str]:
    """What this package hands to deepseek-recipe."""
    markup = ToolMarkup(tools, False, thinking, cut_form=CUT_FORMS[protocol])
    items: list[Token | Text] = [item for piece in pieces for item in markup.push(Token(0, piece))]
    return [item.text for item in [*items, *markup.finish(False)]]


def parsed(protocol: str, pieces: Sequence[str], thinking: bool, tools: bool) -> tuple[Parsed, Parsed]:
    """An answer in these pieces as deepseek-recipe parses it: (of its stream, whole)."""
    request_type, response_type = _REQUESTS[protocol]
    body: dict[str, Any] = {"model": "m", "input" if protocol == "responses" else "messages": _ASKED}
    generator = request_type.chunk_generator(request_type(json.dumps(body).encode()).convert(OPTIONS), "id", "m")
    stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    options = recipe.ParsingOptions(parse_tool_calls=tools, thinking_initial_stage=stage)
    processor = recipe.StreamProcessor(generator, options)
    chunks = list(processor.push(recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage(prompt_tokens=1))))
    for piece in pieces:
        if not processor.finished:
            chunks += processor.push(recipe.InferenceChunk.text(piece, 1))
    if not processor.finished:
        chunks += processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
        if not processor.finished:
            chunks += processor.finish()
    texts = [chunk.to_json() for chunk in chunks]  # accumulation consumes them
    inputs = ToolInputs()
    response = response_type("id", "m", 0, 1, 0)
    for chunk, written in zip(chunks, texts, strict=True):
        inputs.add(written)
        response.accumulate(chunk)
    text = response.to_json()
    whole = json.loads(inputs.restore(text) if protocol == "messages" else text)
    return _streamed(protocol, [json.loads(written) for written in texts]), _whole(protocol, whole)


_ASKED = [{"role": "user", "content": "hi"}]


def _streamed(protocol: str, events: list[dict[str, Any]]) -> Parsed:
    reasoning, content, calls = "", "", dict[Any, list[str]]()
    for event in events:
        for delta in [choice["delta"] for choice in event.get("choices", ())]:
            reasoning += delta.get("reasoning_content") or ""
            content += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                found = calls.setdefault(call["index"], ["", ""])
                found[0] += call["function"].get("name") or ""
                found[1] += call["function"].get("arguments") or ""
        kind = event.get("type")
        if kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls[event["index"]] = [event["content_block"]["name"], ""]
        elif kind == "content_block_delta":
            reasoning += event["delta"].get("thinking", "")
            content += event["delta"].get("text", "")
            if "partial_json" in event["delta"]:
                calls[event["index"]][1] += event["delta"]["partial_json"]
        elif kind == "response.output_item.added" and event["item"]["type"] == "function_call":
            calls[event["item"]["id"]] = [event["item"]["name"], ""]
        elif kind == "response.function_call_arguments.delta":
            calls[event["item_id"]][1] += event["delta"]
        elif kind == "response.reasoning_text.delta":
            reasoning += event["delta"]
        elif kind == "response.output_text.delta":
            content += event["delta"]
    return Parsed(reasoning, content, [(name, arguments_of(arguments)) for name, arguments in calls.values()])


def _whole(protocol: str, answer: dict[str, Any]) -> Parsed:
    if protocol == "chat":
        message = answer["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        found = [(call["name"], arguments_of(call["arguments"])) for call in calls]
        return Parsed(message.get("reasoning_content") or "", message.get("content") or "", found)
    parts = answer["content"] if protocol == "messages" else answer["output"]
    reasoning = content = ""
    found = []
    for part in parts:
        if part["type"] == "tool_use":
            found.append((part["name"], input_of(part["input"])))
        elif part["type"] == "function_call":
            found.append((part["name"], arguments_of(part["arguments"])))
        elif part["type"] in ("thinking", "reasoning"):
            reasoning += part["thinking"] if protocol == "messages" else "".join(p["text"] for p in part["content"])
        else:
            content += part["text"] if protocol == "messages" else "".join(p["text"] for p in part["content"])
    return Parsed(reasoning, content, found)
