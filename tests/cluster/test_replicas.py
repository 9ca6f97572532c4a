"""Several engines behind one server: the same answers, prefixes found again, death, cancelling, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from dsv4.engine.cluster.client import ClusterEngine
from dsv4.engine.cluster.connection import Cluster, ReplicaPlan

from ..server.conftest import Served, serving
from ..server.scripted_engine import dies_of
from ..server.scripted_model import ScriptedModel
from .conftest import CONFIG, HANG, Replicas, chunks, replica_processes, text_of, until

pytestmark = pytest.mark.cluster
CHAT = "/v1/chat/completions"


def body(text: str, **fields: Any) -> dict[str, Any]:
    """A chat; its seed makes it the same again, as thinking ignores the temperature."""
    messages = [{"role": "user", "content": text}]
    return {"model": "dsv4-nano", "messages": messages, "max_tokens": 24, "seed": 1, **fields}


def endless(prompt: str, max_tokens: int) -> dict[str, Any]:
    """A completion that ends after `max_tokens` tokens and no sooner."""
    return {"model": "dsv4-nano", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": body("hello", temperature=0, thinking={"type": "disabled"}),
    "thinking": body("hello"),
    "sampled": body(text_of(0), seed=7, temperature=1.2, top_p=0.9, logprobs=True, top_logprobs=3),
    "json": body("count in json", response_format={"type": "json_object"}, temperature=0),
    "tools": body(
        "weather?",
        seed=5,
        tools=[{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}],
        tool_choice="required",
    ),
    "stop": body("hello", temperature=0, stop=["e"]),
}
REFUSED: dict[str, dict[str, Any]] = {
    "too long": body("cat " * 9000),
    "bad schema": body(
        "x", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}
    ),
    "bad temperature": body("x", temperature=-1),
}


TEXTS = re.compile(r'"(content|reasoning_content|arguments|finish_reason)": "((?:[^"\\]|\\.)*)"')


def comparable(answer: Any) -> Any:
    """An answer without what differs between two runs."""
    text = json.dumps(answer, sort_keys=True)
    return re.sub(r'"(id|created|cached_tokens|prompt_cache_\w+)": ?("[^"]*"|\d+)', "", text)


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_one_local_engine(replicas: Replicas, local: Served, name: str) -> None:
    wanted = httpx.post(local.url + CHAT, json=REQUESTS[name], timeout=HANG)
    assert wanted.status_code == 200, wanted.text
    for _ in range(3):  # by both replicas, and with and without a stored prefix
        found = httpx.post(replicas.url + CHAT, json=REQUESTS[name], timeout=HANG)
        assert comparable(found.json()) == comparable(wanted.json())
    streamed = [comparable(chunk) for chunk in chunks(replicas.url, REQUESTS[name])]
    assert _texts(streamed) == _texts([comparable(chunk) for chunk in chunks(local.url, REQUESTS[name])])


def test_several_completions_of_a_prompt_are_those_of_one_local_engine(replicas: Replicas, local: Served) -> None:
    request = {
        "model": "dsv4-nano",
        "prompt": [text_of(1), "hello"],
        "n": 2,
        "seed": 3,
        "max_tokens": 24,
        "logprobs": 2,
    }
    found, wanted = (
        httpx.post(f"{url}/v1/completions", json=request, timeout=HANG).json() for url in (replicas.url, local.url)
    )
    assert len(found["choices"]) == 4 and comparable(found) == comparable(wanted)


def _texts(parts: list[str]) -> dict[str, str]:
    """Texts of a stream's deltas, joined: how many tokens a chunk has is a matter of time."""
    joined: dict[str, str] = {}
    for part in parts:
        index = "".join(re.findall(r'"index": (\d+)', part)[:1])
        for kind, text in re.findall(
            r'"(content|reasoning_content|arguments|finish_reason)": ("(?:[^"\\]|\\.)*")', part
        ):
            joined[index + kind] = joined.get(index + kind, "") + text.strip('"')
    return joined


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_alike(replicas: Replicas, local: Served, name: str) -> None:
    wanted = httpx.post(local.url + CHAT, json=REFUSED[name], timeout=HANG)
    found = httpx.post(replicas.url + CHAT, json=REFUSED[name], timeout=HANG)
    assert found.status_code == wanted.status_code == 400
    assert found.json() == wanted.json()


def test_the_sdks_stream_and_do_not(replicas: Replicas) -> None:
    with replicas.openai() as client:
        whole = client.chat.completions.create(**body("hello"))
        stream = client.chat.completions.create(**body("hello"), stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    with anthropic.Anthropic(base_url=f"{replicas.url}/anthropic", api_key="x", max_retries=0) as client:
        message = client.messages.create(
            model="dsv4-nano", max_tokens=24, messages=[{"role": "user", "content": "hello"}]
        )
    assert message.usage.output_tokens > 0


def test_a_conversation_goes_on_where_its_prefix_is_and_new_ones_spread(replicas: Replicas) -> None:
    before = replicas.metric("vllm:prompt_tokens_total")
    conversations: list[list[Any]] = [[{"role": "user", "content": text_of(100 + place)}] for place in range(6)]
    prompts = [0] * 6  # tokens of the last turn's
    with replicas.openai() as client:
        for turn in range(3):
            for place, messages in enumerate(conversations):
                answer = client.chat.completions.create(model="dsv4-nano", messages=messages, max_tokens=16)
                assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
                cached = answer.usage.prompt_tokens_details.cached_tokens or 0
                assert cached >= prompts[place] - 1 if turn else cached < 128, (turn, cached)
                prompts[place] = answer.usage.prompt_tokens
                messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
                messages.append({"role": "user", "content": "and then?"})
    read = [after - early for after, early in zip(replicas.metric("vllm:prompt_tokens_total"), before, strict=True)]
    assert len(read) == 2 and min(read) > 0.2 * sum(read), read


def test_a_busy_replica_gives_requests_of_its_prefix_to_the_other(replicas: Replicas) -> None:
    """Ten streams that begin alike: one replica has the prefix, but four at a time."""
    texts = [text_of(200) + f" number {place}" for place in range(10)]
    httpx.post(replicas.url + CHAT, json=body(texts[0]), timeout=HANG)
    before = replicas.metric("vllm:prompt_tokens_total")
    with ThreadPoolExecutor(10) as pool:
        answers = list(
            pool.map(lambda text: httpx.post(replicas.url + CHAT, json=body(text, max_tokens=60), timeout=HANG), texts)
        )
    assert {answer.status_code for answer in answers} == {200}
    read = [after - early for after, early in zip(replicas.metric("vllm:prompt_tokens_total"), before, strict=True)]
    assert min(read) > 0, read


def test_a_client_that_leaves_frees_its_request(replicas: Replicas) -> None:
    until(lambda: replicas.engine.num_running == 0)
    request = endless("hello", 8000)
    with httpx.stream("POST", f"{replicas.url}/v1/completions", json=request, timeout=HANG) as answer:
        lines = answer.iter_lines()  # kept: the connection is closed with it
        next(lines)
        until(lambda: sum(replicas.metric("vllm:num_requests_running")) == 1)
        made = sum(replicas.metric("vllm:generation_tokens_total"))
    until(lambda: sum(replicas.metric("vllm:num_requests_running")) == 0)
    assert sum(replicas.metric("vllm:generation_tokens_total")) - made < 6000  # stopped, not finished
    until(lambda: replicas.engine.num_running == 0)


def test_a_replica_that_is_killed_ends_its_requests_alone_and_comes_back(replicas: Replicas) -> None:
    replicas.until_all_up()
    restarts = replicas.engine.num_restarts
    ends: dict[int, Any] = {}

    def stream(place: int) -> None:
        request = endless(text_of(300 + place), 7000)
        with replicas.openai() as client:
            try:
                *_, last = client.completions.create(extra_body={"ignore_eos": request.pop("ignore_eos")}, **request)
                ends[place] = last.choices[0].finish_reason
            except openai.APIError as error:
                ends[place] = error

    threads = [threading.Thread(target=stream, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(found := replicas.metric("vllm:num_requests_running")) == 2 and min(found) > 0)
    killed = replica_processes()[0]
    killed.kill()
    with replicas.openai() as client:  # at once: the other replica takes it
        answer = client.chat.completions.create(**body("hello"))
    assert answer.choices[0].message.content
    assert httpx.get(f"{replicas.url}/health", timeout=HANG).json()["status"] == "ok"
    for thread in threads:
        thread.join(HANG)
    errors = [end for end in ends.values() if isinstance(end, openai.APIError)]
    assert len(ends) == 4 and 1 <= len(errors) <= 3, ends
    assert {end for end in ends.values() if not isinstance(end, openai.APIError)} == {"length"}
    assert {"service_unavailable"} == {error.type for error in errors}
    assert all("the engine process of a replica has ended; it is started again" in str(error) for error in errors)
    until(lambda: replicas.engine.num_restarts == restarts + 1)
    replicas.until_all_up()
    assert killed.pid not in [process.pid for process in replica_processes()]
    text = httpx.get(f"{replicas.url}/metrics", timeout=HANG).text
    assert f'dsv4:engine_restarts_total{{model_name="dsv4-nano"}} {restarts + 1:.1f}' in text
    assert 'dsv4:replicas_up{model_name="dsv4-nano"} 2.0' in text


def test_without_a_replica_the_server_says_so_until_one_is_back(replicas: Replicas) -> None:
    replicas.until_all_up()
    for process in replica_processes():
        process.kill()
    until(lambda: not replicas.engine.healthy)
    health = httpx.get(f"{replicas.url}/health", timeout=HANG)
    assert health.status_code == 503 and health.json()["status"] == "restarting"
    refused = httpx.post(replicas.url + CHAT, json=body("hello"), timeout=HANG)
    assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true"
    assert "none of 2 replicas" in refused.json()["error"]["message"]
    until(lambda: replicas.engine.healthy)
    with replicas.openai(retries=10) as client:
        assert client.chat.completions.create(**body("hello")).choices[0].message.content
    deep = httpx.get(f"{replicas.url}/health/deep", timeout=HANG).json()
    assert deep["models"]["dsv4-nano"]["status"] == "ok"
    replicas.until_all_up()


def test_the_inspector_traces_an_answer_of_a_replica(replicas: Replicas, local: Served) -> None:
    traces: list[Any] = []
    for url in (replicas.url, local.url):
        answer = httpx.post(url + CHAT, json=REQUESTS["greedy"], timeout=HANG).json()
        assert httpx.get(f"{url}/inspect/{answer['id']}", timeout=HANG).json()["answer_tokens"] > 4
        traces.append(httpx.get(f"{url}/inspect/{answer['id']}/8", timeout=HANG).json())
        beyond = httpx.get(f"{url}/inspect/{answer['id']}/9999", timeout=HANG)
        assert beyond.status_code == 400
    assert traces[0] == traces[1]


def test_a_cancelled_trace_is_not_finished_by_its_replica(replicas: Replicas) -> None:
    tokens = [1 + index % 500 for index in range(4000)]

    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in replica_processes())

    async def trace(whole: float | None) -> float:
        """Processor seconds of a trace, which is cancelled when it has used a tenth of the `whole`."""
        before = seconds()
        tracing = asyncio.create_task(replicas.engine.trace(tokens))
        while not tracing.done() and (whole is None or seconds() < before + whole / 10):
            await asyncio.sleep(0.02)
        assert tracing.done() == (whole is None)
        tracing.cancel()
        # A replica computes one trace at a time: these wait for what is left of the first.
        await asyncio.gather(*(replicas.engine.trace(tokens[:8]) for _ in range(8)))
        return seconds() - before

    whole = asyncio.run(trace(None))
    assert asyncio.run(trace(whole)) < whole / 2


def test_a_prompt_that_has_ended_two_replicas_is_refused(cluster: Cluster, folder: Path) -> None:
    """The replica that it ended judges its own requests alone: those of the other go on, and are no suspects."""
    fatal = ScriptedModel(folder).tokenizer.encode("doom")
    make = partial(dies_of, folder, fatal, {"reply": "abcdefgh" * 40, "seconds_per_step": 0.05})
    engine = ClusterEngine(cluster, ReplicaPlan("tiny", make, CONFIG, num_replicas=2, threads=1))
    with serving(engine, keep_alive_seconds=HANG) as served:  # type: ignore[arg-type]  # a blank line would be a 200

        def ask(text: str, **fields: Any) -> httpx.Response:
            request = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 300}
            return httpx.post(served.url + CHAT, json=request | fields, timeout=HANG)

        with ThreadPoolExecutor(16) as pool:
            for _ in range(2):
                until(lambda: engine.num_up == 2)
                others: list[Future[httpx.Response]] = []
                while len(running := Replicas(served, engine).metric("vllm:num_requests_running")) < 2 or not min(
                    running
                ):
                    others.append(pool.submit(ask, f"cat {len(others)}"))
                    time.sleep(0.1)
                crashed = ask("doom")
                assert crashed.status_code == 503 and crashed.headers["retry-after"]
                assert {other.result().status_code for other in others} == {200, 503}, "one replica has ended"
        until(lambda: engine.num_up == 2)
        before = engine.num_restarts
        for fields in ({}, {"stream": True}, {"max_tokens": 9}):
            refused = ask("doom", **fields)
            error = refused.json()["error"]
            assert refused.status_code == 400 and error["type"] == "invalid_request_error", refused.text
            assert "has crashed the engine twice and is not computed again" in error["message"]
        assert [ask(f"cat {place}").status_code for place in range(2)] == [200, 200]
        assert engine.num_restarts == before == 2
