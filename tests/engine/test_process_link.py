"""The link of an engine process: messages of any size arrive whole and in order, and its end is an error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from dsv4.engine.outputs import ProgressEvent, Timings, TokenEvent
from dsv4.engine.process.messages import Close, Drop, EngineState, Events, Link, LogRecord, pack, unpack

TIMINGS = Timings(0.25, 0.5, 1.0, 3, 2, 1)
EVENTS = (
    TokenEvent([5, 6], "ab", [-0.5, -1.0], [((5, -0.5), (7, -2.0)), ()], "stop", 2, TIMINGS, [None, -3.0], [(), ()]),
    TokenEvent([7], "", [], []),
    ProgressEvent(9, 0, 4, None, 0.5, 0.25),
)


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    one, other = socket.socketpair()
    with one, other:
        yield Link(one), Link(other)


def test_messages_of_any_size_arrive_in_order(ends: tuple[Link, Link]) -> None:
    sent: list[object] = []
    for size in (0, 1, 10, 16_300, 16_384, 65_500, 65_536, 3_000_000, 5):
        sent += [LogRecord({"msg": "x" * size}), Drop(size)]

    def send() -> None:
        for message in sent:
            ends[0].send(message)

    sender = threading.Thread(target=send)
    sender.start()
    assert [ends[1].receive() for _ in sent] == sent
    sender.join(60)


def test_senders_do_not_mix(ends: tuple[Link, Link]) -> None:
    def send(letter: str) -> None:
        for _ in range(20):
            ends[0].send(LogRecord({"msg": letter * 100_000}))

    senders = [threading.Thread(target=send, args=(letter,)) for letter in "abc"]
    for sender in senders:
        sender.start()
    records = [ends[1].receive() for _ in range(60)]
    texts = [record.fields["msg"] for record in records if isinstance(record, LogRecord)]
    assert sorted(texts) == sorted(letter * 100_000 for letter in "abc" * 20)


@pytest.mark.parametrize("state", [EngineState(), EngineState(2, 3, "the queue is full", 99)])
def test_the_events_of_a_step_are_what_they_were(ends: tuple[Link, Link], state: EngineState) -> None:
    ends[0].send(Events([(number, pack(event)) for number, event in enumerate(EVENTS)], state))
    got = ends[1].receive()
    assert isinstance(got, Events) and got.state == state
    assert [(number, unpack(packed)) for number, packed in got.events] == list(enumerate(EVENTS))


def test_an_end_that_is_gone_is_an_error(ends: tuple[Link, Link]) -> None:
    ends[0].send(Close())
    ends[0].close()
    assert ends[1].receive() == Close()
    with pytest.raises(EOFError):
        ends[1].receive()
    with pytest.raises(OSError):
        for _ in range(2):
            ends[1].send(Drop(1))
