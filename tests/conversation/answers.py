"""Answers to hand-written tokens, by the wire formats' own readers over nano's tokenizer: no engine, no server."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import deepseek_recipe as recipe

from dsv4.config import ModelConfig, settings_folder
from dsv4.conversation.model import ConversationModel
from dsv4.engine.interface import TextModel
from dsv4.engine.outputs import FinishReason, TokenEvent
from dsv4.server.chat_completions import CHAT
from dsv4.server.messages import MESSAGES
from dsv4.server.recipe_format import RecipeFormat
from dsv4.server.responses import RESPONSES
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder, effort_ladder

FORMATS: dict[str, RecipeFormat] = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}
FOLDER = settings_folder("nano")
TOKENIZER = Tokenizer.from_pretrained(FOLDER)
OPTIONS = recipe.ConversionOptions(
    default_thinking_mode=True, messages_web_search=recipe.WebSearchBehavior.Drop
).with_model_versions_by_name({"m": recipe.ModelVersion.DeepseekV4Pro})
_SPECIAL = re.compile("|".join(map(re.escape, sorted(TOKENIZER.special_tokens, key=len, reverse=True))))
_SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}, "n": {"type": "integer"}}}


def special(text: str) -> list[int]:
    """Tokens of a text in which spellings of special tokens are these."""
    return TOKENIZER.encode_rendered(text, [found.span() for found in _SPECIAL.finditer(text)])


def plain(text: str) -> list[int]:
    """Tokens of a text in which spellings of special tokens are text."""
    return TOKENIZER.encode(text)


@dataclass
class Reply:
    """An answer as a client has it. `calls`: (name, arguments as they came)."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    call_ids: list[str] = field(default_factory=list[str])
    reason: str = ""
    num_tokens: int = 0  # of the usage
    num_read: int = 0  # until the answer was finished


def _chat(reply: Reply, chunk: dict[str, Any]) -> None:
    (choice,) = chunk["choices"]
    delta = choice["delta"]
    reply.reasoning += delta.get("reasoning_content") or ""
    reply.content += delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        _call(reply, call.get("id"), call["function"].get("name"), call["function"]["arguments"])
    reply.reason = choice["finish_reason"] or reply.reason
    reply.num_tokens = (chunk.get("usage") or {}).get("completion_tokens", 0)


def _messages(reply: Reply, event: dict[str, Any]) -> None:
    kind, delta = event["type"], event.get("delta", {})
    if kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
        _call(reply, event["content_block"]["id"], event["content_block"]["name"], "")
    elif kind == "content_block_delta":
        reply.reasoning += delta.get("thinking", "")
        reply.content += delta.get("text", "")
        if "partial_json" in delta:
            _call(reply, None, None, delta["partial_json"])
    elif kind == "message_delta":
        reply.reason, reply.num_tokens = delta["stop_reason"], event["usage"]["output_tokens"]


def _responses(reply: Reply, event: dict[str, Any]) -> None:
    kind = event["type"]
    if kind == "response.output_item.added" and event["item"]["type"] == "function_call":
        _call(reply, event["item"]["call_id"], event["item"]["name"], "")
    elif kind == "response.function_call_arguments.delta":
        _call(reply, None, None, event["delta"])
    elif kind == "response.reasoning_text.delta":
        reply.reasoning += event["delta"]
    elif kind == "response.output_text.delta":
        reply.content += event["delta"]
    elif kind in ("response.completed", "response.incomplete"):
        reply.reason, reply.num_tokens = event["response"]["status"], event["response"]["usage"]["output_tokens"]


_READERS = {"chat": _chat, "messages": _messages, "responses": _responses}


def _call(reply: Reply, call_id: str | None, name: str | None, arguments: str) -> None:
    if call_id is not None:
        reply.call_ids.append(call_id)
        reply.calls.append((name or "", ""))
    reply.calls[-1] = (reply.calls[-1][0], reply.calls[-1][1] + arguments)


@cache
def _model() -> ConversationModel:
    prompts, config = PromptEncoder(TOKENIZER, effort_ladder(FOLDER)), ModelConfig.from_pretrained(FOLDER)
    llm = SimpleNamespace(tokenizer=TOKENIZER, path=FOLDER, config=config, prompts=prompts, max_model_len=65536)
    return ConversationModel(cast(TextModel, llm))


class Talk:
    """Conversations in one format with a model that remembers its turns of this talk alone."""

    def __init__(self, name: str) -> None:
        self.name, self.format = name, FORMATS[name]
        self.model = _model().of(secrets.token_hex(8))

    def body(self, history: Sequence[Any] = (), thinking: bool = True, tools: bool = True, **more: Any) -> bytes:
        """A request in this format. `history`: what follows the first question."""
        asked = [{"role": "user", "content": "hi json"}, *history]
        fields: dict[str, Any] = {"model": "m", "input" if self.name == "responses" else "messages": asked}
        if self.name == "responses":
            fields["reasoning"] = {"effort": "high" if thinking else "none"}
            tool: dict[str, Any] = {"type": "function", "name": "f", "parameters": _SCHEMA}
        else:
            fields |= {"max_tokens": 900, "thinking": {"type": "enabled" if thinking else "disabled"}}
            tool = {"name": "f", "input_schema": _SCHEMA}
        if self.name == "chat":
            tool = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
        return json.dumps(fields | ({"tools": [tool]} if tools else {}) | more).encode()

    def ask(
        self, body: bytes, token_ids: Sequence[int], end: FinishReason | None = "stop", step: int = 1
    ) -> tuple[Reply, str, list[Reply]]:
        """(the answer to a request as streamed; as the whole answer's JSON; the stream after each step of tokens).

        `end`: the engine's reason with the last token; None for one that goes on. An end of the sentence is a token of
        the answer.
        """
        request = self.format.read(body, OPTIONS)
        (turn,) = request.turns(self.model)
        (reader,) = request.readers(self.model, [turn], "resp_1")
        whole, reply = request.whole_answer(turn, "resp_1"), Reply()
        steps: list[Reply] = []
        for begin in range(0, len(token_ids), step):
            part = list(token_ids[begin : begin + step])
            last = begin + step >= len(token_ids)
            for chunk in reader.push(TokenEvent(part, "", [], [], end if last else None)):
                _READERS[self.name](reply, json.loads(chunk.to_json()))
                whole.accumulate(chunk)
            reply.num_read = min(begin + step, len(token_ids))
            steps.append(Reply(reply.reasoning, reply.content, list(reply.calls)))
            if reader.finished:
                return reply, whole.to_json(), steps
        assert end is None, "an answer that has ended is finished"
        return reply, "", steps

    def prompt(self, body: bytes) -> list[int]:
        """Tokens of a request's prompt."""
        (turn,) = self.format.read(body, OPTIONS).turns(self.model)
        return list(turn.prompt_token_ids)

    def said(self, reply: Reply, result: str = "7", reasoning: str | None = None) -> list[Any]:
        """A reply as history: its calls with their results, or a question after it."""
        calls = list(zip(reply.call_ids, reply.calls, strict=True))
        following = {"role": "user", "content": "go on"}
        if self.name == "chat":
            asked = [
                {"id": i, "type": "function", "function": {"name": name, "arguments": given}}
                for i, (name, given) in calls
            ]
            message = {"role": "assistant", "content": reply.content} | ({"tool_calls": asked} if asked else {})
            message |= {} if reasoning is None else {"reasoning_content": reasoning}
            results = [{"role": "tool", "tool_call_id": i, "content": result} for i in reply.call_ids]
            return [message, *(results or [following])]
        if self.name == "messages":
            parts: list[Any] = [{"type": "text", "text": reply.content}] if reply.content else []
            parts += [{"type": "tool_use", "id": i, "name": n, "input": json.loads(a)} for i, (n, a) in calls]
            results = [{"type": "tool_result", "tool_use_id": i, "content": result} for i in reply.call_ids]
            return [{"role": "assistant", "content": parts}, {"role": "user", "content": results or "go on"}]
        items: list[Any] = [{"role": "assistant", "content": reply.content}] if reply.content else []
        items += [{"type": "function_call", "call_id": i, "name": n, "arguments": a} for i, (n, a) in calls]
        results = [{"type": "function_call_output", "call_id": i, "output": result} for i in reply.call_ids]
        return [*items, *(results or [following])]
