"""The inspector's endpoints, over the embedded model."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from pydantic import BaseModel

from dsv4.engine import LLM, TokenEvent
from dsv4.engine.draft_length import FixedLength
from dsv4.model.token_trace import TokenTrace
from dsv4.model_folder import resolve_model
from dsv4.server.inspection import MAX_TRACES
from dsv4.server.key_limits import KeyLimiter
from dsv4.server.recent_answers import RecentAnswers
from dsv4.server.schemas import Inspection, TracedToken
from tests.server.conftest import ScriptedModel, Served, serving

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "deepseek-v4-flash", "messages": [{"role": "user", "content": "What is 12 + 30?"}]}


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with serving(LLM(resolve_model(None), max_num_seqs=2, max_model_len=2048), api_keys=["sk-1", "sk-2"]) as served:
        yield served


def extra_fields(model: type[BaseModel], answer: dict[str, Any]) -> set[str]:
    """Fields of a valid answer that its schema does not describe."""
    return set(model.model_validate(answer).model_extra or {})


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def client(served: Served, key: str = "sk-1") -> Any:
    return served.http(headers={"Authorization": f"Bearer {key}"})


def test_an_answer_is_inspected_token_by_token(nano: Served) -> None:
    http = client(nano)
    words = " ".join(str(n) for n in range(150))
    body = ASK | {"messages": [{"role": "user", "content": words}], "temperature": 0, "max_tokens": 9}
    body |= {"thinking": {"type": "disabled"}}  # thinking answers take the model's own temperature
    answer = http.post("/v1/chat/completions", json=body).json()
    found = http.get(f"/inspect/{answer['id']}").json()
    usage = answer["usage"]
    assert (found["prompt_tokens"], found["answer_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert len(found["pieces"]) == usage["total_tokens"] and words in "".join(found["pieces"])
    assert found["layers"] == ["swa", "swa", "csa", "hca", "csa", "hca"] and found["num_experts"] == 30
    assert found["accepted_drafts"] == [] and found["num_draft_tokens"] == found["num_accepted_tokens"] == 0
    position = found["prompt_tokens"] - 1  # its last token, after which the answer's first one was chosen
    trace = http.get(f"/inspect/{answer['id']}/{position}").json()
    assert trace["position"] == position
    assert not (extra_fields(Inspection, found) | extra_fields(TracedToken, trace)), "described in schemas.py"
    assert trace["next_tokens"][0]["text"] == found["pieces"][position + 1], "greedy"
    for kind, layer in zip(found["layers"], trace["layers"], strict=True):
        assert layer["kind"] == kind and layer["window_start"] + len(layer["window"]) == position + 1
        total = sum(layer["window"]) + sum(layer["entries"]["weight"]) + layer["sink"]
        assert total == pytest.approx(1, abs=1e-3)
        assert len(set(layer["experts"])) == 2 and layer["hashed"] == (layer is trace["layers"][0] or kind == "swa")
    csa, hca = trace["layers"][2], trace["layers"][3]
    assert csa["entries"]["stop"][-1] == (position + 1) // 4 * 4 and hca["entries"]["stop"][0] == 128
    assert trace["cache_bytes"]["entries"] > 0


def test_drafts_of_an_answer_are_those_that_the_engine_counted() -> None:
    llm = LLM(resolve_model(None), max_num_seqs=2, max_model_len=2048, speculate=3)
    assert llm.core.speculator is not None
    llm.core.speculator.lengths = FixedLength(3)
    with serving(llm) as served:
        http = served.http()
        body = ASK | {"temperature": 0, "max_tokens": 60, "timings_per_token": True}
        answers = [http.post("/v1/chat/completions", json=body).json() for _ in range(2)]
        found = [http.get(f"/inspect/{answer['id']}").json() for answer in answers]
        drafted, accepted = (sum(one[name] for one in found) for name in ("num_draft_tokens", "num_accepted_tokens"))
        metrics = http.get("/metrics").text
    for name, number in (("draft", drafted), ("accepted", accepted)):
        pattern = rf"^vllm:spec_decode_num_{name}_tokens_total{{.*}} (\S+)$"
        assert [float(value) for value in re.findall(pattern, metrics, re.MULTILINE)] == [number]
    for answer, one in zip(answers, found, strict=True):
        timings = answer["timings"]
        assert timings["draft_n"] == one["num_draft_tokens"] > 0
        assert timings["draft_n_accepted"] == one["num_accepted_tokens"] == len(one["accepted_drafts"]) > 0
        assert one["accepted_drafts"][0] > 0, "the first token is the prompt's"


def test_streamed_answers_too(nano: Served) -> None:
    with nano.openai() as openai:
        openai.api_key = "sk-1"
        stream = openai.chat.completions.create(**ASK, stream=True, max_tokens=5)
        answer_id = next(iter(stream)).id
        for _ in stream:
            pass
    assert client(nano).get(f"/inspect/{answer_id}").json()["answer_tokens"] >= 1


def test_nobody_inspects_answers_of_another_key(nano: Served) -> None:
    http = client(nano)
    answer = http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}).json()
    for path in (f"/inspect/{answer['id']}", f"/inspect/{answer['id']}/0"):
        assert http.get(path).status_code == 200
        assert client(nano, "sk-2").get(path).status_code == 404
        assert nano.http().get(path).status_code == 401


@pytest.mark.parametrize("position", ["-1", "x", "1.5", "99999", "%20"])
def test_wrong_positions_are_refused(nano: Served, position: str) -> None:
    http = client(nano)
    answer = http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}).json()
    refused = http.get(f"/inspect/{answer['id']}/{position}")
    assert refused.status_code == 400 and "allowed: 0 to" in refused.json()["error"]["message"]


def test_a_client_has_one_trace_and_all_have_a_few(
    model: ScriptedModel, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, open_traces = ["sk-1", "sk-2", "sk-3", "sk-4", "sk-5"], list[int]()

    async def endless(token_ids: list[int]) -> TokenTrace:
        open_traces.append(len(token_ids))
        try:
            await asyncio.Event().wait()
        finally:
            open_traces.pop()
        raise AssertionError

    with serve(model, api_keys=keys, max_requests_per_key=2) as served, contextlib.ExitStack() as stack:
        real = served.engine.trace
        monkeypatch.setattr(served.engine, "trace", endless)
        paths = {key: f"/inspect/{client(served, key).post(CHAT, json=ASK).json()['id']}/0" for key in keys}

        for number, key in enumerate(keys[:MAX_TRACES], 1):
            connection = HTTPConnection(served.url.removeprefix("http://"))
            stack.callback(connection.close)
            connection.request("GET", paths[key], headers={"Authorization": f"Bearer {key}"})
            wait_until(lambda number=number: len(open_traces) == number)
        for key, status in ((keys[0], 429), (keys[-1], 503)):
            refused = client(served, key).get(paths[key])
            assert refused.status_code == status and refused.headers["retry-after"] == "1", refused.text
            assert "being traced" in refused.json()["error"]["message"]
        assert client(served).post(CHAT, json=ASK).status_code == 200, "its second open request"
        stack.close()
        wait_until(lambda: not open_traces)
        monkeypatch.setattr(served.engine, "trace", real)
        assert "cannot be traced" in client(served).get(paths["sk-1"]).json()["error"]["message"]


def test_a_trace_is_one_of_the_requests_of_its_key(
    model: ScriptedModel, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(model, api_keys=["sk-1"], max_requests_per_key=1) as served:
        http, statuses = client(served), list[int]()
        answer = http.post(CHAT, json=ASK).json()["id"]

        async def meanwhile(token_ids: list[int]) -> TokenTrace:
            looks = (("POST", CHAT), ("GET", f"/inspect/{answer}/0"), ("GET", f"/inspect/{answer}"))
            for method, path in () if statuses else looks:
                response = await asyncio.to_thread(client(served).request, method, path, json=ASK)
                statuses.append(response.status_code)
            return TokenTrace(0, [], [], {})

        monkeypatch.setattr(served.engine, "trace", meanwhile)
        assert http.get(f"/inspect/{answer}/0").status_code == 200
        assert statuses == [429, 429, 200]


def test_a_trace_takes_the_tokens_that_it_reads(
    model: ScriptedModel, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trace(token_ids: list[int]) -> TokenTrace:
        return TokenTrace(0, [], [], {})

    taken = list[tuple[str, int]]()
    with serve(model, api_keys=["sk-1"], tokens_per_minute_per_key=10**6) as served:
        http = client(served)
        answer = http.post(CHAT, json=ASK).json()["id"]
        monkeypatch.setattr(served.engine, "trace", trace)
        monkeypatch.setattr(KeyLimiter, "take", lambda self, key, tokens: taken.append((key, tokens)))
        assert http.get(f"/inspect/{answer}/5").status_code == http.get(f"/inspect/{answer}").status_code == 200
    assert taken == [("sk-1", 6)]


def test_unknown_answers_and_models_without_layers(server: Served) -> None:
    assert "ask again" in server.http().get("/inspect/none").json()["error"]["message"]
    answer = server.http().post("/v1/chat/completions", json=ASK).json()
    refused = server.http().get(f"/inspect/{answer['id']}/0")
    assert refused.status_code == 400 and "cannot be traced" in refused.json()["error"]["message"]


def test_recent_answers_are_bounded_by_number_and_tokens() -> None:
    recent = RecentAnswers(max_answers=2, max_tokens=10)
    recent.begin("a", "tiny", "", [1, 2])
    answer = recent.begin("b", "tiny", "", [1, 2])
    for tokens, accepted in ([5], 0), ([6, 7], 2):  # the last one ends the answer
        answer.extend(TokenEvent(tokens, "", [], [], cached_tokens=1, num_accepted_tokens=accepted))
    recent.begin("c", "tiny", "", [1, 2])
    assert recent.find("a", "") is None
    found = recent.find("b", "")
    assert found is not None and (list(found.answer), found.accepted, found.cached_tokens) == ([5, 6, 7], [1, 2], 1)
    recent.begin("d", "tiny", "", [1] * 6)
    assert [recent.find(name, "") is not None for name in "bcd"] == [False, True, True]
    recent.begin("e", "tiny", "", [1] * 11)  # alone too long
    assert recent.find("e", "") is None
