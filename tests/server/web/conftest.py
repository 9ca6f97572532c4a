"""Fixtures: headless Chromium, and a mock of the API behind the chat page: scripted answers, recorded requests."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsv4.server.web import chat_routes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"
)
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
MODEL = "dsv4-nano"
expect.set_options(timeout=20_000)  # not 5 s: where all cores compute, a page takes longer to draw


@dataclass
class Script:
    """One answer: pieces of reasoning and text, `pause` seconds before each; or a status with an error text.

    `held`: the second and later pieces of the text wait until it is set. An event among pieces, or in `progress`, holds
    all that follows.
    """

    answer: Sequence[str | threading.Event] = ()
    thinking: Sequence[str | threading.Event] = ()
    calls: list[dict[str, Any]] = field(default_factory=list)  # pieces of tool calls, after the text
    pause: float = 0.0
    held: threading.Event | None = None
    finish: str = "stop"
    status: int = 200
    error: str = ""
    cut: bool = False  # close the stream before the end
    headers: dict[str, str] = field(default_factory=dict)  # of an error
    # Fields of the chunks before the answer.
    progress: list[dict[str, Any] | threading.Event] = field(default_factory=list)
    then: list[str] | None = None  # text of the next answers, if not this one again
    milliseconds: float = 20.0  # per token, by the engine's clock

    def holds(self, chunk: dict[str, Any]) -> bool:
        later = any(choice["delta"].get("content") in self.answer[1:] for choice in chunk.get("choices", []))
        return later and self.held is not None and not self.held.is_set()

    def timings(self, tokens: int) -> dict[str, Any]:
        spent = (tokens - 1) * self.milliseconds
        rate = (tokens - 1) / spent * 1000 if spent else None
        return {
            "prompt_n": 5,
            "prompt_ms": 9.0,
            "predicted_n": tokens,
            "predicted_ms": spent,
            "predicted_per_second": rate,
        }

    def chunks(self) -> list[dict[str, Any] | threading.Event]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None, "reasoning_content": ""}]
        deltas += [{"content": None, "reasoning_content": piece} for piece in self.thinking]
        deltas += [{"content": piece, "reasoning_content": None} for piece in self.answer]
        deltas += [{"content": None, "reasoning_content": None, "tool_calls": [piece]} for piece in self.calls]
        chunks: list[dict[str, Any] | threading.Event] = [
            one if isinstance(one, threading.Event) else {"choices": [], "usage": None} | one for one in self.progress
        ]
        place = 0
        for delta in deltas:
            if events := [piece for piece in delta.values() if isinstance(piece, threading.Event)]:
                chunks += events
                continue
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            chunks.append({"choices": [choice], "usage": None, "timings": self.timings(max(place, 1))})
            place += 1
        return chunks

    def last(self) -> dict[str, Any]:
        tokens = sum(isinstance(piece, str) for piece in (*self.thinking, *self.answer))
        usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}
        delta = {"content": "", "reasoning_content": None}
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": self.finish}], "usage": usage}


class Mock:
    """Mock server in a thread; `script` answers every request."""

    def __init__(self) -> None:
        self.script = Script()
        self.requests: list[dict[str, Any]] = []
        self.disconnects = 0
        self.key = ""
        self.refusals = 0
        self.answer_id = ""  # of every chunk
        self.stopped = ""  # reason why the engine has stopped, or ""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            *chat_routes(),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="error", ws="none", lifespan="off")
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def start(self) -> None:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.server.force_exit = True
        self.thread.join(timeout=10)
        self.socket.close()

    def reset(self) -> None:
        self.script, self.requests, self.disconnects, self.key = Script(), [], 0, ""
        self.refusals = 0  # number of questions to refuse
        self.answer_id = self.stopped = ""

    async def health(self, request: Request) -> Response:
        state = {"status": "error", "error": self.stopped} if self.stopped else {"status": "ok"}
        return JSONResponse(state, 503 if self.stopped else 200)

    def refused(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "")
        if not self.key or given == f"Bearer {self.key}":
            return None
        return error_response(401, f"Authentication Fails, Your api key: ****{given[-4:]} is invalid")

    async def models(self, request: Request) -> Response:
        names = (MODEL, "another-name-of-it")
        body = {"object": "list", "data": [{"id": name, "object": "model", "root": MODEL} for name in names]}
        return self.refused(request) or JSONResponse(body)

    async def complete(self, request: Request) -> Response:
        if refused := self.refused(request):
            self.refusals += 1
            return refused
        self.requests.append(await request.json())
        script = self.script
        if script.then is not None:
            self.script = Script(script.then)
        if script.status != 200:
            return error_response(script.status, script.error, script.headers)
        return StreamingResponse(self.stream(script), media_type="text/event-stream")

    async def stream(self, script: Script) -> AsyncIterator[str]:
        try:
            yield ": keep-alive\n\n"
            for chunk in script.chunks():
                if isinstance(chunk, threading.Event):
                    while not chunk.is_set():
                        await asyncio.sleep(0.02)
                    continue
                await asyncio.sleep(script.pause)
                while script.holds(chunk):
                    await asyncio.sleep(0.02)
                yield f"data: {json.dumps(chunk | {'id': self.answer_id})}\n\n"
            if not script.cut:
                yield f"data: {json.dumps(script.last())}\n\ndata: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.disconnects += 1
            raise


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request_error"}
    return JSONResponse({"error": error}, status, headers)


@pytest.fixture(scope="package")
def mock() -> Iterator[Mock]:
    server = Mock()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (Debian and Ubuntu: apt-get install chromium)")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="package")
def plain_context(browser: Browser) -> Iterator[BrowserContext]:
    """One profile for all tests without special options: its warm cache saves a second per test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    yield context
    context.close()


class Tab:
    """A tab with the page open and empty storage; records every request and script error."""

    def __init__(self, context: BrowserContext, url: str, mock: Mock | None = None) -> None:
        self.url = url
        self._mock = mock
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self.note)
        self.page.goto(url + "web/logo.svg")
        self.page.evaluate("localStorage.clear(), sessionStorage.clear()")
        self.page.goto(url)

    @property
    def mock(self) -> Mock:
        assert self._mock is not None, "this tab talks to a real server"
        return self._mock

    def note(self, message: ConsoleMessage) -> None:
        # Chromium reports refused and cut connections here too, which some tests cause.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def ask(self, text: str, answer: Sequence[str | threading.Event] | None = None, **fields: Any) -> None:
        """Sends `text`; from now on the mock answers with Script(other arguments)."""
        if answer is not None:
            self.will_answer(answer, **fields)
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")

    def will_answer(self, answer: Sequence[str | threading.Event], **fields: Any) -> None:
        self.mock.script = Script(answer, **fields)

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        """Waits for a condition. Playwright's wait_for_function needs eval, forbidden by the page's content policy."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(50)

    def close(self) -> None:
        self.page.close()
        assert self.errors == []
        assert self.hosts == {self.url.split("/")[2]}  # no request to another host

    def wait(self, status: str, turn: int = -1) -> Locator:
        """Waits until an answer has the status; returns it."""
        expect(self.answer(turn)).to_have_attribute("data-status", status, timeout=30_000)
        return self.answer(turn)

    def answer(self, turn: int = -1) -> Locator:
        return self.page.locator(".assistant").nth(turn)

    def text(self, turn: int = -1) -> str:
        return self.answer(turn).locator(".answer").inner_text()


@pytest.fixture
def tab(mock: Mock, browser: Browser, plain_context: BrowserContext, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """A tab. Indirect parameters are context options (colour scheme, viewport, ...)."""
    mock.reset()
    options = getattr(request, "param", None)
    context = browser.new_context(**options) if options else plain_context
    opened = Tab(context, mock.url, mock)
    yield opened
    opened.close()
    if options:
        context.close()


@pytest.fixture
def open_tab(plain_context: BrowserContext) -> Iterator[Callable[[str], Tab]]:
    """open_tab(url) -> a tab with the page of any server."""
    tabs: list[Tab] = []

    def opened(url: str) -> Tab:
        tabs.append(Tab(plain_context, url))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.close()
