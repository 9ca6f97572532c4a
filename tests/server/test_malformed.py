"""Thousands of malformed requests: none is answered 500, none hangs, and none leaves a trace in the log.

DSV4_MALFORMED is the number of requests, 400 by default: 10000 take some minutes.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.malformed import MARK, Malformed, malformed

COUNT = int(os.environ.get("DSV4_MALFORMED", "400"))
AT_ONCE = 8
BATCH = 100  # between two good requests
LONGEST = 4096  # tokens of a prompt with its answer: a constraint may keep an answer from its end
PATIENCE = 2.0  # seconds that the server waits for the rest of a request
HANG = 60.0  # seconds without an answer that are a hang on the slowest machine
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that this process logs, with a line for each request."""
    text = io.StringIO()
    handler, root, requests = logging.StreamHandler(text), logging.getLogger(), logging.getLogger("dsv4.requests")
    root.addHandler(handler)
    level = requests.level
    requests.setLevel(logging.INFO)
    yield text
    root.removeHandler(handler)
    requests.setLevel(level)


def test_malformed_requests_are_refused_and_the_server_goes_on(model, serve: Callable[..., Any], log) -> None:
    statuses: Counter[str] = Counter()
    limits = {"client_seconds": PATIENCE, "keep_alive_seconds": 1.0, "max_model_len": LONGEST}
    with serve(model, **limits) as served, ThreadPoolExecutor(AT_ONCE) as pool:
        model.reply = '{"a": "b"}'
        http_client = served.http()
        routes = [
            (method, path)
            for path, methods in http_client.get("/openapi.json").json()["paths"].items()
            for method in methods
        ]
        began = time.monotonic()
        for start in range(0, COUNT, BATCH):
            cases = [malformed(number, routes) for number in range(start, min(COUNT, start + BATCH))]
            answers = pool.map(lambda case: answer(served.url, case), cases)
            for number, (case, (status, body)) in enumerate(zip(cases, answers, strict=True), start):
                check(number, case, status, body)
                statuses[str(status)] += 1
            good = http_client.post("/v1/chat/completions", json=GOOD)
            assert good.status_code == 200, (start, good.text)
        served.wait_until_idle(HANG)
        seconds = time.monotonic() - began
    print(f"{COUNT} malformed requests in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    assert MARK not in log.getvalue(), "a prompt stands in the log"
    assert "Traceback" not in log.getvalue(), log.getvalue()[:3000]


def check(number: int, case: Malformed, status: int | None, body: bytes) -> None:
    told = f"request {number} ({case.kind}): {status} {body[:400]!r} for {case.data[:800]!r}"
    assert status is None or status < 500, told
    assert status is not None or case.may_be_silent, f"no answer: {told}"
    assert b'"internal_error"' not in body, told  # inside a stream
    if status is not None and status >= 400 and body:
        error = json.loads(body)["error"]
        assert error["message"] and error["type"] and "code" in error, told


def answer(url: str, case: Malformed) -> tuple[int | None, bytes]:
    """Status and body of the answer; None where the server has closed the connection without one."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=HANG) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all is sent
            connection.sendall(case.data)
            if case.ends:
                connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection, method=case.method)
        try:
            response.begin()
            return response.status, response.read()
        except (http.client.BadStatusLine, http.client.IncompleteRead, ConnectionError):
            return None, b""
        finally:
            response.close()
