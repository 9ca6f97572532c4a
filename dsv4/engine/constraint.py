"""Constraint: follows one request's output with llguidance's parser, and makes the masks of its next tokens.

The limits of the parser count what it has done: masks fill the tables of its lexer, and a mask is cheaper where an
earlier one has filled them. So that no outcome depends on drafts, each place of the output has a parser that has made
one mask before each token and nothing else. Drafts are followed on copies, and a draft that stands brings its copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from llguidance import LLMatcher

_EXCERPT = re.compile(r" *(\d+ \||\^+$)")  # a line of the grammar, and the mark below it, in an error


class Writable(Protocol):
    """Masks of the tokens that a constraint may write, and of the ends of the sentence alone."""

    writable: np.ndarray
    only_ends: np.ndarray


@dataclass(slots=True)
class _Place:
    """A place in the output, with the parser there."""

    matcher: LLMatcher
    begun: bool  # False: the constraint begins later, and the parser is at its beginning
    complete: bool  # True: nothing but the end of the sentence may follow; False after an error
    error: str | None = None  # why the output up to here cannot be followed
    mask: np.ndarray | None = None  # of the next token, once it is made
    mask_error: str | None = None  # why no token can follow

    @property
    def is_followed(self) -> bool:
        """True if tokens may follow; the mask is made."""
        return self.error is None and self.mask_error is None and not self.complete


class Constraint:
    """Constraint on one request's tokens, from its first one on, or after the first of the tokens `begins_after`.

    Until then any text is allowed, but not its end: no output escapes its constraint.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Writable,
        begins_after: Sequence[int] = (),
        before: np.ndarray | None = None,
    ) -> None:
        """`before`: tokens allowed until it begins, as of `masks`; None: it begins at once."""
        self._vocabulary = vocabulary
        self._begins_after = frozenset(begins_after)
        self._before = before
        self._bits = np.zeros_like(vocabulary.writable)  # the matcher writes its mask here
        self._address = self._bits.ctypes.data
        self._place = _place(matcher, begun=not begins_after)
        self._ahead: list[tuple[int, _Place]] = []  # the drafts of the latest masks, each with the place behind it

    @property
    def complete(self) -> bool:
        """True if nothing but the end of the sentence may follow."""
        return self._place.complete

    @property
    def error(self) -> str | None:
        """Why the output cannot be followed any further, such as a limit of the parser; None while it can be."""
        return self._place.error

    def check(self) -> str | None:
        """The error of a mask of the parser as it is now, None where there is none."""
        place = _place(self._place.matcher, begun=True)
        self._fill(place)
        return place.mask_error

    def masks(self, draft_token_ids: Sequence[int] = ()) -> list[np.ndarray | None]:
        """Allowed tokens now and after each draft, a bit per token, uint32 [ceil(vocab / 32)].

        Behind a draft that is not allowed, and further on than an error, the masks are None: nothing that is sampled
        there stands. Drafts may be rejected: they change nothing, and their errors are none of the constraint's.
        """
        place = self._place
        masks: list[np.ndarray | None] = [self._mask(place)]
        for index, draft in enumerate(draft_token_ids):
            if index >= len(self._ahead) or self._ahead[index][0] != draft:
                if not place.is_followed or not allows(self._mask(place), draft):
                    break
                # A copy, no rollback: that could not undo an error, nor what the limits count.
                matcher = place.matcher.deep_copy() if place.begun else place.matcher
                self._ahead[index:] = [(draft, self._after(place, draft, matcher))]
            place = self._ahead[index][1]
            masks.append(self._mask(place))
        return [*masks, *[None] * (1 + len(draft_token_ids) - len(masks))]

    def advance(self, token_id: int) -> None:
        """Takes in the token that follows; `error` says where it cannot."""
        if self._ahead and self._ahead[0][0] == token_id:
            self._place = self._ahead.pop(0)[1]
        else:
            self._ahead.clear()
            self._place = self._after(self._place, token_id, self._place.matcher)

    def _after(self, place: _Place, token_id: int, matcher: LLMatcher) -> _Place:
        """The place behind a token; its parser is `matcher`, which is as that of `place`."""
        if not place.begun:
            return _place(matcher, begun=token_id in self._begins_after)
        error = place.error or place.mask_error
        if error is None and not matcher.consume_token(token_id):
            error = _error_of(matcher)
        return _place(matcher, begun=True, error=error)

    def _mask(self, place: _Place) -> np.ndarray:
        """The mask of a place, made when it is first asked for."""
        if place.mask is None:
            place.mask = self._fill(place) if place.begun else self._before
            assert place.mask is not None, "what begins later has a mask of what comes before"
        return place.mask

    def _fill(self, place: _Place) -> np.ndarray:
        """A new mask of the parser; after an error only the end of the sentence is allowed."""
        place.matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
        mask = self._bits & self._vocabulary.writable
        if not np.count_nonzero(mask):  # in a third of the time of any()
            place.mask_error = _error_of(place.matcher) or "it leaves no token of text"
        elif place.matcher.is_error():
            place.mask_error = _error_of(place.matcher)
        return mask if place.error is None and place.mask_error is None else self._vocabulary.only_ends


def _place(matcher: LLMatcher, begun: bool, error: str | None = None) -> _Place:
    return _Place(matcher, begun, complete=begun and error is None and matcher.is_stopped(), error=error)


def allows(mask: np.ndarray, token_id: int) -> bool:
    """True if a mask of `Constraint.masks` allows a token."""
    return bool(mask[token_id >> 5] >> (token_id & 31) & 1)


def first_lines(message: str) -> str:
    """An error of llguidance on one line, without the excerpt and the parser's state, 500 characters at most."""
    lines = message.split("<state>")[0].splitlines()
    return " ".join(" ".join(line for line in lines if not _EXCERPT.match(line)).split())[:500]


def _error_of(matcher: LLMatcher) -> str | None:
    return first_lines(matcher.get_error()) if matcher.is_error() else None
