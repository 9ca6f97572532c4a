"""Progress and timings on the wire: only on request, and in streams that real clients can still read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import pytest

from dsv4.usage.prices import Tokens, price_list
from tests.server.conftest import ScriptedModel, Served

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}]}
REPORTS = {"return_progress": True, "timings_per_token": True}
TIMINGS = {
    "cache_n",
    "prompt_n",
    "prompt_ms",
    "prompt_per_second",
    "predicted_n",
    "predicted_ms",
    "predicted_per_second",
    "queue_ms",
}


def frames(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The JSON chunks of a streamed answer, which must end with [DONE]."""
    response = served.http().post("/v1/chat/completions", json=ASK | {"stream": True} | fields)
    assert response.status_code == 200, response.text
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(text) for text in data]


def test_nothing_is_added_unless_asked_for(server: Served) -> None:
    for fields in ({}, {"return_progress": False, "timings_per_token": None}):
        chunks = frames(server, **fields)
        assert all(chunk["choices"] for chunk in chunks)
        assert all(chunk.keys().isdisjoint({"prompt_progress", "queue", "timings"}) for chunk in chunks)


def test_progress_stands_before_the_answer_and_timings_after_it(server: Served) -> None:
    server.model.reply, server.model.seconds_per_step = "cat</think>the mat", 0.005
    chunks = frames(server, return_progress=True)
    first, *rest = chunks
    total = first["prompt_progress"]["total"]
    assert first["prompt_progress"] == {"total": total, "cache": 0, "processed": 0, "time_ms": 0}
    assert first["queue"]["position"] == 0
    last_progress = [chunk for chunk in rest if "prompt_progress" in chunk][-1]
    assert last_progress["prompt_progress"]["processed"] == total and "queue" not in last_progress
    answered = [place for place, chunk in enumerate(chunks) if chunk["choices"]]
    told = [place for place, chunk in enumerate(chunks) if "prompt_progress" in chunk]
    assert max(told) < min(answered) and max(answered) == len(chunks) - 2
    assert not any("timings" in chunk for chunk in chunks[:-1])
    timings = chunks[-1]["timings"]
    assert chunks[-1]["choices"] == [] and timings.keys() == TIMINGS
    cost = price_list().cost("deepseek-v4-flash", datetime.now(UTC), Tokens(0, total, timings["predicted_n"]))
    assert chunks[-1]["official_cost"] == {"model": "deepseek-v4-flash", "usd": pytest.approx(cost, abs=1e-9)}
    assert (timings["prompt_n"], timings["cache_n"]) == (total, 0)
    assert timings["predicted_n"] == chunks[-2]["usage"]["completion_tokens"]
    assert timings["predicted_ms"] >= (timings["predicted_n"] - 1) * 5
    rate = (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1000
    assert timings["predicted_per_second"] == pytest.approx(rate, rel=0.01)
    assert {chunk["id"] for chunk in chunks} == {first["id"]} and {chunk["model"] for chunk in chunks} == {"tiny"}


def test_timings_of_every_chunk_count_the_tokens(server: Served) -> None:
    server.model.reply = "cat</think>the mat"
    chunks = frames(server, timings_per_token=True, stream_options={"include_usage": True})
    assert not any("prompt_progress" in chunk for chunk in chunks)
    counts = [chunk["timings"]["predicted_n"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1
    assert chunks[0]["timings"]["predicted_per_second"] is None, "one token has no rate"
    costs = [chunk["official_cost"]["usd"] for chunk in chunks]
    assert costs == sorted(costs) and 0 < costs[0] < costs[-1], "an answer that is stopped has one too"


def test_a_whole_answer_carries_timings_when_asked(server: Served) -> None:
    client = server.http()
    plain, timed = (client.post("/v1/chat/completions", json=ASK | fields).json() for fields in ({}, REPORTS))
    assert timed.pop("timings").keys() == TIMINGS
    assert timed.pop("official_cost")["model"] == "deepseek-v4-flash"
    assert timed.keys() == plain.keys() and timed["choices"] == plain["choices"]


@pytest.mark.parametrize("name", ["return_progress", "timings_per_token"])
def test_a_switch_that_is_no_boolean_is_refused_by_name(server: Served, name: str) -> None:
    response = server.http().post("/v1/chat/completions", json=ASK | {name: "yes"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert f'{name}: "yes" is no boolean' in error["message"] and error["param"] == name


def test_messages_carry_no_progress_and_no_timings(server: Served) -> None:
    body = ASK | REPORTS | {"max_tokens": 20, "stream": True}
    text = server.http().post("/anthropic/v1/messages", json=body).text
    assert "message_stop" in text and "prompt_progress" not in text and "timings" not in text


def test_openai_sdk_reads_a_stream_with_reports(server: Served) -> None:
    server.model.reply = "cat</think>the mat"
    client = server.openai()
    options: Any = {"model": "tiny", "messages": ASK["messages"], "extra_body": REPORTS}
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "the mat"
    assert chunks[0].model_extra["prompt_progress"]["processed"] == 0
    assert chunks[-1].model_extra["timings"]["predicted_n"] > 3
    with client.chat.completions.stream(**options) as events:  # the SDK's own accumulator
        for _ in events:
            pass
        final = events.get_final_completion()
    assert final.choices[0].message.content == "the mat"
    assert client.chat.completions.create(**options).choices[0].message.content == "the mat"


@pytest.mark.parametrize("place", ["queue", "prompt"])
def test_a_client_that_leaves_before_its_answer_is_dropped_at_once(
    serve: Callable[..., AbstractContextManager[Served]], model: ScriptedModel, place: str
) -> None:
    model.seconds_per_step = 0.02
    # Of a prompt that is read, most is left at the first report: its reader needs time to leave before the end.
    model.seconds_of_prefill = 0.2 if place == "prompt" else 0.02
    prompt = "the cat sat " * 4000  # about ten steps
    with serve(model, max_num_seqs=1, max_model_len=65536) as served:
        client, body = served.http(), ASK | {"stream": True, "return_progress": True}
        if place == "queue":
            model.reply = "</think>" + "cat " * 2000
            client.send(client.build_request("POST", "/v1/chat/completions", json=body), stream=True)
            served.wait_until_running()
        body["messages"] = [{"role": "user", "content": prompt}]
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            reports = (json.loads(line[6:]) for line in lines if line.startswith("data: "))
            if place == "queue":
                assert next(reports)["queue"]["position"] == 0
                wait_until(lambda: served.engine.num_waiting == 1)
            else:
                next(r for r in reports if 0 < r["prompt_progress"]["processed"] < r["prompt_progress"]["total"])
        wait_until(lambda: served.engine.num_waiting == 0)
        if place == "queue":
            assert served.engine.num_running == 1, "the other goes on"
        else:
            served.wait_until_idle()
            assert model.num_sampled == 0, "the prompt was not read to its end"
        served.closing.close()
        served.wait_until_idle()


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
