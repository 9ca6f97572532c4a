"""Rows share, write, go back, end and are saved in any order: counts are right, and nobody's entries ever change."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.cache import Cache, OutOfPagesError, SavedRow, Snapshot
from dsv4.cache.pages import pages_for
from dsv4.config import PAGE_TOKENS

from ..model.tiny import tiny_config

CONFIG = tiny_config(schedule=(0, 4, 128))
ROWS, TOKENS, PAGES = 3, 3 * PAGE_TOKENS, 7

State = tuple[Snapshot, list[int]]  # and the tokens that it is the state of


@dataclass
class Row:
    """A row as it should be: its tokens, and the states that its pages still have the entries of."""

    tokens: list[int] = field(default_factory=list)
    states: list[State] = field(default_factory=list)


class Rows:
    """A cache whose entries are the numbers of their last tokens, which are all different; every step is checked."""

    def __init__(self) -> None:
        self.cache = Cache(CONFIG, ROWS, TOKENS, torch.device("cpu"), torch.float32, max_pages=PAGES)
        self.compressors = [c for layer in self.cache.layers for c in layer.compressors()]
        self.rows = [Row() for _ in range(ROWS)]
        self.outside: list[tuple[list[int], list[State]]] = []  # pages that someone else holds, and what they hold
        self.saved: list[tuple[SavedRow, list[int]]] = []
        self.next_token = 1

    def write(self, lengths: dict[int, int]) -> None:
        """A forward of some rows: reserve, write entries and state, advance. Without pages nothing changes."""
        cache = self.cache
        slots, counts = np.array(list(lengths)), np.array(list(lengths.values()))
        free, table = cache.num_free_pages, cache.block_table.copy()
        needed = cache.pages_needed(list(lengths), list(lengths.values()))
        try:
            cache.reserve(slots, np.array([cache.lengths[slot] for slot in lengths]), counts)
        except OutOfPagesError:
            assert needed > free == cache.num_free_pages and (cache.block_table == table).all()
            return
        assert free - cache.num_free_pages == needed
        for slot, count in lengths.items():
            row, start = self.rows[slot], cache.lengths[slot]
            row.tokens += range(self.next_token, self.next_token + count)
            self.next_token += count
            row.states = [state for state in row.states if state[0].length <= start]
            for c in self.compressors:
                new = range(start // c.ratio, (start + count) // c.ratio)
                values = torch.tensor(row.tokens, dtype=torch.float32)[c.ratio - 1 :: c.ratio][new.start :]
                rows = torch.from_numpy(cache.entry_rows(slot, c.ratio, new.start, new.stop))
                c.write(rows, values[:, None].expand(-1, c.entries.shape[1]))
            for layer in cache.layers:
                layer.window[slot] = row.tokens[-1]
        cache.advance(slots, counts)

    def snapshot(self, slot: int) -> None:
        self.rows[slot].states.append((self.cache.snapshot(slot), list(self.rows[slot].tokens)))

    def restore(self, slot: int, number: int) -> None:
        row = self.rows[slot]
        if row.states:
            snapshot, tokens = row.states[number % len(row.states)]
            self.cache.restore(slot, snapshot)
            row.tokens = list(tokens)
            row.states = _within(row.states, pages_for(len(tokens)))

    def share(self, source: int, target: int, tokens: int) -> None:
        if self.is_empty(target):
            tokens %= len(self.rows[source].tokens) + 1
            self.cache.share(source, target, tokens)
            self.rows[target].states = _within(self.rows[source].states, pages_for(tokens))

    def retain(self, slot: int) -> None:
        pages = self.cache.pages_of(slot)
        self.cache.pool.retain(pages)
        self.outside.append((pages, _within(self.rows[slot].states, len(pages))))

    def release(self, number: int) -> None:
        if self.outside:
            self.cache.pool.release(self.outside.pop(number % len(self.outside))[0])

    def attach(self, slot: int, number: int) -> None:
        if self.outside and self.is_empty(slot):
            pages, states = self.outside[number % len(self.outside)]
            self.cache.attach(slot, pages)
            self.rows[slot].states = list(states)

    def save(self, slot: int) -> None:
        self.saved.append((self.cache.save(slot), list(self.rows[slot].tokens)))

    def load(self, slot: int, number: int) -> None:
        """With the whole pages of the same first tokens from another row, where one has them."""
        if not self.saved or not self.is_empty(slot):
            return
        saved, tokens = self.saved[number % len(self.saved)]
        for source, row in enumerate(self.rows):
            common = next(
                (i for i, pair in enumerate(zip(row.tokens, tokens, strict=False)) if len(set(pair)) > 1), None
            )
            common = min(len(row.tokens), len(tokens)) if common is None else common
            if common >= PAGE_TOKENS:
                self.cache.share(source, slot, common - common % PAGE_TOKENS)
                break
        try:
            self.cache.load(slot, saved)
            self.rows[slot].tokens = list(tokens)
        except OutOfPagesError:
            assert self.cache.lengths[slot] == 0

    def reset(self, slot: int) -> None:
        self.cache.reset(slot)
        self.rows[slot] = Row()

    def is_empty(self, slot: int) -> bool:
        return not (self.cache.block_table[slot] >= 0).any()

    def check(self) -> None:
        cache, table = self.cache, self.cache.block_table
        held = [page for page in table.flatten().tolist() if page >= 0] + [
            p for pages, _ in self.outside for p in pages
        ]
        assert [cache.pool.references(p) for p in range(PAGES)] == [held.count(p) for p in range(PAGES)]
        assert cache.num_free_pages == PAGES - len(set(held)) and cache.pool.num_shares == len(held) - len(set(held))
        for slot, row in enumerate(self.rows):
            assert cache.lengths[slot] == len(row.tokens)
            for layer in cache.layers:
                assert (layer.window[slot] == (row.tokens[-1] if row.tokens else 0)).all()
            for c in self.compressors:
                entries = c.entries[cache.entry_rows(slot, c.ratio, 0, len(row.tokens) // c.ratio)]
                want = torch.tensor(row.tokens, dtype=torch.float32)[c.ratio - 1 :: c.ratio]
                assert (entries == want[:, None]).all()


def _within(states: list[State], num_pages: int) -> list[State]:
    return [state for state in states if pages_for(state[0].length) <= num_pages]


SLOT, NUMBER, COUNT = st.integers(0, ROWS - 1), st.integers(0, 5), st.integers(1, 200)
STEPS = st.one_of(
    st.tuples(st.just("write"), st.dictionaries(SLOT, COUNT, min_size=1)),
    st.tuples(st.just("share"), SLOT, SLOT, st.integers(0, TOKENS)),
    *(st.tuples(st.just(name), SLOT) for name in ("snapshot", "retain", "save", "reset")),
    *(st.tuples(st.just(name), SLOT, NUMBER) for name in ("restore", "attach", "load")),
    st.tuples(st.just("release"), NUMBER),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(STEPS, min_size=5, max_size=40))
def test_any_order_of_steps(steps: list[tuple]) -> None:
    rows = Rows()
    for name, *arguments in steps:
        if name == "write":  # a row that would become too long stands aside
            fits = {slot: n for slot, n in arguments[0].items() if rows.cache.lengths[slot] + n <= TOKENS}
            if fits:
                rows.write(fits)
        else:
            getattr(rows, name)(*arguments)
        rows.check()


@pytest.mark.parametrize("seed", range(4))
def test_long_runs_of_steps(seed: int) -> None:
    """Sharing is common in these: whole sequences of steps that hypothesis seldom finds."""
    random, rows = np.random.default_rng(seed), Rows()
    names = ["write"] * 4 + ["snapshot", "share", "restore"] * 3 + ["retain", "release", "attach"] * 2
    names += ["save", "load", "reset", "reset"]
    for _ in range(400):
        name, slot, number = random.choice(names), int(random.integers(ROWS)), int(random.integers(6))
        if name == "write":
            lengths = {int(s): int(random.integers(1, 150)) for s in random.permutation(ROWS)[: 1 + number % ROWS]}
            rows.write({s: min(n, TOKENS - rows.cache.lengths[s]) for s, n in lengths.items()})
        elif name == "share":
            rows.share(slot, int(random.integers(ROWS)), len(rows.rows[slot].tokens))
        elif name == "release":
            rows.release(number)
        elif name in ("restore", "attach", "load"):
            getattr(rows, name)(slot, number)
        else:
            getattr(rows, name)(slot)
        rows.check()
