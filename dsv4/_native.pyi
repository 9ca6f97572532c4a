"""The native kernels, built from native/python/. Only dsv4.kernels and dsv4.model import them: kernels/cpu.py.

Arrays are fp32 (ids and indices int64) tensors or NumPy arrays on the CPU. A wrong shape is a ValueError.
"""

from typing import Any

def isas() -> list[str]:
    """Instruction sets that this machine can run, best last."""

def select(isa: str) -> None:
    """Run the code compiled for one of isas()."""

def selected() -> str:
    """Instruction set of isas() that runs."""

def set_threads(count: int) -> None: ...
def threads() -> int: ...

class Model:
    """A model's tensors by official name, kept alive and read in place."""

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, Any],
        ratios: list[int],
        window_freq: list[float],
        compressed_freq: list[float],
    ) -> None: ...
    def limit_experts(self, residency: ExpertResidency) -> None:
        """Read the routed experts through a residency."""
    def count_experts(self, load: list[Any]) -> None:
        """Add the tokens of each expert to int64 arrays [experts] from now on, one array per layer."""

class ExpertResidency:
    """Budget in bytes of routed experts in memory; drops them all first. Linux only.

    pages: int64 [n, 6], rows of layer, expert, address, bytes, index of the file in `files` (descriptors), place in it;
    whole pages. owner: keeps the files mapped.
    """

    def __init__(self, budget: int, layers: int, experts: int, pages: Any, files: list[int], owner: Any) -> None: ...
    def counts(self) -> dict[str, int]:
        """Fields of dsv4.checkpoint.expert_memory.ExpertStats."""

class Cache:
    """A cache's tensors: a layer's window, then kv, score and entries of each compressor. Window and entries are bytes
    in a format (kind, channels, rotated channels) of dsv4/cache/formats.py."""

    def __init__(
        self,
        layers: list[list[Any]],
        keys: tuple[str, int, int],
        index_keys: tuple[str, int, int],
        block_table: Any,
        stored: Any,
        num_pages: int,
        checked: bool,
    ) -> None: ...
    def forget(self, page: int) -> None:
        """Drop the quantized index keys of a page after a write to its entries from outside the kernels."""

    def quantized_rows(self) -> int:
        """Index keys quantized since the cache was made, over all layers."""

    def stale(self) -> tuple[int, int]:
        """(layer, page) of the first quantized key that differs from its entry; (-1, -1): none, or not `checked`."""

def forward(
    model: Model, cache: Cache, token_ids: Any, lengths: Any, starts: Any, slots: Any,
    first: int, last: int, embed: bool, streams: Any,
) -> None:  # fmt: skip
    """Layers first to last - 1 over a ragged batch, appending to the cache: streams [T, hc_mult, d] in place."""

def forward_to_logits(
    model: Model, cache: Cache, token_ids: Any, lengths: Any, starts: Any, slots: Any, rows: Any, logits: Any,
    streams: Any = None, experts: Any = None, entries: Any = None,
) -> None:  # fmt: skip
    """The main layers over a ragged batch, appending to the cache, then logits [n, vocab] of rows [n], ascending.

    streams [T, hc_mult, d] gets those of all tokens. experts int16 [T, score-routed layers, k] and entries int32
    [T, layers with an indexer, index_topk] get their choices; entries of tokens that read all stay as they are."""

def mtp_forward(
    model: Model, cache: Cache, next_token_ids: Any, lengths: Any, starts: Any, slots: Any, depth: int, streams: Any
) -> None:
    """An MTP block over a ragged batch: the main model's streams [T, hc_mult, d] become the block's, in place."""

def head(model: Model, prefix: str, streams: Any, logits: Any) -> None:
    """Streams [n, hc_mult, d] -> logits [n, vocab] in place; prefix names the hc_head and the norm."""

def linear(x: Any, weight: Any, y: Any) -> None:
    """y [n, out] = x [n, in] times weight [out, in] transposed."""

def rms_norm(x: Any, weight: Any, eps: float, y: Any) -> None: ...
def sinkhorn(c: Any, iters: int, eps: float) -> None:
    """As dsv4.kernels.sinkhorn, in place."""

def exp(x: Any, y: Any) -> None: ...
def fake_quant(x: Any, block: int, fp4: bool, floor: float = ...) -> None:
    """As dsv4.kernels.quant, rows in place. floor: least amax of a block in FP8."""

def round_factors(x: Any, y: Any) -> None:
    """As dsv4.kernels.precision, rows of x into y, fp32."""

def pack_factors(x: Any, y: Any) -> None:
    """As round_factors, into BF16 numbers, int16."""

def hadamard(x: Any) -> None: ...
def top_k(scores: Any, k: int, index: Any) -> None:
    """As dsv4.kernels.topk, for finite scores: index [n, k]."""

def sample(logits: Any, allowed: Any, temperature: float, top_k: int, top_p: float, min_p: float, key: int) -> int:
    """As dsv4.kernels.sampling; temperature 0: the largest logit, the lower id among equals."""

# Single operations of a forward, on tokens of one sequence: for native.py of the operations in dsv4/kernels.

def hc_pre(
    streams: Any,
    fn: Any,
    scale: Any,
    base: Any,
    norm: Any,
    iters: int,
    norm_eps: float,
    eps: float,
    weights: Any,
    x: Any,
) -> None:
    """Streams [n, s, d] -> pre, post and comb, weights [n, s * (2 + s)], and the sub-layer's normed input x [n, d]."""

def hc_post(y: Any, weights: Any, streams: Any) -> None:
    """Write y [n, d] into the streams, by the weights of hc_pre."""

def route(logits: Any, choice: Any, token_ids: Any, scale: float, index: Any, weights: Any) -> None:
    """Experts [n, k] for router logits [n, E]; choice is the bias [E] or tid2eid [vocab, k]."""

def compress(
    ratio: int, kv: Any, score: Any, ape: Any, start: int, state_kv: Any, state_score: Any, entries: Any
) -> None:
    """Entries of the windows closed by tokens [start, start + n), from projections [n, total]; updates the state."""

def attend(q: Any, kv: Any, window: Any, entries: Any, chosen: Any, ratio: int, start: int, sink: Any, o: Any) -> None:
    """Attention of scaled q [n, H, D] over window and entries: o [n, H, D]."""

def swiglu(gate: Any, up: Any, limit: float, weight: Any) -> None:
    """As dsv4.kernels.swiglu, into gate [n, width], each row times its weight [n]."""

def rotation(inv_freq: list[float], positions: Any, cos: Any, sin: Any) -> None:
    """Factors cos and sin [n, pairs] at int64 positions [n]."""

def rotate(x: Any, cos: Any, sin: Any) -> None:
    """As dsv4.kernels.rope, rows of x [n, width] in place by cos and sin [n, pairs]."""

# Training: forwards over sequences, without a cache, and gradients. lengths, starts: int64 [N], tokens and first
# position of each. kv, score and keys have, before a sequence's own rows, those of its last tokens before `start`: as
# many as there are, up to 127 keys, up to a compressor's state less one projection.

def rms_norm_gradient(x: Any, weight: Any, eps: float, dy: Any, dx: Any, d_weight: Any) -> None: ...
def swiglu_gradient(
    gate: Any, up: Any, limit: float, weight: Any, dy: Any, d_gate: Any, d_up: Any, d_weight: Any
) -> None: ...
def route_gradient(logits: Any, index: Any, scale: float, d_weights: Any, d_scores: Any, d_logits: Any) -> None:
    """d_logits [n, E] from the gradients of the weights [n, k] and, unless None, of the scores [n, E]."""

def hc_pre_gradient(
    streams: Any, fn: Any, scale: Any, base: Any, norm: Any, iters: int, norm_eps: float, eps: float,
    dx: Any, d_post: Any, d_comb: Any, d_streams: Any, d_fn: Any, d_scale: Any, d_base: Any, d_norm: Any,
) -> None:  # fmt: skip
    """Gradients of hc_pre; with norm, d_post, d_comb and d_norm None those of hc_head."""

def hc_post_gradient(
    g: Any, y: Any, streams: Any, post: Any, comb: Any, dy: Any, d_streams: Any, d_post: Any, d_comb: Any
) -> None: ...
def hc_head(streams: Any, fn: Any, scale: Any, base: Any, norm_eps: float, eps: float, x: Any) -> None:
    """Read-out x [n, d] of streams [n, s, d], not normed."""

def compress_batch(ratio: int, kv: Any, score: Any, lengths: Any, starts: Any, entries: Any) -> None:
    """Entries of all windows that close, from kv and score [rows, total], ape included."""

def compress_gradient(
    ratio: int, kv: Any, score: Any, lengths: Any, starts: Any, d_entries: Any, d_kv: Any, d_score: Any
) -> None: ...
def attend_batch(
    q: Any, keys: Any, entries: Any, chosen: Any, ratio: int, lengths: Any, starts: Any, sink: Any,
    o: Any, probs: Any = None,
) -> None:  # fmt: skip
    """Attention of scaled q [T, H, D]; probs [T, k] get the entries' probabilities, added over the heads."""

def attend_gradient(
    q: Any, keys: Any, entries: Any, chosen: Any, ratio: int, lengths: Any, starts: Any, sink: Any,
    d_o: Any, d_q: Any, d_keys: Any, d_entries: Any, d_sink: Any,
) -> None: ...  # fmt: skip
def index_loss(
    q: Any, weights: Any, keys: Any, chosen: Any, probs: Any, lengths: Any, starts: Any, losses: Any,
    d_q: Any = None, d_weights: Any = None, d_keys: Any = None,
) -> None:  # fmt: skip
    """Losses [T] as in dsv4.kernels.index_loss, and the gradients of their sum."""

def has_bf16_gradients() -> bool:
    """True if the selected instruction set has gradients of BF16 products."""

def cross_entropy(
    x: Any,
    weight: Any,
    targets: Any,
    losses: Any,
    predicted: Any,
    dx: Any = None,
    d_weight: Any = None,
    bf16: bool = False,
) -> None:
    """Losses and likeliest tokens [n] of rows x [n, in], and the gradients of the losses' sum."""

def newton_schulz(x: Any, coefficients: list[float]) -> None:
    """As in dsv4.kernels.newton_schulz, in place, on fp32 matrices or the bits of BF16 ones; three coefficients per
    step.
    """
