"""Slow clients, and more connections than the limit of open files allows."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from dsv4.server.connections import ClientLimits
from dsv4.server.open_files import connection_bound

from . import patient
from .test_drain import process_serving

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5000}
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


@contextlib.contextmanager
def connected(url: str, first: bytes = b"", receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A raw connection to a server, with `first` sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(60)
        connection.connect((host, int(port)))
        connection.sendall(first)
        yield connection


def everything(connection: socket.socket) -> bytes:
    """All bytes that the server sends until it closes the connection."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture
def strict(model, serve):
    with serve(model, client_seconds=1.0) as served:
        yield served


def test_a_head_that_does_not_end_has_a_deadline(strict) -> None:
    with connected(strict.url, HEAD + b"X-Slow: ") as slow:
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.2):
                    slow.sendall(b"x")  # single bytes do not extend the deadline of a head

        thread = threading.Thread(target=drip)
        thread.start()
        answer = everything(slow)
        stop.set()
        thread.join()
        assert answer == b"" or b"408" in answer.split(b"\r\n")[0]


def test_a_connection_that_says_nothing_has_a_deadline(strict) -> None:
    with connected(strict.url) as silent:
        assert everything(silent) == b""


def test_a_stalled_body_gets_a_408(strict) -> None:
    with connected(strict.url, HEAD + b"Content-Length: 5000\r\n\r\n" + b'{"model"') as stalled:
        answer = everything(stalled)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert re.search(rb"\r\nx-request-id: req_\w{32}\r\nrequest-id: req_", answer)
    error = json.loads(answer.split(b"\r\n\r\n")[1])["error"]
    assert error["message"] == "Nothing of the request's body came for 1 s" and error["code"] == "request_timeout"


def test_a_dripping_body_is_cut_off(strict) -> None:
    with connected(strict.url, HEAD + b"Content-Length: 5000\r\n\r\n") as slow:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 30:
                slow.sendall(b" ")
                time.sleep(0.2)
        assert time.monotonic() - began < 30, "cut off although no pause was too long"


def test_a_refused_body_that_never_ends_has_a_deadline_too(strict) -> None:
    head = HEAD.replace(b"application/json", b"text/plain")
    with connected(strict.url, head + b"Content-Length: 5000\r\n\r\n") as stalled:
        answer = everything(stalled)
    assert answer.startswith(b"HTTP/1.1 415 ") and answer.count(b"HTTP/1.1") == 1


def test_a_large_body_at_a_fair_pace_and_a_long_answer_have_time(model, serve) -> None:
    """Both take more than client_seconds; no pause does."""
    model.reply, model.seconds_per_step = "</think>" + "x" * 35, 0.1
    body = json.dumps(BODY | {"padding": "x" * 20000}).encode()
    head = HEAD + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    with serve(model, client_seconds=3.0) as served, connected(served.url, head) as slow:
        for i in range(0, len(body), 2000):
            slow.sendall(body[i : i + 2000])
            time.sleep(0.35)
        answer = everything(slow)
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"finish_reason":"stop"' in answer


def test_a_kept_connection_is_used_again_and_then_closed(model, serve) -> None:
    with serve(model, client_seconds=2.0) as served, connected(served.url) as kept:
        for _ in range(3):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(1.0)  # together longer than client_seconds, which counts for one head
            assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")
        kept.sendall(b"GET /hea")
        assert b"408" in everything(kept)


def test_a_client_that_does_not_read_is_dropped_and_its_generation_stops(strict) -> None:
    strict.model.reply = "</think>" + "word " * 20000
    body = json.dumps(BODY | {"stream": True, "max_tokens": 60000}).encode()
    request = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connected(strict.url, request, receive_buffer=4096):
        strict.wait_until_running(1, seconds=30)
        strict.wait_until_idle(seconds=120)  # the answer is far longer than both sides' buffers
        assert strict.model.num_sampled < 60000


def test_invalid_http_gets_an_error_of_the_usual_shape(server) -> None:
    with connected(server.url, b"\x16\x03\x01 hello\r\n\r\n") as strange:
        answer = everything(strange)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"\r\nx-request-id: req_" in answer
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""], ids=["whole", "not whole"])
def test_a_head_of_more_than_64_kib_is_refused_at_once(server, end: bytes) -> None:
    with connected(server.url, HEAD + b"X-Large: " + b"x" * 70_000 + end) as large:
        answer = everything(large)
    assert answer.startswith(b"HTTP/1.1 431 ") and b"more than 65536 bytes" in answer
    assert b"\r\nx-should-retry: false\r\n" in answer


@pytest.mark.parametrize(("size", "status"), [(40_000, b"200"), (70_000, b"431")])
def test_a_head_that_comes_in_pieces_has_the_same_limit(server, size: int, status: bytes) -> None:
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Large: " + b"x" * 30_000
    with connected(server.url, first) as pieces:
        time.sleep(0.2)
        pieces.sendall(b"x" * (size - 30_000) + b"\r\n\r\n")
        assert everything(pieces).startswith(b"HTTP/1.1 " + status)


def test_a_large_head_behind_another_request_is_refused(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.server.connections.MAX_HEAD_BYTES", 1000)  # both requests come in one piece
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server.url, first + HEAD + b"X-Large: " + b"x" * 2000 + b"\r\n\r\n") as both:
        answer = everything(both)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 431 " in answer


def test_a_long_body_does_not_count_as_head(server) -> None:
    body = json.dumps(BODY | {"max_tokens": 1, "user": "x" * 200_000}).encode()
    for line_end in (b"\r\n", b"\n"):
        head = HEAD.replace(b"\r\n", line_end) + b"Connection: close" + line_end
        head += b"Content-Length: %d" % len(body) + 2 * line_end
        with connected(server.url, head + body) as connection:
            assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_a_full_server_makes_room_by_closing_idle_connections(model, serve) -> None:
    with serve(model, max_connections=4) as served, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(served.url)) for _ in range(4)]
        assert served.http().get("/health").status_code == 200
        assert everything(idle[0]) == b"", "the longest idle one gave way"


def test_a_full_server_of_working_clients_answers_503(model, serve) -> None:
    model.reply, model.seconds_per_step = "</think>" + "word " * 3000, 0.02
    body = json.dumps(BODY | {"stream": True}).encode()
    request = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with serve(model, max_connections=2) as served:
        with contextlib.ExitStack() as stack:
            working = [stack.enter_context(connected(served.url, request)) for _ in range(2)]
            for one in working:
                assert one.recv(100).startswith(b"HTTP/1.1 200 ")
            for path, kind in ((CHAT, "service_unavailable"), ("/v1/messages", "overloaded_error")):
                late = patient.post(served.url + path, json=BODY)
                assert late.status_code == 503 and late.headers["retry-after"] == "1" and late.headers["x-request-id"]
                assert late.json()["error"]["type"] == kind
            assert served.engine.num_running == 2, "nobody who works gave way"
        served.wait_until_idle(60)
        assert patient.get(served.url + "/health").status_code == 200


@pytest.mark.skipif(os.name != "posix", reason="ulimit")
def test_150_half_open_connections_do_not_keep_a_good_client_out() -> None:
    shell = ("bash", "-c", 'ulimit -n 128; exec "$@"', "bash")
    with process_serving(shell) as (process, url):
        for sent in (b"", HEAD, HEAD + b'Content-Length: 5000\r\n\r\n{"mod'):
            check_good_client_among(url, [sent] * 150)
        time.sleep(1.0)  # enough time to flood the log
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr is not None and len(process.stderr.read()) < 2000


def check_good_client_among(url: str, others: list[bytes]) -> None:
    """Opens connections that send only `others`; a complete request is answered soon, and the next two too."""
    with contextlib.ExitStack() as stack:
        for sent in others:
            stack.enter_context(connected(url, sent))
        good = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        deadline = time.monotonic() + 60
        statuses: list[int] = []
        while statuses[-3:] != [200, 200, 200]:
            assert time.monotonic() < deadline, (others[0], statuses)
            with contextlib.suppress(httpx.TransportError):
                statuses.append(good.post(CHAT, json=BODY).status_code)
        assert set(statuses) <= {200, 503}, others[0]


def test_a_limit_that_leaves_too_little_room_is_named(monkeypatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(ValueError, match=r"the limit of open files is 64, which leaves room for \d+ connections of 8"):
        connection_bound()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert 800 < connection_bound() < 1024
    assert connection_bound(100) == 100
    with pytest.raises(ValueError, match="connections of 5000; raise it with ulimit -n"):
        connection_bound(5000)
    with pytest.raises(ValueError, match="max_connections is 0; allowed: 1 or more"):
        connection_bound(0)


def test_a_deadline_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="client_seconds is 0; allowed: more than 0"):
        ClientLimits(0)
