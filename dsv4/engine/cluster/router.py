"""PrefixRouter: Ray Serve's choice of a replica for each request, by prefixes and by load.

Ray's own PrefixCacheAffinityRouter compares texts, never forgets what a replica has evicted, and needs the extra
`ray[llm]`. This one compares the blocks that the engine's cache has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from dsv4.engine.cluster.library import ray_module
from dsv4.engine.cluster.prefix_index import PrefixIndex

_RequestRouter: Any = ray_module("ray.serve.request_router").RequestRouter
DIGESTS = "digests"  # keyword of a call that is routed by prefix


class PrefixRouter(_RequestRouter):
    """Prefers the replica that holds most of a prompt's blocks, unless it has far more requests than another.

    Then, and for a prompt that none knows, it takes the one with fewer requests of two at random ("power of two
    choices"), and the one with fewer blocks where they have as many. It runs in the server's process.
    """

    def initialize_state(self, max_imbalance: int = 4) -> None:
        """`max_imbalance`: requests that a replica may have more than another and still be preferred."""
        self._max_imbalance = max_imbalance
        self._index = PrefixIndex()

    async def choose_replicas(
        self, candidate_replicas: Sequence[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """Replicas in ranks, the preferred ones first; Ray takes the first one with room, of a rank the idlest."""
        replicas = list(candidate_replicas)
        if not replicas:
            return []
        for replica in replicas:
            stats: dict[str, Any] = replica.routing_stats or {}
            self._index.report(_name(replica.replica_id), stats.get("ended", 0), stats.get("blocks", b""))
        digests = _digests(pending_request)
        if digests and not self._is_imbalanced(replicas):
            matches = [self._index.matching(_name(replica.replica_id), digests) for replica in replicas]
            best = max(matches)
            if best:
                preferred = [replica for replica, match in zip(replicas, matches, strict=True) if match == best]
                others = [replica for replica, match in zip(replicas, matches, strict=True) if match < best]
                return [preferred, self._two_of(others)]
        return [self._two_of(replicas)]

    def update_replicas(self, replicas: Sequence[Any]) -> None:
        super().update_replicas(replicas)  # pyright: ignore[reportUnknownMemberType]
        self._index.keep([_name(replica.replica_id) for replica in replicas])

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        request = pending_request.metadata.internal_request_id
        self._index.begin(_name(replica_id), request, _digests(pending_request))

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._index.end(_name(replica_id), internal_request_id)

    def _is_imbalanced(self, replicas: Sequence[Any]) -> bool:
        cache: Any = self.replica_queue_len_cache
        known = [length for replica in replicas if (length := cache.get(replica.replica_id)) is not None]
        return bool(known) and max(known) - min(known) > self._max_imbalance

    def _two_of(self, replicas: Sequence[Any]) -> list[Any]:
        """Two replicas at random, the one with fewer blocks first."""
        two = random.sample(replicas, min(2, len(replicas)))
        return sorted(two, key=lambda replica: self._index.held(_name(replica.replica_id)))


def _name(replica_id: Any) -> str:
    return replica_id.unique_id


def _digests(pending_request: Any | None) -> Sequence[bytes]:
    return () if pending_request is None else pending_request.kwargs.get(DIGESTS, ())
