"""A full queue is a 503 with Retry-After, sent as the status, streamed or not."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PATHS = ("/v1/chat/completions", "/v1/messages")


@pytest.mark.parametrize(("path", "stream"), [(PATHS[0], False), (PATHS[1], True)])
def test_a_full_queue_is_a_503_with_retry_after(model, serve, path: str, stream: bool) -> None:
    model.reply = "</think>" + "word " * 5000
    model.seconds_per_step = 0.01
    with serve(model, max_num_seqs=1, max_num_waiting=2) as served:
        leave = threading.Event()

        def hold() -> None:
            with served.http().stream("POST", path, json=BODY | {"stream": True}):
                leave.wait(60)

        with ThreadPoolExecutor(3) as pool:
            try:
                pool.submit(hold)
                served.wait_until_running()
                for _ in range(2):
                    pool.submit(hold)
                deadline = time.monotonic() + 20
                while served.engine.num_waiting < 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                response = served.http().post(path, json=BODY | {"stream": stream})
            finally:
                leave.set()
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        error = response.json()["error"]
        assert error["type"] == ("overloaded_error" if path == "/v1/messages" else "service_unavailable")
        assert "the queue is full: 2 requests with" in error["message"]
        served.wait_until_idle()


@pytest.mark.parametrize(("path", "stream"), [(PATHS[0], False), (PATHS[1], True)])
def test_who_is_not_begun_in_time_is_told_to_come_again(model, serve, path: str, stream: bool) -> None:
    model.reply, model.seconds_per_step = "</think>" + "word " * 5000, 0.05
    with serve(model, max_num_seqs=1, max_queue_seconds=0.5) as served:
        with served.http().stream("POST", path, json=BODY | {"stream": True}):
            served.wait_until_running()
            late = served.http().post(path, json=BODY | {"stream": stream, "max_tokens": 5})
            assert (late.status_code, late.headers["retry-after"]) == (503, "5")
            assert "the request waited for 0.5 s and was not begun" in late.json()["error"]["message"]
            assert (served.engine.num_running, served.engine.num_waiting) == (1, 0)
        served.wait_until_idle()


def test_no_limit_of_waiting(model, serve) -> None:
    with serve(model, max_queue_seconds=0) as served:
        assert served.http().post(PATHS[0], json=BODY | {"max_tokens": 5}).status_code == 200


def test_a_burst_is_refused_after_it_is_read(model, serve) -> None:
    """Many requests pass the first check of an empty queue: each needs a place again once its prompt is encoded."""
    model.seconds_of_prefill = 0.02
    with serve(model, max_num_seqs=1, max_num_waiting=3) as served, ThreadPoolExecutor(30) as pool:
        client = served.http()

        def ask(_: int) -> int:
            return client.post(PATHS[0], json=BODY | {"stream": True}).status_code

        statuses = list(pool.map(ask, range(60)))
        assert set(statuses) == {200, 503} and statuses.count(503) > 10
        assert client.post(PATHS[0], json=BODY).status_code == 200
