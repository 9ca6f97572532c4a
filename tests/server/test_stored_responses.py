"""Stored responses: continued, read, listed and deleted through OpenAI's SDK, bounded, and kept from others."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from dsv4.server.config import ServerConfig
from dsv4.server.response_store import NotStoredError, ResponseStore
from dsv4.server.run import serve
from tests.server.responses_api import CALL, QUESTION, STREAMED, WEATHER, ask, markup, output, prompt, refused


def response(name: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "output": [{"type": "message", "text": text}]}


@STREAMED
def test_a_response_is_continued_exactly_with_its_reasoning(server, streamed: bool) -> None:
    server.model.reply = CALL
    first = output(server, streamed, input=[QUESTION], tools=[WEATHER], instructions="Be brief.")
    assert first.store is True
    result = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "sun"}
    wrote = server.model.prompts[-1] + server.model.tokenizer.encode(CALL)
    server.model.reply = "sunny</think>Sunny."
    options = {"tools": [WEATHER], "instructions": "Be brief."}
    second = output(server, streamed, input=[result], previous_response_id=first.id, **options)
    assert (second.output_text, second.previous_response_id) == ("Sunny.", first.id)
    assert server.model.prompts[-1][: len(wrote)] == wrote
    third = output(server, streamed, input="And Bergen?", previous_response_id=second.id, tools=[WEATHER])
    assert "Be brief." not in prompt(server), "instructions are of one request"
    assert prompt(server).endswith(
        "sunny</think>Sunny.<｜end▁of▁sentence｜><｜User｜>And Bergen?<｜Assistant｜><think>"
    )
    counted = server.openai().responses.input_tokens.count(
        model="tiny", input="And Bergen?", previous_response_id=second.id, tools=[WEATHER]
    )
    assert counted.input_tokens == third.usage.input_tokens


def test_a_response_is_read_listed_and_deleted(server) -> None:
    api = server.openai().responses
    first = ask(server, input="One?")
    parts = [{"type": "input_text", "text": "Two?"}]
    second = ask(server, input=[{"role": "user", "content": parts}], previous_response_id=first.id, metadata={"a": "b"})
    assert api.retrieve(second.id) == second
    listed = api.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in listed] == ["One?", "ok", "Two?"]
    assert [item.role for item in listed] == ["user", "assistant", "user"] and len({item.id for item in listed}) == 3
    pages = api.input_items.list(second.id, limit=2)
    assert pages.has_more and [item.id for item in pages] == [item.id for item in listed[::-1]], "every page"
    with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
        api.cancel(second.id)
    http = server.http()
    for query, field in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after")):
        answer = http.get(f"/v1/responses/{second.id}/input_items?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert http.get(f"/v1/responses/{second.id}?stream=true").json()["error"]["param"] == "stream"
    assert http.delete(f"/responses/{first.id}").json() == {"id": first.id, "object": "response", "deleted": True}
    for call in (api.retrieve, api.delete, api.cancel, api.input_items.list):
        with pytest.raises(openai.NotFoundError, match=f"'{first.id}' not found"):
            call(first.id)
    place, words = refused(server, previous_response_id=second.id)
    assert place == "previous_response_id" and words == f"Previous response with id '{first.id}' not found"
    assert api.retrieve(second.id).id == second.id


def test_items_are_sent_by_reference(server) -> None:
    server.model.reply = CALL
    first = ask(server, input=[QUESTION], tools=[WEATHER])
    server.model.reply = "</think>Sunny."
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    result = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "sun"}
    second = ask(server, input=[QUESTION, *references, result], tools=[WEATHER])
    wrote = server.model.prompts[0] + server.model.tokenizer.encode(CALL)
    assert server.model.prompts[-1][: len(wrote)] == wrote
    listed = server.openai().responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in listed] == ["message", "reasoning", "function_call", "function_call_output"]
    for wanted in ("msg_1", "rs_resp_00_0", references[0]["id"] + "0", 5):
        place, words = refused(server, input=[QUESTION, {"type": "item_reference", "id": wanted}])
        assert place == "input[1].id" and f"{wanted!r} not found" in words


def test_what_is_not_to_be_stored_is_not(server) -> None:
    unstored = ask(server, store=False)
    assert unstored.store is False and refused(server, previous_response_id=unstored.id)[0] == "previous_response_id"
    assert refused(server, previous_response_id="resp_0")[1] == "Previous response with id 'resp_0' not found"
    # An answer that its client has left is not stored either.
    server.model.reply, server.model.seconds_per_step = "a" * 3000, 0.002
    body = {"model": "tiny", "input": "x", "stream": True}
    with server.http().stream("POST", "/v1/responses", json=body) as stream:
        name = next(line for line in stream.iter_lines() if '"id":"resp_' in line).partition('"id":"')[2].split('"')[0]
    server.wait_until_idle()
    assert server.http().get(f"/v1/responses/{name}").status_code == 404


def test_custom_calls_are_continued(server) -> None:
    tools = [{"type": "custom", "name": "shell", "description": "Runs it."}]
    server.model.reply = "</think>\n\n" + markup("shell", input="ls")
    first = ask(server, input=[QUESTION], tools=tools)
    wrote = server.model.prompts[-1] + server.model.tokenizer.encode(server.model.reply)
    server.model.reply = "</think>a.txt"
    result = {"type": "custom_tool_call_output", "call_id": first.output[0].call_id, "output": "a.txt"}
    assert ask(server, input=[result], tools=tools, previous_response_id=first.id).output_text == "a.txt"
    assert server.model.prompts[-1][: len(wrote)] == wrote


def test_responses_belong_to_their_key(model, serve) -> None:
    with serve(model, api_keys=["sk-1", "sk-2"]) as served:
        served.key = "sk-1"
        mine = ask(served)
        assert served.openai().responses.retrieve(mine.id).id == mine.id
        served.key = "sk-2"
        api = served.openai().responses
        for call in (api.retrieve, api.delete, api.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(mine.id)
        assert refused(served, previous_response_id=mine.id)[0] == "previous_response_id"
        reference = {"type": "item_reference", "id": mine.output[0].id}
        assert refused(served, input=[reference])[0] == "input[0].id"
        assert served.http().get(f"/v1/responses/{mine.id}").status_code == 401


def test_a_file_outlives_the_server_and_is_private(model, serve, tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    for turn in range(2):
        store = ResponseStore(path)
        with serve(model, responses=store) as served:
            if turn == 0:
                first = ask(served, input="One?")
            else:
                assert served.openai().responses.retrieve(first.id) == first
                ask(served, input="Two?", previous_response_id=first.id)
                assert "One?" in prompt(served)
        store.close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_response_is_stored_while_others_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore()
    store.save("me", response("a"), "[]", None)
    store.save("me", response("b"), "[]", "a")
    parse, saved = json.loads, list[bool]()

    with ThreadPoolExecutor(1) as threads:

        def save_and_parse(text: str) -> Any:
            name = f"meanwhile {len(saved)}"
            saved.append(threads.submit(store.save, "me", response(name), "[]", None).result(60))
            return parse(text)

        monkeypatch.setattr("dsv4.server.response_store.json.loads", save_and_parse)
        assert [found.response["id"] for found in store.chain("me", "b")] == ["a", "b"]
        assert store.get("me", "b").previous == "a"
    assert saved == [True] * 6
    store.close()


def test_the_store_is_bounded_and_drops_what_was_not_used_for_longest() -> None:
    store = ResponseStore(max_bytes=1000)
    for name in ("a", "b", "c"):
        assert store.save("", response(name, "x" * 200), "[]", None)
    store.chain("", "a")
    assert store.save("", response("d", "x" * 200), "[]", "a")
    with pytest.raises(NotStoredError, match="b"):
        store.get("", "b")
    assert [stored.response["id"] for stored in store.chain("", "d")] == ["a", "d"]
    assert not store.save("", response("e", "x" * 2000), "[]", None), "too large: nothing else goes for it"
    assert store.get("", "a") and store.get("", "d")
    store.close()
    assert not store.save("", response("f"), "[]", None), "an answer is not lost because it cannot be stored"


def test_a_server_that_stores_nothing_says_so(model, serve) -> None:
    with serve(model, responses=ResponseStore(max_bytes=0)) as served:
        answer = ask(served, store=True)
        assert answer.store is False and answer.output_text == "ok"
        assert refused(served, previous_response_id=answer.id)[0] == "previous_response_id"


def test_other_files_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("Not a database at all, but long enough to look at." * 9)
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE notes (text)")
    before = text.read_bytes(), other.read_bytes()
    for path in (text, other):
        with pytest.raises(ValueError, match=f"{path.name} is .*no store of responses"):
            serve("/no/such/model", port=0, response_store=str(path))
    assert before == (text.read_bytes(), other.read_bytes())
    with pytest.raises(ValueError, match="response_store_bytes is -1; allowed: 0 or more bytes"):
        ServerConfig(response_store_bytes=-1)
