"""Table of the model's parameters: initialization, optimizer and storage of each. Needs no torch.

The module stacks a layer's routed experts: `layers.3.ffn.experts.w1` [E, out, in] holds the matrices that checkpoints
and native kernels call `layers.3.ffn.experts.0.w1.weight` and so on (stacks.py). All other names are the official ones.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal, NamedTuple, Protocol

from dsv4.analysis.inventory import tensor_inventory
from dsv4.config import ModelConfig

# normal: N(0, initializer_range). The last three start mHC close to a plain residual stream (initialization.py).
Init = Literal["normal", "ones", "zeros", "hc_base", "hc_head_base", "hc_scale"]
# by_rule: the router's bias, which balancing moves. DeepSeek-V4 report, Muon and Training Setups: AdamW trains
# embedding, head, RMSNorm weights and mHC's static biases and gates; Muon all other matrices, `ape` among them.
# Vectors that the report does not name are trained by AdamW without weight decay.
Optimizer = Literal["muon", "adamw", "adamw_no_decay", "by_rule"]
# Split of a parameter into independent matrices, which Muon orthogonalizes one by one. Window series: where windows
# overlap, in CSA, a compressor projects each token twice, for the window that it lies in and for the next one.
Matrices = Literal[
    "one", "per head", "per index head", "per output group", "per expert", "per window series", "pre, post and residual"
]


class Row(NamedTuple):
    """One row of the table: rules for the parameters whose name, within a block or in the model, matches `names`.

    Their dtype in a checkpoint comes from the inventory: `stored_dtype`.
    """

    names: str  # regular expression, matched against the whole name
    init: Init
    optimizer: Optimizer
    matrices: Matrices = "one"


TABLE = (
    Row(r"(embed|head)\.weight", "normal", "adamw"),
    Row(r"(.+[._])?[eh]?norm\.weight", "ones", "adamw"),
    Row(r"attn\.attn_sink", "zeros", "adamw_no_decay"),
    Row(r"attn\.(indexer\.)?compressor\.ape", "zeros", "muon", "per window series"),
    Row(r"attn\.(wq_a|wkv|wo_b)\.weight", "normal", "muon"),
    Row(r"attn\.wq_b\.weight", "normal", "muon", "per head"),
    Row(r"attn\.wo_a\.weight", "normal", "muon", "per output group"),
    Row(r"attn\.(indexer\.)?compressor\.(wkv|wgate)\.weight", "normal", "muon", "per window series"),
    Row(r"attn\.indexer\.wq_b\.weight", "normal", "muon", "per index head"),
    Row(r"attn\.indexer\.weights_proj\.weight", "normal", "muon"),
    Row(r"ffn\.gate\.weight", "normal", "muon"),
    Row(r"ffn\.gate\.bias", "zeros", "by_rule"),
    Row(r"ffn\.experts\.w[123]", "normal", "muon", "per expert"),
    Row(r"ffn\.shared_experts\.w[123]\.weight", "normal", "muon"),
    Row(r"hc_(attn|ffn)_fn", "normal", "muon", "pre, post and residual"),
    Row(r"hc_(attn|ffn)_base", "hc_base", "adamw"),
    Row(r"hc_(attn|ffn|head)_scale", "hc_scale", "adamw"),
    Row(r"hc_head_fn", "normal", "muon"),
    Row(r"hc_head_base", "hc_head_base", "adamw"),
    Row(r"[eh]_proj\.weight", "normal", "muon"),
)

_BLOCK = re.compile(r"^(layers|mtp)\.\d+\.")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(w[123])\.weight$")


class SplitSizes(Protocol):
    """Sizes of a ModelConfig that determine the number of independent matrices in a parameter."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def o_groups(self) -> int: ...
    @property
    def index_n_heads(self) -> int: ...
    @property
    def index_head_dim(self) -> int: ...
    @property
    def hc_mult(self) -> int: ...


@cache
def _row_within_block(name: str) -> Row:
    rows = [row for row in TABLE if re.fullmatch(row.names, name)]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of dsv4/model/parameters.py are of a parameter named {name!r}; allowed: 1")
    return rows[0]


def row_of(name: str) -> Row:
    """The table's row for parameter `name` in the module's spelling; ValueError if V4 has no such parameter."""
    return _row_within_block(_BLOCK.sub("", name))


def matrix_shapes(name: str, shape: tuple[int, ...], sizes: SplitSizes) -> tuple[tuple[int, int], ...]:
    """Shape of each independent matrix in parameter `name` of `shape` [rows, columns] or [E, rows, columns].

    They lie one below the other; the window series of `ape`, whose columns are channels, side by side. ValueError if
    the parameter does not divide into them.
    """
    (height, width), matrices, hc = shape[-2:], row_of(name).matrices, sizes.hc_mult
    if matrices == "per expert":
        return ((height, width),) * shape[0]
    if matrices == "pre, post and residual":  # three matrices in the paper
        return (hc, width), (hc, width), (hc * hc, width)
    if matrices == "per window series":
        series, across = sizes.index_head_dim if ".indexer." in name else sizes.head_dim, name.endswith("ape")
        channels = width if across else height
        if channels % series:
            raise ValueError(f"parameter {name!r} has {channels} channels; allowed: window series of {series}")
        return ((height, series) if across else (series, width),) * (channels // series)
    parts = {
        "one": 1,
        "per head": sizes.num_attention_heads,
        "per index head": sizes.index_n_heads,
        "per output group": sizes.o_groups,
    }[matrices]
    if height % parts:
        raise ValueError(f"parameter {name!r} has {height} rows, which do not divide into {parts} independent matrices")
    return ((height // parts, width),) * parts


@cache
def _stored_dtypes() -> dict[str, str]:
    """Dtypes in the official instruct layout, by name within a block, from nano, which has all kinds of layers."""
    specs = tensor_inventory(ModelConfig.preset("nano"), "official")
    return {_BLOCK.sub("", module_name(spec.name)[0]): spec.dtype for spec in specs}


def stored_dtype(name: str) -> str:
    """Dtype of the parameter `name` in the official instruct layout: "I8" (FP4), "F8_E4M3", "BF16" or "F32"."""
    return _stored_dtypes()[_BLOCK.sub("", name)]


def is_layer_product(name: str) -> bool:
    """True for the weights that kernels/precision.py rounds: those that the official layout stores in FP4 or FP8."""
    return name.endswith(("weight", "w1", "w2", "w3")) and stored_dtype(name) in ("I8", "F8_E4M3")


def module_name(official: str) -> tuple[str, int | None]:
    """Official name -> (the module's name, the expert's index in the stack or None)."""
    expert = _EXPERT.match(official)
    return (f"{expert[1]}.{expert[3]}", int(expert[2])) if expert else (official, None)


def matrix_name(stack: str, expert: int) -> str:
    """Official name of an expert's matrix in a stack of the module."""
    experts, _, matrix = stack.rpartition(".")
    return f"{experts}.{expert}.{matrix}.weight"
