"""Tokens of an answer: usage, ledger, limits of keys, timings and the inspector count the same ones."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dsv4.engine import Timings, TokenEvent
from dsv4.server.chat_completions import CHAT
from dsv4.server.errors import RequestError
from dsv4.server.key_limits import KeyLimiter, KeyLimits
from dsv4.server.messages import MESSAGES
from dsv4.server.responses import RESPONSES
from dsv4.server.served_models import ServedModel, ServedModels
from dsv4.server.service import ChatService, Job
from dsv4.server.wire_format import WireFormat
from tests.server.responses_api import markup

USER = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
BODIES: dict[WireFormat, dict[str, Any]] = {
    CHAT: {"messages": USER, "tools": [{"type": "function", "function": FUNCTION}]},
    MESSAGES: {"messages": USER, "max_tokens": 900, "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}]},
    RESPONSES: {"input": "hi", "tools": [{"type": "function", **FUNCTION}]},
}


class Counts:
    """What an answer of given steps counts: in its usage, and everywhere else."""

    def __init__(
        self, server: Any, wire_format: WireFormat, steps: Sequence[list[int]], end: str | None, **fields: Any
    ) -> None:
        limiter = KeyLimiter(KeyLimits(tokens_per_minute=10**6), {}, clock=lambda: 0.0)
        service = ChatService(ServedModels([ServedModel.of(server.engine)]), limiter=limiter)
        body = {"model": "tiny", **BODIES[wire_format], **fields}
        job = service.prepare(wire_format, json.dumps(body).encode(), "key")
        (part,) = job.parts
        asyncio.run(part.events.aclose())
        events = _events(steps, end, len(job.turn.prompt_token_ids))
        self.job = replace(job, parts=(replace(part, events=events),))
        self.answer: dict[str, Any] = json.loads(asyncio.run(service.whole(self.job)))
        recent = service.recent.find(job.id, "key")
        assert recent is not None
        self.elsewhere = [len(recent.answer), job.meter.tokens.output]
        taken = 10**6 - limiter._account("key").tokens  # pyright: ignore[reportPrivateUsage]
        self.elsewhere.append(round(taken - len(job.turn.prompt_token_ids)))
        timings = self.job.timings
        assert timings is not None and timings.num_accepted_tokens <= timings.num_output_tokens
        assert len(recent.accepted) <= len(recent.answer)
        self.elsewhere.append(timings.num_output_tokens)

    @property
    def output(self) -> int:
        usage = self.answer["usage"]
        return usage["completion_tokens"] if "completion_tokens" in usage else usage["output_tokens"]

    @property
    def reasoning(self) -> int:
        usage = self.answer["usage"]
        return (usage.get("completion_tokens_details") or usage["output_tokens_details"])["reasoning_tokens"]

    @property
    def metered_reasoning(self) -> int:
        return self.job.meter.tokens.reasoning


async def _events(steps: Sequence[list[int]], end: str | None, prompt: int) -> AsyncGenerator[TokenEvent, None]:
    count = accepted = 0
    for number, step in enumerate(steps, 1):
        count, accepted = count + len(step), accepted + len(step) - 1
        timings = Timings(0.0, 0.1, 0.1, prompt, 0, count, accepted, accepted)
        reason: Any = end if number == len(steps) else None
        yield TokenEvent(list(step), "", [], [], reason, 0, timings, num_accepted_tokens=len(step) - 1)


def spelled(server: Any, text: str) -> list[int]:
    """Ids of a text, special tokens included."""
    return server.model.tokenizer.encode(text)


def steps_of(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


OFF: dict[WireFormat, dict[str, Any]] = {
    CHAT: {"thinking": {"type": "disabled"}, "stop": ["XYZ"]},
    MESSAGES: {"thinking": {"type": "disabled"}, "stop_sequences": ["XYZ"]},
}


@pytest.mark.parametrize("wire_format", OFF, ids=lambda known: known.name)
def test_tokens_behind_a_stop_string_in_a_step_do_not_count(server: Any, wire_format: WireFormat) -> None:
    ids = spelled(server, "hello XYZ and more words")
    behind = len(ids) - len(spelled(server, "hello XYZ"))
    counts = Counts(server, wire_format, [ids], "length", **OFF[wire_format])
    assert counts.output == len(ids) - behind < len(ids)
    assert counts.elsewhere == [counts.output] * 4


@pytest.mark.parametrize("wire_format", OFF, ids=lambda known: known.name)
def test_tokens_of_earlier_steps_behind_a_stop_string_do_not_count(server: Any, wire_format: WireFormat) -> None:
    """They were held back, since they could have begun a tag."""
    ids = [token for piece in ("a", "<", "/", "x", "y") for token in spelled(server, piece)]
    fields = {name: ["<"] if isinstance(value, list) else value for name, value in OFF[wire_format].items()}
    counts = Counts(server, wire_format, steps_of(ids, 1), "length", **fields)
    assert counts.elsewhere == [counts.output] * 4 == [2] * 4


@pytest.mark.parametrize("wire_format", [CHAT, RESPONSES], ids=lambda known: known.name)
def test_reasoning_is_counted_as_it_was_sampled(server: Any, wire_format: WireFormat) -> None:
    """Not as its text would be tokenized: the model may write it letter by letter."""
    letters = [token for letter in "the cat sat" for token in spelled(server, letter)]
    assert len(spelled(server, "the cat sat")) < len(letters)
    ids = [*letters, *spelled(server, "</think>on the mat")]
    for size in (1, 3, len(ids)):
        counts = Counts(server, wire_format, steps_of(ids, size), "stop")
        assert counts.reasoning == counts.metered_reasoning == len(letters)
        assert counts.elsewhere == [counts.output] * 4 == [len(ids)] * 4


@pytest.mark.parametrize("wire_format", [CHAT, RESPONSES], ids=lambda known: known.name)
def test_a_call_in_reasoning_ends_it_in_the_ledger_too(server: Any, wire_format: WireFormat) -> None:
    ids = spelled(server, "I think\n\n" + markup("f", x="v"))
    counts = Counts(server, wire_format, steps_of(ids, 4), "stop")
    assert counts.reasoning == counts.metered_reasoning == len(spelled(server, "I think\n\n"))
    assert counts.output == counts.elsewhere[1] <= len(ids)


def test_tokens_that_are_held_back_count_where_the_client_leaves(server: Any) -> None:
    ids = spelled(server, "I think\n\n" + markup("f", x="v" * 50))[:-20]
    counts = Counts(server, CHAT, steps_of(ids, 4), None)
    assert counts.elsewhere == [len(ids)] * 4


def test_a_streams_last_chunk_has_the_same_usage(server: Any) -> None:
    server.model.reply = "t h e c a t</think>ok"
    body = {"model": "tiny", "messages": USER}
    whole = server.http().post("/v1/chat/completions", json=body).json()["usage"]
    stream = server.http().post("/v1/chat/completions", json=body | {"stream": True}).text
    last = json.loads(stream.split("data: ")[-2])
    assert last["usage"] == whole and whole["completion_tokens_details"]["reasoning_tokens"] > 6


PIECES = ("the cat", " X", "YZ", "<", "\n\n", "</think>", "<｜DSML｜", "</｜DSML｜", "é", "tool_calls>")


@pytest.mark.parametrize("wire_format", BODIES, ids=lambda known: known.name)
def test_all_counts_agree_whatever_is_written(server: Any, wire_format: WireFormat) -> None:
    rng = random.Random(7)
    stops = {CHAT: {"stop": ["XYZ"]}, MESSAGES: {"stop_sequences": ["XYZ"]}, RESPONSES: {}}[wire_format]
    for _ in range(60):
        text = "".join(rng.choice((*PIECES, markup("f", x="v"))) for _ in range(rng.randint(1, 7)))
        steps = steps_of(spelled(server, text), rng.randint(1, 9))
        counts = Counts(server, wire_format, steps, rng.choice(["stop", "length"]), **stops)
        assert counts.elsewhere == [counts.output] * 4, text
        if wire_format is not MESSAGES:
            assert counts.reasoning == counts.metered_reasoning <= counts.output, text


@pytest.mark.parametrize("wire_format", BODIES, ids=lambda known: known.name)
def test_what_cannot_be_followed_further_is_an_error_with_all_its_tokens(
    server: Any, wire_format: WireFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole answer is none: what ends it may be in the same step."""
    ids, jobs = spelled(server, "t h e c a t s a t"), list[Job]()
    prepare = ChatService.prepare
    monkeypatch.setattr(
        ChatService, "prepare", lambda *given, **named: jobs.append(prepare(*given, **named)) or jobs[-1]
    )
    with pytest.raises(RequestError, match="too complex"):
        Counts(server, wire_format, [ids[:4], ids[4:7]], "abort")
    assert jobs[0].meter.tokens.output == 7
    ids = spelled(server, "</think>" + markup("f", x="v"))
    counts = Counts(server, wire_format, [ids[:4], [*ids[4:], 5, 6]], "abort")
    assert counts.elsewhere == [counts.output] * 4 == [len(ids)] * 4


def test_an_error_of_the_reader_leaves_the_prompt_in_the_record(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(answer: object, event: object) -> None:
        raise ValueError("no such token")

    monkeypatch.setattr("dsv4.conversation.answer.Answer.push", fail)
    jobs: list[Job] = []
    prepare = ChatService.prepare
    monkeypatch.setattr(
        ChatService, "prepare", lambda *given, **named: jobs.append(prepare(*given, **named)) or jobs[-1]
    )
    with pytest.raises(ValueError, match="no such token"):
        Counts(server, CHAT, [[5, 6]], "stop")
    (job,) = jobs
    assert job.meter.tokens.miss == len(job.turn.prompt_token_ids) and job.meter.tokens.output == 0
