"""Limits per API key: open requests, tokens per minute, and limits of single keys from the key file."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from dsv4.server.errors import RequestError
from dsv4.server.formats import FORMATS
from dsv4.server.key_limits import KeyLimiter, KeyLimitMiddleware, KeyLimits
from dsv4.server.keys import ApiKey, collect_keys, masked
from dsv4.server.users import remember_key

from . import patient

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5000}


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_with_all_its_requests_open_is_told_to_wait(model, serve) -> None:
    model.reply, model.seconds_per_step = "</think>" + "word " * 3000, 0.01
    with serve(model, api_keys=["sk-1", "sk-2"], max_requests_per_key=1) as served:
        http = served.http()
        with http.stream("POST", CHAT, json=BODY | {"stream": True}, headers=with_key("sk-1")) as answer:
            lines = answer.iter_lines()  # dropping it would close the answer
            next(lines)
            for path, kind in ((CHAT, "rate_limit_error"), (MESSAGES, "rate_limit_error")):
                refused = patient.post(served.url + path, json=BODY, headers=with_key("sk-1"))
                assert refused.status_code == 429 and refused.json()["error"]["type"] == kind
                assert "exceeds your concurrency limit of 1" in refused.json()["error"]["message"]
                assert refused.headers["retry-after"] == "1" and refused.headers["x-should-retry"] == "true"
            assert patient.get(served.url + "/v1/models", headers=with_key("sk-1")).status_code == 200
            other = httpx.post(served.url + CHAT, json=BODY | {"max_tokens": 1}, headers=with_key("sk-2"), timeout=60)
            assert other.status_code == 200
        served.wait_until_idle()
        for _ in range(3):  # an error gives its place back too
            bad = patient.post(served.url + CHAT, json=BODY | {"temperature": 9}, headers=with_key("sk-1"))
            assert bad.status_code == 400
        assert http.post(CHAT, json=BODY | {"max_tokens": 1}, headers=with_key("sk-1")).status_code == 200


def test_what_computes_nothing_needs_no_place_and_no_tokens(model, serve) -> None:
    """An editor counts tokens dozens of times at once, beside an answer."""
    model.reply, model.seconds_per_step = "</think>" + "word " * 3000, 0.01
    limits = {"max_requests_per_key": 1, "tokens_per_minute_per_key": 5}
    with serve(model, api_keys=["sk-1"], **limits) as served, ThreadPoolExecutor(40) as threads:
        http = served.http(headers=with_key("sk-1"))
        with http.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            asked = {"model": "tiny", "messages": BODY["messages"]}
            counts = [threads.submit(http.post, f"{MESSAGES}/count_tokens", json=asked) for _ in range(40)]
            assert {count.result().status_code for count in counts} == {200}
            assert len({count.result().json()["input_tokens"] for count in counts}) == 1
            for path, body in (
                *((path, asked) for known in FORMATS for path in known.count_tokens_paths),
                ("/v1/responses/input_tokens", {"model": "tiny", "input": "hi"}),
                ("/tokenize", {"prompt": "hi"}),
                ("/v1/detokenize", {"tokens": [5]}),
            ):
                assert http.post(path, json=body).status_code == 200, path
            assert http.post("/v1/responses/resp_1/cancel").status_code == 404
            assert http.post(CHAT, json=BODY).status_code == 429


def test_a_request_has_ended_before_its_last_part_is_sent() -> None:
    """A client that has its whole answer may ask again at once, however late the server's task ends."""
    limiter = KeyLimiter(KeyLimits(max_requests=1), {})
    full = list[bool]()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    async def send(message: Message) -> None:
        try:
            limiter.enter("sk-1")
            limiter.leave("sk-1")
            full.append(False)
        except RequestError:
            full.append(True)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "POST", "path": CHAT}
    remember_key(scope, "sk-1")
    for _ in range(2):
        asyncio.run(KeyLimitMiddleware(answer, limiter)(scope, receive, send))
    assert full == [True, True, False] * 2


def test_tokens_of_prompt_and_answer_count(model, serve) -> None:
    with serve(model, api_keys=["sk-1"], tokens_per_minute_per_key=5) as served:
        served.key = "sk-1"
        answer = served.openai().chat.completions.create(**BODY)
        assert answer.usage.total_tokens > 5
        with pytest.raises(openai.RateLimitError, match="your key may use 5 tokens per minute") as refused:
            served.openai().chat.completions.create(**BODY)
        over = answer.usage.total_tokens - 5
        assert over * 12 - 30 <= int(refused.value.response.headers["retry-after"]) <= (over + 2) * 12
        with pytest.raises(anthropic.RateLimitError):
            served.anthropic().messages.create(**BODY)


def test_tokens_come_back_evenly_and_not_beyond_a_minutes() -> None:
    now = 100.0
    limiter = KeyLimiter(KeyLimits(tokens_per_minute=60), {"vip": KeyLimits(tokens_per_minute=600)}, lambda: now)
    limiter.enter("a")
    limiter.take("a", 90)
    with pytest.raises(RequestError) as refused:
        limiter.enter("a")
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "31"}
    now += 31
    limiter.enter("a")
    now += 1000
    limiter.take("a", 60)
    with pytest.raises(RequestError):
        limiter.enter("a")
    limiter.take("vip", 599)
    limiter.enter("vip")


def test_requests_of_many_threads_are_counted() -> None:
    limiter = KeyLimiter(KeyLimits(max_requests=1000), {})

    def work() -> None:
        for _ in range(200):
            limiter.enter("a")
            limiter.leave("a")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(1000):
        limiter.enter("a")
    with pytest.raises(RequestError, match="concurrency is 1001"):
        limiter.enter("a")


def test_a_line_of_the_key_file_has_limits_of_its_own(tmp_path: Path, model, serve) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-plain\nsk-limited-0123 max_requests=2 tokens_per_minute=50  # Anna\n")
    path.chmod(0o600)
    keys = collect_keys([], path, {})
    assert keys == ["sk-plain", "sk-limited-0123"]
    (limited,) = (key for key in keys if isinstance(key, ApiKey))
    assert limited.limits == KeyLimits(2, 50)
    assert "sk-limited" not in repr(keys) and masked("short") == "****"
    with serve(model, api_keys=keys) as served:
        for _ in range(4):
            answer = served.http().post(CHAT, json=BODY, headers=with_key("sk-plain"))
            assert answer.status_code == 200
        statuses = [served.http().post(CHAT, json=BODY, headers=with_key(limited)).status_code for _ in range(12)]
        assert statuses[0] == 200 and statuses[-1] == 429


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sk-1 max_request=2", "line 1 has 'max_request=2' beside its API key; allowed: max_requests=N, tokens"),
        ("sk-1 max_requests=x", "has 'max_requests=x'"),
        ("sk-1 max_requests=1 max_requests=2", "each once"),
        ("sk-1 max_requests=0", "max_requests of an API key is 0; allowed: 1 or more"),
    ],
)
def test_other_words_in_the_key_file_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(line)
    path.chmod(0o600)
    with pytest.raises(ValueError, match=message):
        collect_keys([], path, {})
