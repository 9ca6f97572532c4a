"""LoRA adapters in plans and in the count of operations: their numbers, and the products that they add.

A matrix W [rows, columns] has A [rank, columns] and B [rows, rank]; a stack of experts has a pair for each expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.analysis.training_weights import newton_schulz_flops


@dataclass(frozen=True)
class AdaptedMatrix:
    """A matrix that has an adapter, or each of a stack of `experts`.

    part: "layers.3", "mtp.0" or "head", as in training_weights.py; name: the rest, such as "attn.wq_a". uses: rows per
    token that it multiplies, as many as experts are chosen. whole: its kernel takes W + B A
    (model/linear.py:Linear.matrix), made for each micro-batch and use, which has a gradient itself.
    """

    part: str
    name: str
    rows: int
    columns: int
    experts: int = 0
    uses: int = 1
    whole: bool = False

    @property
    def of_indexer(self) -> bool:
        return ".indexer." in self.name

    @property
    def width(self) -> int:
        """Numbers of A and B for a rank of 1."""
        return self.rows + self.columns


@dataclass(frozen=True, eq=False)  # by identity, as a key of caches
class Adapters:
    """Parameters of adapters, which a run trains alone. muon: orthogonalized, with one momentum; else AdamW's two."""

    rank: int
    matrices: tuple[AdaptedMatrix, ...]
    muon: bool = False

    @property
    def indexer(self) -> bool:
        """True if indexers learn, and have a loss."""
        return any(one.of_indexer for one in self.matrices)

    def has(self, part: str, *names: str) -> bool:
        """True if one of these matrices of a part has an adapter."""
        return any(one.part == part and one.name in names for one in self.matrices)

    def numbers(self, parts: frozenset[str] | None = None, expert: int = 1) -> int:
        """Parameters of the adapters, or of those of `parts`, on a rank with one of `expert` parts of the experts."""
        mine = (one for one in self.matrices if parts is None or one.part in parts)
        return sum(self.rank * one.width * (one.experts // expert if one.experts else 1) for one in mine)

    def made(self, parts: frozenset[str]) -> int:
        """Numbers of the matrices W + B A that are made for a micro-batch."""
        return sum(one.uses * one.rows * one.columns for one in self.matrices if one.whole and one.part in parts)

    def kept(self, part: str, prefix: str) -> int:
        """Numbers x A per token that side products keep, of the part's matrices whose names begin so."""
        mine = (one for one in self.matrices if one.part == part and one.name.startswith(prefix) and not one.whole)
        return sum(self.rank * one.uses for one in mine)

    def forward_flops(self, tokens: int, batches: float, indexers: bool = True) -> float:
        """FLOPs of the side products on `tokens` tokens, and of W + B A in as many micro-batches.

        indexers: False where they do not run.
        """
        total = 0.0
        for one in self._run(indexers):
            times = one.rows * one.columns * batches if one.whole else one.width * tokens
            total += 2 * self.rank * one.uses * times
        return total

    def backward_flops(self, tokens: int, batches: float, indexers: bool = True) -> float:
        """FLOPs of their gradients, for inputs, A and B; of W + B A also that of the whole matrix."""
        wholes = sum(2.0 * one.uses * one.rows * one.columns * tokens for one in self._run(indexers) if one.whole)
        return 2 * self.forward_flops(tokens, batches, indexers) + wholes

    def _run(self, indexers: bool) -> list[AdaptedMatrix]:
        return [one for one in self.matrices if indexers or not one.of_indexer]

    @property
    def optimizer_flops(self) -> float:
        """FLOPs of one step of Muon on every A and B; AdamW's are not counted."""
        if not self.muon:
            return 0.0
        return sum(
            max(1, one.experts) * newton_schulz_flops(self.rank, side)
            for one in self.matrices
            for side in (one.rows, one.columns)
        )
