"""The ledger through the server: every request, in every format, is recorded as its own answer counts it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from dsv4.engine import LLM
from dsv4.server.balance import GRANT_USD
from dsv4.server.chat_completions import CHAT
from dsv4.server.key_limits import KeyLimiter
from dsv4.server.served_models import ServedModel, ServedModels
from dsv4.server.service import ChatService
from dsv4.usage.ledger import Ledger
from dsv4.usage.records import UsageRecord, masked
from dsv4.usage.store import UsageStore, open_store, read_records
from tests.server.conftest import ScriptedModel, Served, serving
from tests.server.responses_api import markup

Serve = Callable[..., AbstractContextManager[Served]]
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}]}
KEY = "sk-a-key-that-is-long-enough-9999"


class Recording:
    """A ledger in a file, and the records in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(open_store(str(path)))

    def records(self, count: int) -> list[UsageRecord]:
        """The records, once there are `count`."""
        deadline = time.monotonic() + 20
        while True:
            found = list(read_records(open_store(str(self.path))))
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) == count
                return found
            time.sleep(0.02)


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    recording = Recording(tmp_path / "usage.db")
    yield recording
    recording.ledger.close()


def test_every_format_is_recorded_as_its_answer_counts(
    model: ScriptedModel, serve: Serve, recording: Recording
) -> None:
    """Reasoning, whole and streamed, with the keys and users of both SDKs."""
    model.reply = "the mat on</think>the cat sat"
    usages: list[tuple[int, int, int, int | None]] = []
    with serve(model, ledger=recording.ledger, api_keys=[KEY]) as served:
        served.key = KEY
        chat, messages = served.openai(), served.anthropic()
        whole = chat.chat.completions.create(model="deepseek-v4-pro", extra_body={"user_id": "ann"}, **ASK)
        assert whole.usage and whole.usage.completion_tokens_details and whole.usage.prompt_tokens_details
        usages.append(
            (
                whole.usage.prompt_tokens,
                whole.usage.prompt_tokens_details.cached_tokens or 0,
                whole.usage.completion_tokens,
                whole.usage.completion_tokens_details.reasoning_tokens,
            )
        )
        stream = chat.chat.completions.create(
            model="deepseek-v4-pro", user="bob", stream=True, stream_options={"include_usage": True}, **ASK
        )
        usage = [chunk.usage for chunk in stream][-1]
        assert usage and usage.completion_tokens_details and usage.prompt_tokens_details
        details = usage.prompt_tokens_details
        usages.append(
            (
                usage.prompt_tokens,
                details.cached_tokens or 0,
                usage.completion_tokens,
                usage.completion_tokens_details.reasoning_tokens,
            )
        )
        message = messages.messages.create(
            model="claude-opus-5", max_tokens=64, metadata={"user_id": "eve"}, thinking={"type": "adaptive"}, **ASK
        )
        cached = message.usage.cache_read_input_tokens or 0
        usages.append((message.usage.input_tokens + cached, cached, message.usage.output_tokens, None))
        response = chat.responses.create(model="deepseek-v4-pro", input="the cat", user="rex")
        assert response.usage
        usages.append(
            (
                response.usage.input_tokens,
                response.usage.input_tokens_details.cached_tokens,
                response.usage.output_tokens,
                response.usage.output_tokens_details.reasoning_tokens,
            )
        )
        records = recording.records(4)
    assert [record.request_id for record in records[:2]] == [whole.id, records[1].request_id]
    for record, (prompt, hit, completion, reasoning) in zip(records, usages, strict=True):
        assert (record.prompt_tokens, record.cache_hit_tokens) == (prompt, hit)
        assert record.cache_miss_tokens == prompt - hit
        assert record.completion_tokens == completion
        assert reasoning is None or record.reasoning_tokens == reasoning > 0
        assert record.finish_reason == "stop" and record.seconds >= 0
        assert record.api_key == masked(KEY) and record.cost_usd is not None and record.cost_usd > 0
    assert [(record.wire_format, record.model, record.user_id) for record in records] == [
        ("chat.completions", "deepseek-v4-pro", "ann"),
        ("chat.completions", "deepseek-v4-pro", "bob"),
        ("messages", "claude-opus-5", "eve"),
        ("responses", "deepseek-v4-pro", "rex"),
    ]


def test_hits_of_the_prefix_cache_are_recorded(recording: Recording) -> None:
    """The embedded model, asked the same twice."""
    with serving(LLM(max_num_seqs=1), ledger=recording.ledger) as served:
        for _ in range(2):
            answer = served.openai().chat.completions.create(model="deepseek-v4-flash", max_tokens=4, **ASK)
        first, second = recording.records(2)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert first.cache_hit_tokens == 0
    assert second.cache_hit_tokens == answer.usage.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1
    assert first.cost_usd is not None and second.cost_usd is not None and second.cost_usd < first.cost_usd


def test_answers_cut_short_are_recorded(model: ScriptedModel, serve: Serve, recording: Recording) -> None:
    """By max_tokens within the reasoning, by a stop string, and without any thinking."""
    model.reply = "the cat sat on the mat"
    ask = ASK | {"model": "tiny"}
    with serve(model, ledger=recording.ledger) as served:
        client = served.openai()
        cut = client.chat.completions.create(max_tokens=5, **ask)
        model.reply = "the cat sat on the mat"
        plain = {"thinking": {"type": "disabled"}}
        client.chat.completions.create(extra_body=plain, **ask)
        stopped = client.chat.completions.create(stop="sat", extra_body=plain, **ask)
        first, second, third = recording.records(3)
    assert cut.usage and cut.usage.completion_tokens_details
    assert (first.finish_reason, first.completion_tokens, first.reasoning_tokens) == ("length", 5, 5)
    assert cut.usage.completion_tokens_details.reasoning_tokens == 5
    assert (second.finish_reason, second.reasoning_tokens) == ("stop", 0)
    assert stopped.usage and third.completion_tokens == stopped.usage.completion_tokens
    assert third.finish_reason == "stop" and third.completion_tokens < second.completion_tokens
    assert first.api_key == "", "a key that nobody has checked is not kept"
    assert first.cost_usd is None, "a model that is not DeepSeek's has no official price"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = "</think>" + markup("f", x="v")


def test_calls_that_end_at_the_limit_are_recorded_as_they_were_told(
    model: ScriptedModel, serve: Serve, recording: Recording
) -> None:
    model.reply = CALL
    with serve(model, ledger=recording.ledger) as served:
        client, last = served.openai(), len(model.tokenizer.encode(CALL))
        create = functools.partial(client.chat.completions.create, model="tiny", tools=[TOOL], **ASK)
        told = [create(max_tokens=limit).choices[0].finish_reason for limit in (last, last - 1)]
        records = recording.records(2)
    assert told == ["tool_calls", "length"] and [record.finish_reason for record in records] == ["stop", "length"]


def test_a_client_that_leaves_with_the_last_chunk_has_the_whole_answer(
    model: ScriptedModel, serve: Serve, recording: Recording
) -> None:
    """The engine is told before, and the ledger says what the client was told."""
    model.reply = lambda prompt: CALL + "word " * 200
    with serve(model, ledger=recording.ledger) as served:
        service, body = ChatService(ServedModels([ServedModel.of(served.engine)]), ledger=recording.ledger), dict(ASK)
        body |= {"model": "tiny", "stream": True, "tools": [TOOL]}

        async def leave() -> None:
            async with contextlib.aclosing(service.frames(service.prepare(CHAT, json.dumps(body).encode()))) as frames:
                async for frame in frames:
                    if '"finish_reason":"tool_calls"' in frame.data:
                        return
            raise AssertionError("no last chunk")

        asyncio.run(leave())
        (record,) = recording.records(1)
    assert record.finish_reason == "stop"


def test_a_client_that_leaves_is_recorded_as_cancelled(
    model: ScriptedModel, serve: Serve, recording: Recording
) -> None:
    model.reply = "</think>" + "the cat sat " * 200
    model.seconds_per_step = 0.02
    with serve(model, ledger=recording.ledger) as served:
        stream = served.openai().chat.completions.create(model="tiny", stream=True, **ASK)
        next(iter(stream))
        stream.close()
        (record,) = recording.records(1)
        served.wait_until_idle()
    assert record.finish_reason == "cancelled"
    assert 0 < record.completion_tokens < 400 and record.prompt_tokens > 0


def test_several_completions_have_one_finish_reason(model: ScriptedModel, serve: Serve, recording: Recording) -> None:
    """Cancelled where one of them has not ended; length where that ended one, whichever ended last."""
    model.reply = lambda prompt: "the cat sat" * 200 if len(prompt) > 1 else "a"
    model.seconds_per_step = 0.01
    with serve(model, ledger=recording.ledger, max_num_seqs=1) as served:
        client = served.openai()
        stream = client.completions.create(model="tiny", prompt=["", "the cat"], stream=True)
        assert "stop" in (chunk.choices[0].finish_reason for chunk in stream)
        stream.close()
        served.wait_until_idle()
        model.reply = lambda prompt: "the cat sat" * 200 if len(prompt) == 1 else "a"
        answer = client.completions.create(model="tiny", prompt=["", "the cat"], max_tokens=4)
        cancelled, cut = recording.records(2)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop"]
    assert (cancelled.finish_reason, cut.finish_reason) == ("cancelled", "length")


def test_completions_are_recorded_as_their_usage_counts(
    model: ScriptedModel, serve: Serve, recording: Recording
) -> None:
    """A prompt that is given twice, candidates of one, and a completion that shows none; the key's limit too."""
    requests: list[dict[str, Any]] = [
        {"prompt": ["the cat", "the cat"]},
        {"prompt": ["the cat", "the cat"], "n": 2},
        {"prompt": "the cat", "echo": True, "max_tokens": 0},
    ]
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch, serve(model, ledger=recording.ledger, api_keys=[KEY]) as served:
        patch.setattr(KeyLimiter, "take", lambda self, key, tokens: taken.append(tokens))
        served.key = KEY
        for number, request in enumerate(requests, 1):
            usage = served.openai().completions.create(model="tiny", **request).usage
            record = recording.records(number)[-1]
            assert usage is not None
            assert (record.prompt_tokens, record.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
            assert sum(taken) == usage.total_tokens
            taken.clear()
    assert record.completion_tokens == 0


def test_a_failed_answer_is_recorded_and_a_refused_request_is_not(
    model: ScriptedModel, serve: Serve, recording: Recording
) -> None:
    with serve(model, ledger=recording.ledger) as served:
        with pytest.raises(openai.BadRequestError):
            served.openai().chat.completions.create(model="nothing", **ASK)
        model.fail = "no more"
        with pytest.raises(openai.InternalServerError):
            served.openai().chat.completions.create(model="tiny", **ASK)
        (record,) = recording.records(1)
    assert record.finish_reason == "error" and record.prompt_tokens == record.completion_tokens == 0


def test_no_key_is_in_the_file(model: ScriptedModel, serve: Serve, recording: Recording) -> None:
    short = "sk-short-key"
    with serve(model, ledger=recording.ledger, api_keys=[KEY, short]) as served:
        for key in (KEY, short):
            served.key = key
            served.openai().chat.completions.create(model="tiny", **ASK)
        long_record, short_record = recording.records(2)
    assert long_record.api_key.startswith("****9999#") and short_record.api_key.startswith("****#")
    files = b"".join(path.read_bytes() for path in recording.path.parent.iterdir())
    assert KEY.encode() not in files and short.encode() not in files


class BrokenStore:
    """A database that fails until it is mended."""

    def __init__(self, path: Path) -> None:
        self.inner: UsageStore = open_store(str(path))
        self.broken = True

    def write(self, sql: str, rows: Any = ()) -> None:
        if self.broken:
            raise sqlite3.OperationalError("disk I/O error")
        self.inner.write(sql, rows)

    def read(self, sql: str, values: Any) -> Any:
        if self.broken:
            raise sqlite3.OperationalError("disk I/O error")
        return self.inner.read(sql, values)

    def close(self) -> None:
        self.inner.close()


def test_answers_do_not_need_the_database(model: ScriptedModel, serve: Serve, tmp_path: Path) -> None:
    """Records wait for it, further ones are counted, and the balance is answered."""
    store = BrokenStore(tmp_path / "usage.db")
    ledger = Ledger(store, capacity=2)
    with contextlib.closing(ledger), serve(model, ledger=ledger) as served:
        for _ in range(8):
            assert served.openai().chat.completions.create(model="tiny", **ASK).choices[0].message.content == "ok"
        dropped = ledger.num_dropped
        assert dropped > 0
        balance = served.http().get("/user/balance").json()
        assert balance["is_available"] and "usage" not in balance
        store.broken = False
        deadline = time.monotonic() + 30
        while ledger.num_written < 8 - dropped and time.monotonic() < deadline:
            time.sleep(0.02)
    assert (ledger.num_written, ledger.num_dropped) == (8 - dropped, dropped)
    assert len(list(read_records(store.inner))) == 8 - dropped


def test_the_balance_counts_down_by_key(model: ScriptedModel, serve: Serve, recording: Recording) -> None:
    model.reply = "</think>ok"
    with serve(model, ledger=recording.ledger, api_keys=[KEY, "other"]) as served:
        served.key = KEY
        served.openai().chat.completions.create(model="deepseek-v4-pro", **ASK)
        (record,) = recording.records(1)
        for path in ("/user/balance", "/v1/user/balance"):
            mine = served.http(headers={"Authorization": f"Bearer {KEY}"}).get(path).json()
            other = served.http(headers={"Authorization": "Bearer other"}).get(path).json()
        assert served.http().get("/user/balance").status_code == 401
    assert mine["usage"] == {
        "api_key": masked(KEY),
        "requests": 1,
        "cost_usd": f"{record.cost_usd:.6f}",
        "dropped_records": 0,
    }
    assert other["usage"]["requests"] == 0
    (info,) = other["balance_infos"]
    assert other["is_available"] is True and info == {
        "currency": "USD",
        "total_balance": f"{GRANT_USD:.2f}",
        "granted_balance": f"{GRANT_USD:.2f}",
        "topped_up_balance": "0.00",
    }


def test_without_a_ledger_the_balance_is_the_grant(server: Served) -> None:
    assert set(server.http().get("/user/balance").json()) == {"is_available", "balance_infos"}
