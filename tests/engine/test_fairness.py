"""Shares of users and turns of requests: who waits how long, whatever the others ask for."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.engine.config import EngineConfig
from dsv4.engine.fairness import ServiceCounters

from .simulation import Arrival, Simulation


def config(**options: int) -> EngineConfig:
    return EngineConfig(**{"enable_prefix_caching": False, "time_slice": 16, **options})


def test_the_least_served_user_comes_first_and_idle_time_is_not_saved_up() -> None:
    counters = ServiceCounters()
    for user in (("k", "a"), ("k", "b")):
        counters.enter(user)
    counters.serve(("k", "a"), 100)
    counters.serve(("k", "b"), 40)
    assert counters.served(("k", "b")) == (140, 40) < counters.served(("k", "a")) == (140, 100)
    counters.enter(("k", "c"))
    assert counters.served(("k", "c")) == (140, 40), "level with the least served, not ahead of all"
    counters.enter(("other", "x"))
    assert counters.served(("other", "x")) == (140, 0)
    counters.leave(("k", "a"))
    counters.enter(("k", "a"))
    assert counters.served(("k", "a")) == (140, 100), "leaving and coming back resets nothing"
    for user in (("k", "a"), ("k", "b"), ("k", "c"), ("other", "x")):
        counters.leave(user)
    assert not counters._served and not counters._active


def test_counters_of_users_that_left_do_not_pile_up() -> None:
    counters = ServiceCounters()
    counters.enter(("stays",))
    for number in range(5000):
        counters.enter((str(number),))
        counters.serve((str(number),), 1)
        counters.leave((str(number),))
    assert len(counters._served) < 1100


def test_many_users_of_one_key_share_what_the_key_gets() -> None:
    """Ten users of a key beside one of another: the two keys get the same."""
    counters = ServiceCounters()
    users = [("crowd", str(i)) for i in range(10)] + [("one", "")]
    for user in users:
        counters.enter(user)
    for _ in range(1000):
        counters.serve(min(users, key=counters.served), 7)
    assert abs(counters.served(("one", ""))[0] - counters.served(("crowd", "0"))[0]) <= 7
    shares = [counters.served(user)[1] for user in users[:10]]
    assert max(shares) - min(shares) <= 7


@given(rows=st.integers(1, 8), prompt=st.integers(1, 100), output=st.integers(50, 400), later=st.integers(0, 60))
@settings(deadline=None, max_examples=30)
def test_two_hundred_requests_of_one_user_do_not_hold_up_one_of_another(
    rows: int, prompt: int, output: int, later: int
) -> None:
    """The first token comes at once where the crowd has several rows, else when the turn of its only one is over."""
    crowd = [Arrival(0, prompt, output, "crowd")] * 200
    arrivals = [*crowd, Arrival(later, 30, 20, "one")]
    simulation = Simulation(config(max_num_seqs=rows, max_num_batched_tokens=256), arrivals)
    number = max(i for i, a in enumerate(simulation.arrivals) if a.user == "one")
    simulation.run(1000, until=number)
    assert simulation.first_token[number] <= (3 if rows > 1 else 3 + 16)


@given(
    rows=st.integers(1, 8),
    running=st.lists(
        st.builds(Arrival, st.integers(0, 5), st.integers(1, 3000), st.integers(100, 500), st.just("a")), max_size=6
    ),
    short=st.lists(
        st.builds(Arrival, st.integers(0, 80), st.integers(1, 30), st.integers(1, 60), st.just("a")), max_size=2
    ),
)
@settings(deadline=None, max_examples=60)
def test_a_short_prompt_waits_a_bounded_time_for_its_first_token_whatever_else_waits_or_runs(
    rows: int, running: list[Arrival], short: list[Arrival]
) -> None:
    """All of one user. The bound: a time slice for each row's worth of requests in progress and of those before it,
    and three steps."""
    probe = Arrival(40, 25, 1, "a")
    simulation = Simulation(config(max_num_seqs=rows, max_num_batched_tokens=256), [*running, *short, probe])
    number = max(i for i, a in enumerate(simulation.arrivals) if a == probe)
    simulation.run(100_000, until=number)
    ahead = len(running) + len(short)
    assert simulation.first_token[number] <= 3 + (16 + 3) * math.ceil((ahead + 1) / rows)


@given(
    rows=st.integers(1, 6),
    pages=st.integers(4, 12),
    arrivals=st.lists(
        st.builds(
            Arrival,
            st.integers(0, 200),
            st.one_of(st.integers(1, 12), st.integers(1, 500)),
            st.integers(1, 300),
            st.sampled_from(["a", "b", "c", None]),
        ),
        min_size=1,
        max_size=20,
    ),
)
@settings(deadline=None, max_examples=60)
def test_everybody_ends_in_a_pool_too_small_for_all(rows: int, pages: int, arrivals: list[Arrival]) -> None:
    """Preemption for pages and for turns together: no stall, and the work is that of the tokens."""
    work = sum(arrival.prompt + arrival.output for arrival in arrivals)
    simulation = Simulation(
        config(max_num_seqs=rows, max_num_batched_tokens=64), [cut(arrival, pages) for arrival in arrivals], pages
    ).run(210 + 2 * work)
    assert len(simulation.last_token) == len(arrivals)


def cut(arrival: Arrival, pages: int) -> Arrival:
    """The arrival with a prompt that fits into so many pages."""
    return Arrival(arrival.step, min(arrival.prompt, 128 * pages), arrival.output, arrival.user)


def test_two_users_get_equal_shares_of_the_rows() -> None:
    """One has forty requests from the start on, the other as many from step 50 on."""
    arrivals = [Arrival(0, 10, 200, "a")] * 40 + [Arrival(50, 10, 200, "b")] * 40
    simulation = Simulation(config(max_num_seqs=4, max_num_batched_tokens=64), arrivals)
    shares = []
    for step in range(600):
        for request, arrival in zip(simulation.requests, simulation.arrivals, strict=True):
            if arrival.step == step:
                simulation.scheduler.add(request)
        simulation._step(step)
        shares.append(sum(r.user == ("b",) for r in simulation.scheduler.running))
    served = simulation.scheduler.counters.served
    assert abs(served(("a",))[0] - served(("b",))[0]) < 400
    assert sum(shares[100:]) / len(shares[100:]) > 1.8


def test_turns_are_taken_only_while_somebody_waits() -> None:
    simulation = Simulation(config(max_num_seqs=2, max_num_batched_tokens=64), [Arrival(0, 10, 200, "a")] * 2).run(300)
    assert simulation.scheduler.cache_manager.num_preemptions == 0
    assert max(simulation.longest_pause.values()) == 1


def test_a_batch_takes_no_turns() -> None:
    simulation = Simulation(config(max_num_seqs=2, max_num_batched_tokens=64), [Arrival(0, 10, 90)] * 6).run(1000)
    assert simulation.scheduler.cache_manager.num_preemptions == 0


def test_a_user_has_few_answers_in_progress_at_a_time() -> None:
    """Turns among many requests of one user: beside the rows at most eight wait to continue."""
    simulation = Simulation(config(max_num_seqs=4, max_num_batched_tokens=64), [Arrival(0, 10, 100, "a")] * 60)
    for request in simulation.requests:
        simulation.scheduler.add(request)
    for step in range(3000):
        if simulation.scheduler.has_work:
            simulation._step(step)
        assert sum(request.saved is not None for request in simulation.scheduler.waiting) <= 8
    assert len(simulation.last_token) == 60


def test_an_answer_goes_on_when_it_has_waited_for_a_turn() -> None:
    """Ten answers in four rows: nobody pauses for longer than the turns of the others."""
    arrivals = [Arrival(0, 10, 300, "a")] * 8
    simulation = Simulation(config(max_num_seqs=4, max_num_batched_tokens=64), arrivals).run(2000)
    assert max(simulation.longest_pause.values()) <= 2 * 16 + 4
