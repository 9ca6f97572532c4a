"""Lightning indexer: which compressed entries a CSA layer's query reads. Source: official model.py, Indexer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.config import CSA, ModelConfig
from dsv4.kernels.autocast import without_autocast
from dsv4.kernels.hadamard import hadamard
from dsv4.kernels.quant import fake_quant_fp4
from dsv4.kernels.topk import top_k_lowest_index
from dsv4.model.attention.compressor import Compressor
from dsv4.model.linear import Linear
from dsv4.model.rope import rotate

SCORE_CHUNK = 4096


@without_autocast
def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """sum_h weights[h] * relu(q[h] . key): q [..., h, D], weights [..., h], keys [..., n, D] or one [n, D] -> [..., n].

    fp32, under autocast too: the scores decide the choice. Keys are taken SCORE_CHUNK at a time, so memory does not
    grow with heads times context.
    """
    lead, heads = q.shape[:-2], q.shape[-2]
    # Two equal rows: a batched product with a single row takes another path through the BLAS, with other rounding.
    mix = weights.float().unsqueeze(-2).expand(*lead, 2, heads).reshape(-1, 2, heads)
    parts = []
    for start in range(0, keys.shape[-2], SCORE_CHUNK):
        part = keys[..., start : start + SCORE_CHUNK, :].float()
        if keys.dim() == 2:
            dots = q.reshape(-1, q.shape[-1]).float() @ part.mT
        else:
            dots = torch.bmm(q.float().flatten(1, -2), part.mT)
        dots = dots.relu_().view(-1, heads, part.shape[-2])
        parts.append(torch.bmm(mix, dots)[:, 0].view(*lead, -1))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


class Indexer(nn.Module):
    """Scores entries with few, narrow heads, and keeps the best index_topk."""

    def __init__(self, config: ModelConfig, quantize: bool) -> None:
        super().__init__()
        self.heads, self.width, self.top_k = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, quantize)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, self.width, CSA.ratio)
        self.quantize = quantize

    def rotate_and_quantize(self, x: Tensor) -> Tensor:
        """Hadamard and FP4 rounding of queries and keys as shipped; the identity in float numerics."""
        return fake_quant_fp4(hadamard(x)) if self.quantize else x

    def queries(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(q [T, heads, width], head weights [T, heads]) of the tokens."""
        q = self.wq_b(q_latent).view(-1, self.heads, self.width)
        q = self.rotate_and_quantize(rotate(q, cos.unsqueeze(1), sin.unsqueeze(1)))
        return q, self.weights_proj(x) * (self.width**-0.5 * self.heads**-0.5)

    def select(self, scores: Tensor, num_visible: Tensor) -> Tensor:
        """Entries each row reads: scores [..., n], num_visible [...] -> int64 [..., index_topk] ascending, -1 last."""
        n = scores.shape[-1]
        hidden = torch.arange(n, device=scores.device) >= num_visible.unsqueeze(-1)
        scores = scores.masked_fill(hidden, float("-inf"))
        if n < self.top_k:
            scores = torch.nn.functional.pad(scores, (0, self.top_k - n), value=float("-inf"))
        return top_k_lowest_index(scores, self.top_k)
