import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.engine.outputs import SampledToken
from dsv4.engine.request import Request
from dsv4.engine.sampling_params import SamplingParams
from dsv4.engine.stop_strings import StopMatcher


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.matched


def test_a_stop_string_over_three_pieces_is_removed_with_all_that_follows() -> None:
    assert run(["one S", "TO", "P two", " three"], ("STOP",)) == ("one ", "STOP")


def test_a_partial_match_is_held_back_and_released() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("a ST") == "a "
    assert matcher.push("X") == "STX"
    assert matcher.push("STO") == ""
    assert matcher.flush() == "STO"


def test_an_overlapping_beginning_is_not_lost() -> None:
    assert run(["aa", "ab"], ("aab",)) == ("a", "aab")


def test_the_stop_string_that_ends_first_wins_then_the_longer_one() -> None:
    assert run(["xabcd"], ("abcd", "bc")) == ("xa", "bc")
    assert run(["xabc"], ("bc", "abc")) == ("x", "abc")


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.push("abc") == "abc" and matcher.matched is None


@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_any_split_gives_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    whole = run(list(text), tuple(stops))
    assert run(pieces, tuple(stops)) == whole
    shown, matched = whole
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown + (matched or ""))


class Halves:
    """Decoder of letters by their number; 0 is the first half of a character."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, token_id: int, /) -> str:
        self._half = "" if token_id else "\ufffd"
        return chr(token_id) if token_id else ""

    def flush(self) -> str:
        return self._half


@pytest.mark.parametrize(("last", "reason", "cause"), [(0, "stop", "g\ufffd"), (ord("x"), "length", None)])
@pytest.mark.parametrize("together", [True, False])
def test_a_stop_string_that_half_a_character_completes_has_ended_the_request(
    last: int, reason: str, cause: str | None, together: bool
) -> None:
    params = SamplingParams(max_tokens=3, stop=["g\ufffd"], hidden_token_ids=[7])
    request = Request(1, [5], params, 0, frozenset(), 100, Halves(), text_vocab_size=300)
    sampled = [SampledToken(token) for token in (ord("n"), ord("g"), last)]
    events = [request.append(step, 0.0) for step in ([sampled] if together else [[token] for token in sampled])]
    assert "".join(event.text for event in events) == request.output.text == ("n" if cause else "ngx")
    assert (events[-1].finish_reason, request.output.stop_reason) == (reason, cause)


def test_a_hidden_token_has_no_text_and_ends_nothing() -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, hidden_token_ids=[ord("E")])
    request = Request(1, [5], params, 0, frozenset(), 100, Halves(), text_vocab_size=300)
    request.append([SampledToken(ord(letter)) for letter in "aEbE"], 0.0)
    assert (request.output.text, request.output.finish_reason, len(request.output.token_ids)) == ("ab", "length", 4)


class Broken:
    """Constraint that cannot follow one token."""

    complete = False
    error: str | None = None

    def advance(self, token_id: int, /) -> None:
        self.error = "too complex" if token_id == ord("!") else None

    def masks(self, draft_token_ids: Sequence[int], /) -> list[None]:
        return [None] * (len(draft_token_ids) + 1)


def test_a_request_that_was_aborted_has_not_stopped_whatever_its_text_ends_with() -> None:
    params = SamplingParams(max_tokens=9, stop=["g\ufffd"])
    request = Request(1, [5], params, 0, frozenset(), 100, Halves(), constraint=Broken(), text_vocab_size=300)
    event = request.append([SampledToken(token) for token in (ord("n"), ord("g"), 0, ord("!"))], 0.0)
    assert (event.text, event.finish_reason) == ("n", "abort")
    assert request.output.stop_reason == "the constraint cannot be followed: too complex"
