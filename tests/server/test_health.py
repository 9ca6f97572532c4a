"""Health: deep checks compute a token, never hang, and cost one token however many ask."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dsv4.server.health import DeepCheck
from tests.server.conftest import Served

from . import patient
from .scripted_model import ScriptedModel


@contextlib.contextmanager
def held(model: ScriptedModel) -> Iterator[None]:
    """Context in which the model does not move."""
    model.held = threading.Event()
    try:
        yield
    finally:
        model.held.set()


def deep(served: Served, path: str = "/health/deep", **params) -> httpx.Response:
    return httpx.get(served.url + path, params=params, timeout=60)


@pytest.mark.parametrize(("path", "params"), [("/health/deep", {}), ("/health", {"deep": 1})])
def test_a_deep_check_computes_one_token(server, path: str, params: dict) -> None:
    response = deep(server, path, **params)
    assert response.status_code == 200
    state = response.json()
    assert (state["status"], state["models"]["tiny"]["status"]) == ("ok", "ok")
    assert server.model.num_sampled == 1
    assert patient.get(server.url + "/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert server.model.num_sampled == 1, "the plain check computes nothing"


def test_a_probe_may_send_head(server) -> None:
    for path in ("/health", "/health/deep"):
        response = httpx.head(server.url + path, timeout=60)
        assert (response.status_code, response.content) == (200, b"")


def test_checks_at_the_same_time_share_a_token(serve, model) -> None:
    model.seconds_of_prefill = 0.5
    model.seconds_per_step = 0.5
    with serve(model) as served, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: deep(served).status_code, range(8)))
        assert answers == [200] * 8
        assert model.num_sampled < 8


def test_a_model_that_fails_is_found_by_a_deep_check_only(serve, model) -> None:
    model.fail = "out of order"
    with serve(model) as served:
        assert patient.get(served.url + "/health").status_code == 200
        response = deep(served)
        assert response.status_code == 503 and response.json()["status"] == "error"
        assert "out of order" in response.json()["models"]["tiny"]["error"]
        assert patient.get(served.url + "/health").status_code == 503


def test_a_model_that_does_not_move_is_stuck_within_the_deadline(serve, model) -> None:
    with serve(model) as served, held(model):  # it moves only after the answer
        response = deep(served, seconds=1)
        assert response.status_code == 503 and response.json()["status"] == "stuck"


def test_a_caller_that_waits_no_longer_decides_for_no_other(serve, model, monkeypatch) -> None:
    shared, asked = DeepCheck._shared, threading.Semaphore(0)

    def counted(check: DeepCheck, of: Any) -> Any:
        asked.release()
        return shared(check, of)

    monkeypatch.setattr(DeepCheck, "_shared", counted)
    with serve(model) as served, ThreadPoolExecutor(2) as threads:
        with held(model):  # until both have asked, and one waits no longer
            hasty = threads.submit(deep, served, seconds=1)
            assert asked.acquire(timeout=60)
            patient = threads.submit(deep, served)
            assert asked.acquire(timeout=60)
            assert hasty.result().json()["status"] == "stuck"
        assert patient.result().json()["status"] == "ok"
        assert model.num_sampled == 1


def test_a_busy_server_is_healthy(serve, model) -> None:
    """One row is taken by a long answer and the queue is full: the check has no turn, but the model moves."""
    model.reply, model.seconds_per_step = "</think>" + "a" * 5000, 0.02
    with serve(model, max_num_seqs=1, max_num_waiting=1) as served:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}

        def ask() -> None:
            with httpx.stream("POST", served.url + "/v1/chat/completions", json=body, timeout=60) as response:
                for _ in response.iter_lines():
                    if stop.is_set():
                        return

        stop = threading.Event()
        with ThreadPoolExecutor(2) as threads:
            threads.submit(ask)
            served.wait_until_running(1)
            for _ in range(2):  # with a place in the queue, then without
                response = deep(served, seconds=1)
                state = response.json()
                assert response.status_code == 200, state
                assert (state["status"], state["models"]["tiny"]["status"]) == ("ok", "busy")
                if not served.engine.num_waiting:
                    threads.submit(ask)
                    deadline = time.monotonic() + 20
                    while not served.engine.num_waiting and time.monotonic() < deadline:
                        time.sleep(0.01)
            stop.set()
        served.wait_until_idle()


def test_a_wrong_deadline_is_refused(server) -> None:
    for seconds in ("0", "0.9", "-1", "x", "601"):
        response = deep(server, seconds=seconds)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "seconds"


def test_probes_need_no_key(serve, model) -> None:
    with serve(model, api_keys=["sk-1"]) as served:
        assert deep(served).status_code == 200
        assert patient.get(served.url + "/v1/tokenize").status_code == 401
