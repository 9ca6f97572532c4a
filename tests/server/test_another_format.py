"""Another wire format needs one class and one row of the table, and no other change to the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe
import pytest

from dsv4.conversation.answer import Answer
from dsv4.server import formats
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.progress import Reports
from dsv4.server.wire_format import WireFormat, WireRequest


class TelegramFormat(WireFormat):
    """A format with {"to", "say", "live"} in, {"text"} out; errors are {"stop": ...}."""

    name = "telegram"
    paths = ("/telegram/send",)
    count_tokens_paths = ("/telegram/count",)

    def read(self, body: bytes, options: recipe.ConversionOptions) -> TelegramRequest:
        fields = json.loads(body)
        if not isinstance(fields.get("say"), str):
            raise RequestError(422, f"say is {fields.get('say')!r}; allowed: a text", param="say")
        chat = {"model": fields["to"], "messages": [{"role": "user", "content": fields["say"]}]}
        try:
            converted = recipe.ChatCompletionRequest(json.dumps(chat).encode()).convert(options)
        except recipe.ConversionError as error:
            raise RequestError.from_recipe(error) from error
        return TelegramRequest(fields["to"], bool(fields.get("live")), Reports(), converted)

    def token_count(self, count: int) -> dict[str, Any]:
        return {"words": count}

    def event(self, chunk: Any) -> Event:
        delta = json.loads(chunk.to_json())["choices"][0]["delta"]
        return Event(json.dumps({"text": delta.get("content") or ""}), "part")

    def last_words(self) -> bytes:
        return Event("over and out").encode()

    def ping(self) -> bytes:
        return Event("still here", "wait").encode()

    def error_body(self, error: RequestError) -> dict[str, Any]:
        return {"stop": error.message, "at": error.param}


@dataclass(frozen=True)
class TelegramRequest(WireRequest):
    converted: recipe.ConversationRequest

    def turn(self, model: Any) -> Any:
        return model.prepare(self.converted)

    def count_tokens(self, model: Any) -> int:
        return model.prompt(self.converted.conversation).count(model.prompts.tokenizer)

    def reader(self, model: Any, turn: Any, answer_id: str) -> Answer:
        return model.answer(turn, recipe.ChatCompletionRequest.chunk_generator(self.converted, answer_id, self.model))

    def whole_answer(self, turn: Any, answer_id: str) -> TelegramAnswer:
        return TelegramAnswer()


class TelegramAnswer:
    text = ""

    def accumulate(self, chunk: Any) -> None:
        self.text += json.loads(chunk.to_json())["choices"][0]["delta"].get("content") or ""

    def to_json(self) -> str:
        return json.dumps({"text": self.text})


@pytest.fixture
def start(model, serve, monkeypatch):
    """start(**options) -> a server that also serves the Telegram format."""
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, TelegramFormat()))
    model.reply = "</think>one two"
    return lambda **options: serve(model, **options)


LETTER = {"to": "tiny", "say": "hi"}


def test_another_format_is_answered_whole_and_streamed(start) -> None:
    with start() as served:
        http = served.http()
        assert http.post("/telegram/send", json=LETTER).json() == {"text": "one two"}
        frames = http.post("/telegram/send", json=LETTER | {"live": True}).text.split("\n\n")[:-1]
        assert frames.pop() == "data: over and out"
        assert all(frame.startswith("event: part\ndata: ") for frame in frames)
        assert "".join(json.loads(frame.partition("data: ")[2])["text"] for frame in frames) == "one two"
        counted = http.post("/telegram/count", json=LETTER).json()
        assert counted == {"words": len(served.model.prompts[0])}


def test_another_format_has_its_own_errors_everywhere(start) -> None:
    with start(api_keys=["sk-1"]) as served:
        http = served.http()
        locked = http.post("/telegram/send", json=LETTER)
        assert (locked.status_code, sorted(locked.json())) == (401, ["at", "stop"])
        key = {"x-api-key": "sk-1"}
        wrong = http.post("/telegram/send", json={"to": "tiny", "say": 5}, headers=key)
        assert (wrong.status_code, wrong.json()) == (422, {"stop": "say is 5; allowed: a text", "at": "say"})
        unknown = http.post("/telegram/send", json=LETTER | {"to": "nobody"}, headers=key)
        assert unknown.status_code == 400 and "you passed nobody" in unknown.json()["stop"]
        assert http.get("/telegram/send", headers=key).json()["stop"].endswith("Method Not Allowed; send POST")
        assert "error" in http.post("/v1/chat/completions", json={}, headers=key).json(), "the others keep theirs"


def test_a_stream_of_another_format_is_kept_alive_and_ends_with_its_own_error(start) -> None:
    with start(keep_alive_seconds=0.05) as served:
        served.model.seconds_of_prefill = 0.5
        reply = served.model.reply
        served.model.reply = lambda prompt: fail_soon(served.model, reply)
        text = served.http().post("/telegram/send", json=LETTER | {"live": True}).text
        assert text.startswith("event: wait\ndata: still here\n\n")
        assert text.rstrip().split("\n\n")[-1].startswith('data: {"stop": "')
        assert "out of order" in text and "over and out" not in text


def fail_soon(model, reply: str) -> str:
    """Makes the model fail after the first token; returns the reply."""
    model.fail = "out of order"
    return reply
