"""The queue of rollout requests: what has ended, and what is removed while others write to it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql

from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.records import LoggedToken, NewRequest, Step
from dsv4.post_training.rollout_service.tables import REQUESTS, TOKENS

REQUESTED = [NewRequest(number, (3, 4), {"seed": number}) for number in range(2)]


def test_a_request_that_has_ended_takes_no_more(tmp_path: Path) -> None:
    now, token = [0.0], LoggedToken(5, -1.0, 0)
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}", max_stalled=1, lease_seconds=30.0, clock=lambda: now[0])
    queue.add(1, REQUESTED)
    stalled, done = queue.lease("old", 4)
    assert queue.write([Step(done, 0, [token], "stop")]) == set()
    now[0] = 31.0
    assert queue.lease("new", 4) == []  # of those that stall their workers
    for lease, position in ((stalled, 0), (done, 1)):
        assert queue.write([Step(lease, position, [token], "length")]) == {lease.id}
    first, second = queue.finished(1)
    assert first.error is not None and first.finish_reason is None and not first.tokens
    assert second.finish_reason == "stop" and second.tokens == (token,)


@pytest.mark.postgres
def test_requests_are_removed_while_a_worker_writes(postgres_server: str, tmp_path: Path) -> None:
    """The removal waits for the tokens that are being written, and takes them with it."""
    one, other = (RolloutQueue(f"postgresql://dsv4@/postgres?host={postgres_server}", run=str(tmp_path)) for _ in "ab")
    one.add(1, REQUESTED)
    leases = other.lease("w", 2)
    token = {"position": 0, "token_id": 5, "log_probability": -1.0, "version": 0}
    rows = [{"request": lease.id, **token} for lease in leases]
    with ThreadPoolExecutor(1) as pool:
        with other._begin() as connection:
            held = REQUESTS.c.id.in_([lease.id for lease in leases])
            connection.execute(sql.select(REQUESTS.c.id).where(held).with_for_update())
            connection.execute(TOKENS.insert(), rows)
            removing = pool.submit(one.keep, 1)
            time.sleep(0.5)
            assert not removing.done()
        removing.result(60)
    assert not one.known(1) and one.num_tokens() == 0
    assert other.write([Step(lease, 1) for lease in leases]) == {lease.id for lease in leases}
    for queue in (one, other):
        queue.close()
