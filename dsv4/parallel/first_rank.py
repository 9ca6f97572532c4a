"""Work that one rank does for all, such as writing shards: the others wait for it, however long it takes."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dsv4.parallel.mesh import launched
from dsv4.parallel.sums import gather_objects

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
LONGEST = timedelta(days=7)


@functools.cache
def _meet() -> tuple[Store, int]:
    """Store of the launcher's ranks, and this one's number.

    Kept as long as the process: if no launcher holds the store, rank 0 does, and the others read it after its work.
    """
    store, rank, _ = next(rendezvous("env://", timeout=LONGEST))
    return store, rank


class FirstRankError(ValueError):
    """The first rank could not do what the others waited for."""


def on_first_rank(name: str, work: Callable[[], T]) -> T:
    """Result of `work` on every rank of the launcher; rank 0 alone runs it. Needs no process group.

    name: of this work, once per run. Its error is raised on rank 0, a FirstRankError with its words on the others.
    """
    if not launched():
        return work()
    store, rank = _meet()
    key = f"first_rank/{name}"
    if rank > 0:
        store.wait([key], LONGEST)
        result, error = pickle.loads(bytes.fromhex(store.get(key).decode()))
        if error is not None:
            raise FirstRankError(f"rank 0 stopped: {error}")
        return result
    try:
        result = work()
    except BaseException as error:
        store.set(key, pickle.dumps((None, str(error))).hex())
        raise
    store.set(key, pickle.dumps((result, None)).hex())
    return result


def patient_group() -> dist.ProcessGroup:
    """Group of all ranks that waits for one of them however long it works, but not once it has ended."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONGEST))


def first_of_group(work: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `work` on rank 0 while the others of a process group wait; its error is raised on all of them.

    They wait as long as the group's collectives do: of work that may take long give a `patient_group`.
    """
    own: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as raised:
            own = raised
    sent = gather_objects(None if own is None else _to_send(own), group)[0]
    error = own or sent
    if error is not None:
        raise error


def _to_send(error: Exception) -> Exception:
    """The error, or its words in one that can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return FirstRankError(f"rank 0 stopped: {error}")
    return error
