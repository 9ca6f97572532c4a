import itertools

from hypothesis import given
from hypothesis import strategies as st

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
