"""Lightning indexer of a CSA layer: its queries and keys. Source: official inference model.py, Indexer."""

from __future__ import annotations

from torch import Tensor, nn

from dsv4.config import CSA, ModelConfig
from dsv4.kernels.hadamard import hadamard
from dsv4.kernels.quant import fake_quant_fp4
from dsv4.kernels.rope import rotate
from dsv4.model.attention.compressor import Compressor
from dsv4.model.linear import Linear, linear_fp32


class Indexer(nn.Module):
    """A few narrow heads whose scores choose the index_topk entries that a token reads."""

    def __init__(self, config: ModelConfig, quantize: bool) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.top_k = config.index_topk  # 0: tokens read all entries, as training begins (training/attention_phase.py)
        self.learns = True  # False: no loss of its own in training
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, quantize)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, self.width, CSA.ratio)
        self.quantizes = quantize  # queries and keys rounded to FP4; quantization-aware training sets it too

    def rotate_and_quantize(self, x: Tensor) -> Tensor:
        """Hadamard and FP4 rounding of queries and keys, or the identity in float numerics."""
        return fake_quant_fp4(hadamard(x)) if self.quantizes else x

    def queries(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(q [T, heads, width], head weights [T, heads]) of the tokens."""
        q = self.wq_b(q_latent).view(-1, self.heads, self.width)
        q = self.rotate_and_quantize(rotate(q, cos.unsqueeze(1), sin.unsqueeze(1)))
        weights = linear_fp32(x, self.weights_proj.matrix)
        return q, weights * (self.width**-0.5 * self.heads**-0.5)
