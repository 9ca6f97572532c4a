"""Events of the Responses API: those of deepseek-recipe, completed by what it does not know of a request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from dsv4.conversation.answer import Answer
from dsv4.engine import TokenEvent
from dsv4.server.custom_tools import custom_input
from dsv4.server.errors import RequestError
from dsv4.server.sealed_reasoning import seal
from dsv4.server.unchecked_json import Json
from dsv4.server.wire_format import OuterReader

_ENDS = ("response.completed", "response.incomplete")
_CALL, _ARGUMENTS, _INPUT = "function_call", "response.function_call_arguments", "response.custom_tool_call_input"


@dataclass(frozen=True)
class ResponseEvent:
    """One event of a stream: a chunk of this format."""

    fields: Json

    @property
    def name(self) -> str:
        return cast(str, self.fields["type"])

    def to_json(self) -> str:
        # A response object quotes the request, which may have characters that are no text: they stay escaped.
        return json.dumps(self.fields, ensure_ascii="response" in self.fields, separators=(",", ":"))


@dataclass(frozen=True)
class Asked:
    """Parts of a request that the events of its answer need.

    `reported`: fields of the response object beside deepseek-recipe's. `sealed`: True if reasoning items carry their
    text for the next turn. `custom`: (namespace, name) of the functions that the client declared as custom tools.
    """

    response_id: str
    model: str
    reported: Mapping[str, Any]
    sealed: bool
    custom: frozenset[tuple[str | None, str]]


class ResponseReader(OuterReader):
    """Reads an answer's events from those of deepseek-recipe.

    `on_end`: is given the response before its last event is sent; returns True if it has stored it.
    """

    def __init__(self, answer: Answer, asked: Asked, on_end: Callable[[Json], bool] | None = None) -> None:
        super().__init__(answer)
        self._answer, self._asked, self._on_end = answer, asked, on_end
        self._count = 0  # of events
        self._response: Json = {}  # the latest response object
        self._items: list[Json] = []  # that are complete
        self._custom_items: dict[str, str] = {}  # id of a function call -> id of its custom tool call

    def push(self, event: TokenEvent) -> list[ResponseEvent]:
        found: list[Json] = [json.loads(chunk.to_json()) for chunk in self._inner.push(event)]
        if self._answer.cut_call:
            _last_call_incomplete(found)
        return [self._numbered(fields) for given in found for fields in self._read(given)]

    def failed(self, error: RequestError) -> ResponseEvent:
        """Event that ends the stream with an error; the items that were complete stay."""
        head: Json = {"id": self._asked.response_id, "object": "response", "model": self._asked.model}
        head |= {"created_at": int(time.time()), **self._asked.reported}
        code = "invalid_prompt" if error.status < 500 else "server_error"
        end = {"status": "failed", "error": {"code": code, "message": error.message}, "output": self._items}
        response = head | self._response | end
        return self._numbered({"type": "response.failed", "response": response})

    def _numbered(self, fields: Json) -> ResponseEvent:
        fields["sequence_number"] = self._count
        self._count += 1
        return ResponseEvent(fields)

    def _read(self, event: Json) -> Iterator[Json]:
        kind = cast(str, event["type"])
        if "response" in event:
            response = cast(Json, event["response"])
            response |= self._asked.reported
            response["output"] = list(self._items)
            if response.get("usage") is not None:  # deepseek-recipe tokenizes the text of the reasoning once more
                response["usage"]["output_tokens_details"]["reasoning_tokens"] = self.num_reasoning_tokens
            self._response = response
            if kind in _ENDS and self._on_end is not None:
                response["store"] = self._on_end(response)
        elif "item" in event:
            event["item"] = self._item(cast(Json, event["item"]), done=kind.endswith(".done"))
        elif event.get("item_id") in self._custom_items:
            yield from self._custom_events(event, kind)
            return
        yield event

    def _item(self, item: Json, done: bool) -> Json:
        if item["type"] == "reasoning":
            texts = [part["text"] for part in cast("list[Json]", item["content"])]
            item["encrypted_content"] = seal("".join(texts)) if self._asked.sealed and done else None
        elif item["type"] == _CALL and (item.get("namespace"), item["name"]) in self._asked.custom:
            arguments = cast(str, item.pop("arguments"))
            given = cast(str, item["id"])
            item |= {"type": "custom_tool_call", "id": "ctc" + given.removeprefix("fc")}
            item["input"] = custom_input(arguments) if done else ""
            self._custom_items[given] = item["id"]
        if done:
            self._items.append(item)
        return item

    def _custom_events(self, event: Json, kind: str) -> Iterator[Json]:
        """The input of a custom tool in one piece: it stands escaped in the pieces of the arguments."""
        if kind != f"{_ARGUMENTS}.done":
            return
        text = custom_input(cast(str, event.pop("arguments")))
        event["item_id"] = self._custom_items[cast(str, event["item_id"])]
        if text:
            yield event | {"type": f"{_INPUT}.delta", "delta": text}
        yield event | {"type": f"{_INPUT}.done", "input": text}


def _last_call_incomplete(events: list[Json]) -> None:
    """Says of the last call, in which the model has stopped, that it is incomplete, as OpenAI does of items.

    The response is complete all the same: an incomplete one is cut off by a limit, and clients give it up.
    """
    ends = (event["item"] for event in reversed(events) if event["type"] == "response.output_item.done")
    call = next((item for item in ends if "call_id" in item), None)
    if call is not None:
        call["status"] = "incomplete"


class WholeResponse:
    """The response object of an answer's last event."""

    def __init__(self) -> None:
        self._response: Json = {}

    def accumulate(self, chunk: ResponseEvent) -> None:
        self._response = chunk.fields.get("response", self._response)

    def to_json(self) -> str:
        return json.dumps(self._response, separators=(",", ":"))
