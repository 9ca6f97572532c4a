"""Retry hints to the SDKs."""

import contextlib
import time
from collections.abc import Iterator

import anthropic
import openai
import pytest

from dsv4.engine import EngineError
from dsv4.tokenizer import Tokenizer

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@pytest.fixture
def locked(model, serve):
    with serve(model, api_keys=["sk-1"]) as served:
        yield served


class FullError(EngineError):
    """Stands for the engine's temporary refusal."""

    retry_after = 0.2


@contextlib.contextmanager
def full_engine(monkeypatch: pytest.MonkeyPatch, times: int) -> Iterator[list[float]]:
    """Makes the engine refuse the first requests; returns the arrival times of all."""
    from dsv4.engine import AsyncEngine

    stream, came = AsyncEngine.stream, []

    def refuse(engine, *arguments, **options):
        came.append(time.monotonic())
        if len(came) <= times:
            raise FullError("the queue holds 3 requests; the limit is 3")
        return stream(engine, *arguments, **options)

    monkeypatch.setattr(AsyncEngine, "stream", refuse)
    yield came


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_permanent_errors_forbid_retries(locked, monkeypatch, path: str) -> None:
    monkeypatch.setattr("dsv4.server.requests.MAX_BODY_BYTES", 1000)
    key = {"x-api-key": "sk-1"}
    http = locked.http()
    answers = [
        (401, http.post(path, json=BODY)),
        (400, http.post(path, json=BODY | {"temperature": 9}, headers=key)),
        (403, http.post(path, json=BODY, headers=key | {"Origin": "https://evil.example"})),
        (404, http.post(path + "/no", json=BODY, headers=key)),
        (405, http.put(path, json=BODY, headers=key)),
        (413, http.post(path, json=BODY | {"padding": "x" * 2000}, headers=key)),
        (415, http.post(path, content="{}", headers=key | {"Content-Type": "text/plain"})),
    ]
    for status, answer in answers:
        assert answer.status_code == status
        assert answer.headers["x-should-retry"] == "false", status
        assert "retry-after" not in answer.headers


def test_a_wrong_key_is_reported_after_one_request(locked) -> None:
    """Claude Code silently retries any other error for minutes."""
    with locked.closing, anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=5) as client:
        requests: list[object] = []
        client._client.event_hooks["request"].append(requests.append)
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**BODY)
        assert len(requests) == 1


@pytest.mark.parametrize(("path", "stream"), [(CHAT, True), (MESSAGES, False)])
def test_a_full_engine_is_503_before_the_status_line(server, monkeypatch, path: str, stream: bool) -> None:
    with full_engine(monkeypatch, times=1):
        answer = server.http().post(path, json=BODY | {"stream": stream})
        assert answer.status_code == 503
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
        body = answer.json()
        assert body["error"]["message"] == "the queue holds 3 requests; the limit is 3"
        kinds = {CHAT: "service_unavailable", MESSAGES: "overloaded_error"}
        assert body["error"]["type"] == kinds[path] and ("type" in body) == (path == MESSAGES)
        assert server.http().post(path, json=BODY | {"stream": stream}).status_code == 200


def test_both_sdks_retry_after_the_given_time(server, monkeypatch) -> None:
    with full_engine(monkeypatch, times=1) as came:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=2)
        with client:
            assert client.chat.completions.create(**BODY).choices[0].message.content == "ok"
        assert len(came) == 2 and came[1] - came[0] >= 0.9
    with full_engine(monkeypatch, times=1) as came:
        with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=2) as other:
            assert other.messages.create(**BODY).content[-1].text == "ok"
        assert len(came) == 2 and came[1] - came[0] >= 0.9


def test_a_failed_engine_forbids_retries(model, serve) -> None:
    model.fail = "out of order"
    with serve(model) as served:
        for _ in range(2):
            answer = served.http().post(CHAT, json=BODY)
            assert answer.status_code == 503 and answer.headers["x-should-retry"] == "false"


def test_details_and_field_of_an_error_reach_the_client(server) -> None:
    answer = server.http().post(MESSAGES, json=BODY | {"thread": {"type": "create"}})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert error["param"] == "thread"
    assert server.http().post(MESSAGES, json=BODY | {"thread": None}).status_code == 200


def test_anthropics_tool_runner_goes_on_without_a_thread(server, folder) -> None:
    if not hasattr(anthropic, "beta_tool"):
        pytest.skip("this version of the SDK has no tool runner")

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: the city
        """
        return f"rain in {city}"

    call = (
        '</think><｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" '
        'string="true">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    server.model.reply = lambda prompt: "</think>It rains." if "rain in Oslo" in tokenizer.decode(prompt) else call
    runner = server.anthropic().beta.messages.tool_runner(
        model="tiny", max_tokens=500, messages=BODY["messages"], tools=[weather]
    )
    assert [block.text for block in runner.until_done().content if block.type == "text"] == ["It rains."]
