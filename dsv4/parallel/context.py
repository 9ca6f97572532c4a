"""Context parallelism: the tokens of one batch are cut over processes, queries stay, keys travel.

A batch of packed documents is cut at any token into contiguous ranges, one per rank. So one document at most, the first
of a range, goes on from earlier ranks. Of it a layer receives:
- the window keys of the 127 tokens before the range;
- the projections that its first compression window needs: 7 tokens in CSA, whose windows overlap, 127 in HCA;
- the entries that earlier ranks have made, and in CSA their index keys.
Each rank knows the lengths of all documents, so all tables are made on the host, and one all-to-all with exact sizes
carries each of them: the same rows as in an all-gather, but no padding and no rows that nobody reads. Everything else
is per token. Gradients go the same way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from dsv4.kernels.gather import take_rows
from dsv4.model.batch import RaggedBatch

AHEAD = 2  # tokens behind a part that are targets of its last token: the next one's, and the MTP block's


def even_cut(num_tokens: int, ranks: int) -> np.ndarray:
    """int64 [ranks + 1]: first token of each rank and the number of tokens; ranges as equal as they can be."""
    return np.arange(ranks + 1) * num_tokens // ranks


@dataclass(frozen=True)
class Table:
    """Rows that one rank sends and receives in an exchange."""

    rows: Tensor  # int64: own rows to send, rank after rank
    sent: list[int]  # number of them per rank
    received: list[int]  # rows from each rank


class DocumentCut:
    """Documents of `lengths` tokens, cut into ranges of tokens `bounds` int64 [ranks + 1]."""

    def __init__(self, lengths: np.ndarray, bounds: np.ndarray) -> None:
        self.lengths, self.bounds = lengths, bounds
        self.ends = np.cumsum(lengths)
        if bounds[0] != 0 or bounds[-1] != self.ends[-1] or (np.diff(bounds) < 1).any():
            raise ValueError(
                f"a batch of {self.ends[-1]} tokens is cut at {bounds.tolist()}; allowed: ascending from 0 to "
                f"{self.ends[-1]}, one token per rank at least"
            )

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    def document(self, token: np.ndarray) -> np.ndarray:
        """Documents of tokens."""
        return np.searchsorted(self.ends, token, side="right")

    def before(self) -> np.ndarray:
        """int64 [ranks]: tokens of the first document of each range that lie in earlier ranges."""
        first = self.document(self.bounds[:-1])
        return self.bounds[:-1] - (self.ends - self.lengths)[first]

    def first_entries(self, ratio: int) -> np.ndarray:
        """int64 [ranks + 1]: entries of `ratio` tokens, of all documents in order, that close before each range."""
        entries = self.lengths // ratio
        first = self.document(self.bounds[:-1])
        closed = (np.cumsum(entries) - entries)[first] + self.before() // ratio
        return np.append(closed, entries.sum())

    def table(self, bounds: np.ndarray, needed: np.ndarray, rank: int) -> Table:
        """Rows of `rank` where ranges [bounds[r], bounds[r + 1]) are the ranks', who read `needed` rows before theirs.

        A rank receives its rows in order.
        """

        def shared(reader: int, owner: int) -> np.ndarray:
            low = max(bounds[reader] - needed[reader], bounds[owner])
            return np.arange(low, max(low, min(bounds[reader], bounds[owner + 1])))

        sent = [shared(reader, rank) - bounds[rank] for reader in range(self.ranks)]
        received = [len(shared(rank, owner)) for owner in range(self.ranks)]
        return Table(torch.from_numpy(np.concatenate(sent)), [len(rows) for rows in sent], received)


class ContextPart:
    """A rank's part of a batch; `Part` of dsv4/model/batch.py. `group`: the ranks that hold the other parts."""

    def __init__(
        self, cut: DocumentCut, rank: int, group: dist.ProcessGroup, ahead: Tensor, document_lengths: np.ndarray
    ) -> None:
        self.cut, self.rank, self.group = cut, rank, group
        self._ahead, self._document_lengths = ahead, document_lengths
        self._tables: dict[tuple[str, int], Table] = {}

    @property
    def ahead(self) -> Tensor:
        return self._ahead

    @property
    def document_lengths(self) -> np.ndarray:
        return self._document_lengths

    def earlier(self, count: int, *rows: Tensor) -> tuple[Tensor, ...]:
        if ("tokens", count) not in self._tables:
            needed = np.minimum(self.cut.before(), count - 1)
            self._tables["tokens", count] = self.cut.table(self.cut.bounds, needed, self.rank)
        table = self._tables["tokens", count]
        got = self._exchange(table, *rows)
        start = int(self.cut.before()[self.rank])
        place = np.full(count, len(got))
        place[np.arange(start - len(got), start) % count] = np.arange(len(got))
        index = torch.from_numpy(place).to(got.device)
        rings = take_rows(torch.cat((got, got.new_zeros(1, got.shape[1]))), index).unsqueeze(0)
        return rings.split([part.shape[1] for part in rows], dim=2)

    def earlier_entries(self, made: Tensor, ratio: int) -> Tensor:
        if ("entries", ratio) not in self._tables:
            first = self.cut.first_entries(ratio)
            self._tables["entries", ratio] = self.cut.table(first, self.cut.before() // ratio, self.rank)
        return self._exchange(self._tables["entries", ratio], made)

    def _exchange(self, table: Table, *rows: Tensor) -> Tensor:
        """Send the table's rows of all `rows` [n, width], side by side; return those received [m, all widths]."""
        index = table.rows.to(rows[0].device)
        own = torch.cat([take_rows(part, index) if len(index) else part[:0] for part in rows], dim=1)
        got = collectives.all_to_all_single_autograd(own, table.received, table.sent, self.group)
        return collectives.wait_tensor(got)

    def add_documents(self, rows: Tensor) -> Tensor:
        edges = torch.stack((rows[0], rows[-1])).detach().contiguous()
        everyone = collectives.wait_tensor(collectives.all_gather_tensor(edges, 0, self.group))
        everyone = everyone.view(self.cut.ranks, *edges.shape)
        first = self.cut.document(self.cut.bounds[:-1]).tolist()
        last = self.cut.document(self.cut.bounds[1:] - 1).tolist()
        total = rows.clone()
        for row, document in ((0, first[self.rank]), (-1, last[self.rank])):
            parts = [everyone[r, 0] for r in range(self.cut.ranks) if first[r] == document]
            parts += [everyone[r, 1] for r in range(self.cut.ranks) if last[r] == document != first[r]]
            total[row] = torch.stack(parts).sum(0)
        return total

    def tie(self, x: Tensor, *others: Tensor) -> Tensor:
        return _Tie.apply(x, *others)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others)


def cut_batch(
    batch: RaggedBatch, mask: Tensor, group: dist.ProcessGroup, bounds: Sequence[int] | None = None
) -> tuple[RaggedBatch, Tensor]:
    """(This rank's part of a batch of whole documents, its flags of targets with those of the tokens behind it).

    mask bool [T] of the batch. bounds: first token of each rank of the group, and T; None: an even cut. ValueError if a
    rank would get no token, or the batch does not start at 0.
    """
    if batch.starts.any() or batch.part is not None:
        raise ValueError(f"a batch that starts at {batch.starts.tolist()} cannot be cut; allowed: whole documents")
    ranks, rank = group.size(), group.rank()
    cut = DocumentCut(batch.lengths, even_cut(batch.num_tokens, ranks) if bounds is None else np.asarray(bounds))
    low, high = (int(bound) for bound in cut.bounds[rank : rank + 2])
    first, last = (int(document) for document in cut.document(np.array([low, high - 1])))
    begins = (cut.ends - cut.lengths)[first : last + 1]
    starts = np.maximum(low - begins, 0)
    lengths = np.minimum(cut.ends[first : last + 1], high) - begins - starts
    behind = min(high + AHEAD, int(cut.ends[last]))
    part = ContextPart(cut, rank, group, batch.token_ids[high:behind], batch.lengths[first : last + 1])
    own = RaggedBatch(batch.token_ids[low:high], lengths, starts, np.arange(len(lengths)), part)
    return own, mask[low:behind]
