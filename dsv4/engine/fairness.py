"""Fair shares of users: tokens served to each, and who is to be served next.

A user is a path of names, such as (API key, user id): keys share the engine, users of a key share what the key gets. Of
two users the one that was served fewer tokens comes first (virtual token counters: Sheng et al., Fairness in Serving
Large Language Models, OSDI 2024). One that was idle is not owed what it has not asked for: it begins level with the
least served of those that are active.
"""

from __future__ import annotations

from collections import Counter

User = tuple[str, ...]

KEPT_COUNTERS = 1024  # of users that are not active: so that leaving and coming back resets nothing


class ServiceCounters:
    """Tokens served to each user, and to all users below each beginning of a path."""

    def __init__(self) -> None:
        self._served: dict[User, int] = {}
        self._active: Counter[User] = Counter()  # unfinished requests, by user and by every beginning of its path

    def served(self, user: User) -> tuple[int, ...]:
        """The user's place in the order of service, the smallest first: tokens of its first name, of its first two
        names and so on."""
        return tuple(self._served.get(level, 0) for level in _levels(user))

    def enter(self, user: User) -> None:
        """A request of the user has come."""
        for level in _levels(user):
            if not self._active[level]:
                others = (known for known in self._active if known[:-1] == level[:-1] and len(known) == len(level))
                least = min((self._served.get(known, 0) for known in others if self._active[known]), default=0)
                self._served[level] = max(self._served.get(level, 0), least)
            self._active[level] += 1

    def leave(self, user: User) -> None:
        """A request of the user has ended."""
        for level in _levels(user):
            self._active[level] -= 1
            if not self._active[level]:
                del self._active[level]
        if not self._active:
            self._served.clear()
        elif len(self._served) > len(self._active) + KEPT_COUNTERS:
            self._served = {level: self._served.get(level, 0) for level in self._active}

    def serve(self, user: User, tokens: int) -> None:
        """Tokens were computed for the user."""
        for level in _levels(user):
            self._served[level] = self._served.get(level, 0) + tokens


def _levels(user: User) -> list[User]:
    return [user[:size] for size in range(1, len(user) + 1)]
