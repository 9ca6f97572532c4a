"""A client's disconnect stops its generation: no ghost requests."""

import json
import threading
import time

import httpx
import pytest

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PATHS = ("/v1/chat/completions", "/v1/messages")


@pytest.fixture
def slow(model, serve):
    model.reply = "</think>" + "word " * 5000
    model.seconds_per_step = 0.005
    with serve(model, max_num_seqs=2) as served:
        yield served


@pytest.mark.parametrize("path", PATHS)
def test_closing_a_stream_stops_the_generation(slow, path: str) -> None:
    with slow.http().stream("POST", path, json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        assert slow.engine.num_running == 1
    slow.wait_until_idle()
    sampled = slow.model.num_sampled
    time.sleep(0.1)
    assert slow.model.num_sampled == sampled


@pytest.mark.parametrize("path", PATHS)
def test_giving_up_on_a_whole_answer_stops_the_generation(slow, path: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        slow.http().post(path, json=BODY, timeout=0.5)
    slow.wait_until_idle()


def test_giving_up_in_the_queue_leaves_the_queue(slow) -> None:
    def occupy() -> None:
        with slow.http().stream("POST", PATHS[0], json=BODY | {"stream": True}) as response:
            lines = response.iter_lines()  # dropping this iterator would close the connection
            next(lines)
            leave.wait(120)

    leave = threading.Event()
    threads = [threading.Thread(target=occupy) for _ in range(2)]
    for thread in threads:
        thread.start()
    slow.wait_until_running(2)
    with pytest.raises(httpx.ReadTimeout):
        slow.http().post(PATHS[0], json=BODY, timeout=0.5)
    deadline = time.monotonic() + 20
    while slow.engine.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert slow.engine.num_running == 2
    leave.set()
    for thread in threads:
        thread.join()
    slow.wait_until_idle()


def test_a_stop_string_frees_the_engine_before_the_model_is_done(slow) -> None:
    answer = slow.http().post(PATHS[0], json=BODY | {"stop": "word word"}).json()
    assert answer["choices"][0]["message"]["content"] == ""
    slow.wait_until_idle()


def test_a_silent_prefill_sends_keep_alives(model, serve) -> None:
    with serve(model, keep_alive_seconds=0.1) as served:

        def read(path: str, **fields: object) -> str:
            """An answer; the model moves once its first piece has come."""
            model.held, text = threading.Event(), ""
            try:
                with served.http().stream("POST", path, json=BODY | fields) as response:
                    for piece in response.iter_text():
                        text += piece
                        model.held.set()
            finally:
                model.held.set()
            return text

        chat = read(PATHS[0], stream=True)
        assert chat.startswith(": keep-alive\n\n") and chat.endswith("data: [DONE]\n\n")
        messages = read(PATHS[1], stream=True)
        assert messages.startswith('event: ping\ndata: {"type": "ping"}\n\n')
        whole = read(PATHS[0])
        assert whole.startswith("\n") and json.loads(whole)["choices"][0]["message"]["content"] == "ok"
        model.seconds_of_prefill = 0.5
        assert served.openai().chat.completions.create(**BODY).choices[0].message.content == "ok"
        with served.anthropic().messages.stream(max_tokens=20, **BODY) as events:
            assert events.get_final_text() == "ok"
