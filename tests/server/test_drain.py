"""Shutdown of a real process: open answers get a grace period, then an error event; new requests are refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from . import patient

HERE = Path(__file__).parent
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5000}
LONG = "</think>" + "word " * 3000
NO_KEEP_ALIVE = {"keep_alive_seconds": 300.0}  # with one, an answer that is cut off has begun with status 200


@contextlib.contextmanager
def process_serving(prefix: tuple[str, ...] = (), **settings: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts scripted_server.py -> (process, URL). Its log is the process's stderr."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, str(HERE / "scripted_server.py"), json.dumps(settings)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), process.stderr and process.stderr.read()
            yield process, url
        finally:
            process.kill()


@dataclass
class Reader:
    """Reads a request's answer in a thread; `begun` is set with the first bytes."""

    url: str
    path: str
    stream: bool = True
    text: str = ""
    status: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    error: Exception | None = None
    begun: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        body = BODY | {"stream": self.stream}
        try:
            with httpx.stream("POST", self.url + self.path, json=body, timeout=120) as response:
                self.status, self.headers = response.status_code, response.headers
                for piece in response.iter_text():
                    self.text += piece
                    self.begun.set()
        except httpx.HTTPError as error:
            self.error = error

    def wait(self) -> str:
        self.thread.join(120)
        assert not self.thread.is_alive()
        return self.text


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(url: str) -> int:
    return patient.get(url + "/health").json()["running"]


def test_open_streams_end_with_an_error_event_of_their_format() -> None:
    with process_serving(reply=LONG, seconds_per_step=0.05, grace_seconds=2.0) as (process, url):
        chat, messages = Reader(url, CHAT), Reader(url, MESSAGES)
        assert chat.begun.wait(30) and messages.begun.wait(30)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        last = chat.wait().split("\n\n")[-2]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "shutting down" in error["message"] and error["type"] == "service_unavailable"
        assert "[DONE]" not in chat.text
        name, data = messages.wait().split("\n\n")[-2].split("\n")
        assert name == "event: error"
        body = json.loads(data.removeprefix("data: "))
        assert body["type"] == "error" and body["error"]["type"] == "overloaded_error"
        assert time.monotonic() - began >= 1.5, "the time of grace was given"
        assert chat.error is None and messages.error is None, "both ended as HTTP has it, not by a cut connection"
        assert process.wait(30) == 0


def test_answers_that_end_in_time_are_whole_and_end_the_grace_period() -> None:
    with process_serving(reply="</think>" + "word " * 20, seconds_per_step=0.02, grace_seconds=60.0) as (process, url):
        readers = [Reader(url, CHAT), Reader(url, MESSAGES), Reader(url, CHAT, stream=False)]
        assert readers[0].begun.wait(30) and readers[1].begun.wait(30)
        wait_until(lambda: running(url) == 3 or readers[2].text)
        process.send_signal(signal.SIGTERM)
        texts = [reader.wait() for reader in readers]
        assert texts[0].endswith("data: [DONE]\n\n") and "message_stop" in texts[1]
        assert json.loads(texts[2])["choices"][0]["finish_reason"] == "stop"
        assert process.wait(40) == 0  # long before the grace period ends


def test_new_requests_are_refused_while_the_server_drains() -> None:
    settings = {"reply": LONG, "seconds_per_step": 0.05, "grace_seconds": 15.0}
    with process_serving(**settings, **NO_KEEP_ALIVE) as (process, url):
        open_one, whole = Reader(url, CHAT), Reader(url, CHAT, stream=False)
        assert open_one.begun.wait(30)
        wait_until(lambda: running(url) == 2)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: patient.get(url + "/health").status_code == 503)
        health = patient.get(url + "/health")
        assert health.json() == {"status": "draining", "running": 2, "waiting": 0}
        for path in (CHAT, MESSAGES):
            late = patient.post(url + path, json=BODY)
            assert late.status_code == 503 and late.json()["error"]["message"].startswith("The server is shutting down")
            assert 1 <= int(late.headers["retry-after"]) <= 15 and late.headers["x-should-retry"] == "true"
        assert "shutting down" in open_one.wait().split("\n\n")[-2]
        body = json.loads(whole.wait())
        assert whole.status == 503 and "shutting down" in body["error"]["message"]
        assert whole.headers["retry-after"] == "1"
        assert process.wait(30) == 0


def test_a_second_signal_ends_at_once() -> None:
    with process_serving(reply=LONG, seconds_per_step=0.05, grace_seconds=600.0) as (process, url):
        reader = Reader(url, CHAT)
        assert reader.begun.wait(30)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: patient.get(url + "/health").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def test_an_idle_server_ends_without_waiting() -> None:
    with process_serving(grace_seconds=600.0) as (process, url), httpx.Client(base_url=url, timeout=60) as idle:
        assert idle.get("/health").status_code == 200  # and stays connected
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_long_engine_step_does_not_delay_the_shutdown() -> None:
    with process_serving(seconds_of_prefill=300.0, grace_seconds=0.5, **NO_KEEP_ALIVE) as (process, url):
        reader = Reader(url, CHAT)
        wait_until(lambda: running(url) == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reader.wait()
        assert reader.status == 503
