"""PrefixIndex: which replicas hold the blocks that a prompt begins with, as far as the router can know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dsv4.prefix_digests import DIGEST_BYTES

KEPT_REQUESTS = 4096  # of a replica, that have ended since its latest reports
# A report may have been made while a request was ending; the next one was made after it.
REPORTS_UNTIL_KNOWN = 2


@dataclass
class _Routed:
    """A request that was sent to a replica, whose blocks it will hold."""

    digests: Sequence[bytes]
    reports: int | None = None  # since the request has ended; None while it runs


@dataclass
class _Replica:
    reported: frozenset[bytes] = frozenset()
    report: tuple[int, bytes] = (-1, b"")
    requests: dict[str, _Routed] = field(default_factory=dict[str, _Routed])
    routed: Counter[bytes] = field(default_factory=Counter[bytes])  # digest -> requests that brought it


class PrefixIndex:
    """Blocks of each replica: those that it has reported, and those of requests that no report can know yet."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets all other replicas."""
        for name in self._replicas.keys() - set(replicas):
            del self._replicas[name]

    def report(self, name: str, number: int, blocks: bytes) -> None:
        """Takes a report: all blocks that a replica has stored, after `number` requests had ended. The same again does
        nothing."""
        replica = self._replicas.setdefault(name, _Replica())
        if replica.report == (number, blocks):
            return
        replica.report = number, blocks
        replica.reported = frozenset(
            blocks[start : start + DIGEST_BYTES] for start in range(0, len(blocks), DIGEST_BYTES)
        )
        for request, routed in list(replica.requests.items()):
            if routed.reports is not None:
                routed.reports += 1
                if routed.reports >= REPORTS_UNTIL_KNOWN:
                    _forget(replica, request)

    def begin(self, name: str, request: str, digests: Sequence[bytes]) -> None:
        """A request goes to a replica."""
        replica = self._replicas.setdefault(name, _Replica())
        if request not in replica.requests and digests:
            replica.requests[request] = _Routed(digests)
            replica.routed.update(digests)

    def end(self, name: str, request: str) -> None:
        """A request has ended: its blocks are there until a report knows better."""
        replica = self._replicas.get(name)
        if replica is None or request not in replica.requests:
            return
        replica.requests[request].reports = 0
        ended = [known for known, routed in replica.requests.items() if routed.reports is not None]
        if len(ended) > KEPT_REQUESTS:
            _forget(replica, ended[0])

    def matching(self, name: str, digests: Sequence[bytes]) -> int:
        """Blocks from a prompt's first on that a replica holds."""
        replica = self._replicas.get(name)
        if replica is None:
            return 0
        known = (digest in replica.reported or digest in replica.routed for digest in digests)
        return next((place for place, there in enumerate(known) if not there), len(digests))

    def held(self, name: str) -> int:
        """Blocks that a replica holds, about."""
        replica = self._replicas.get(name)
        return 0 if replica is None else len(replica.reported | replica.routed.keys())


def _forget(replica: _Replica, request: str) -> None:
    replica.routed.subtract(replica.requests.pop(request).digests)
    replica.routed = +replica.routed  # without those that no request has any more
