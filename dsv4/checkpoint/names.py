"""Tensor names: the official ones, and those that transformers (5.23) writes and uses internally.

`save_pretrained` writes neither the official names nor its own module names: it turns most module names back into
official ones (`attn.wq_a`, `experts.7.w1`), keeps the prefix `model.`, and renames the KV norm to `attn.norm`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Applied in this order; each leaves official names unchanged.
_TO_OFFICIAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.q_a_proj\.", ".wq_a."),
        (r"\.q_b_proj\.", ".wq_b."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.o_(a|b)_proj\.", r".wo_\1."),
        (r"\.compressor\.indexer\.(wq_b|weights_proj)\.", r".indexer.\1."),
        (r"\.compressor\.indexer\.scorer\.", ".indexer."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.position_bias$", ".ape"),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.(shared_experts|experts\.\d+)\.gate_proj\.", r".\1.w1."),
        (r"\.(shared_experts|experts\.\d+)\.down_proj\.", r".\1.w2."),
        (r"\.(shared_experts|experts\.\d+)\.up_proj\.", r".\1.w3."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"\.weight_scale_inv$", ".scale"),
    )
]

_MERGED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
_DRAFT = re.compile(r"^(?:mtp\.(\d+)\.([^.]+)|dspark)")
# First parts of the names inside V4's MTP block, including Flash-Base's copies of embedding and head.
_MTP_PARTS = frozenset(
    [
        *("attn", "ffn", "attn_norm", "ffn_norm", "e_proj", "h_proj", "enorm", "hnorm", "norm", "emb", "head"),
        *(f"hc_{site}_{part}" for site in ("attn", "ffn", "head") for part in ("fn", "base", "scale")),
    ]
)
_DUPLICATE = re.compile(r"^mtp\.\d+\.(emb\.tok_emb|head)\.weight$")


class MergedPart(NamedTuple):
    """One expert's weight inside a tensor that holds all experts of a layer: `merged[expert][half of the rows]`."""

    name: str
    expert: int
    half: int | None  # 0: first half of the rows, 1: second half, None: all rows


def to_official(name: str) -> str:
    """Official spelling of a stored name; official and unknown names are returned unchanged."""
    for pattern, replacement in _TO_OFFICIAL:
        name = pattern.sub(replacement, name)
    return name


def to_transformers(name: str) -> str:
    """Name under which save_pretrained writes an official tensor. MTP tensors, which it lacks, keep their names."""
    if name == "head.weight" or name.startswith("mtp."):
        return name
    if name == "embed.weight":
        return "model.embed_tokens.weight"
    if name.startswith("hc_head_"):
        return f"model.hc_head.hc_{name.removeprefix('hc_head_')}"
    return "model." + name.replace(".attn.kv_norm.", ".attn.norm.")


def is_transformers(name: str) -> bool:
    """True if only transformers writes this name."""
    return name.startswith(("model.", "lm_head."))


def is_duplicate(name: str) -> bool:
    """True for the copies of embedding and head that Flash-Base stores under its MTP block."""
    return _DUPLICATE.match(name) is not None


def is_draft(name: str, mtp_blocks: int) -> bool:
    """True for a tensor of a draft model beside the first `mtp_blocks` MTP blocks, which the main model does not need.

    Such a tensor is in a later block, or in a sub-module that V4's MTP block lacks (DSpark's main_proj, markov_head,
    ...).
    """
    match = _DRAFT.match(name)
    if match is None:
        return False
    block, part = match.groups()
    return block is None or int(block) >= mtp_blocks or part not in _MTP_PARTS


def merged_parts(name: str, num_experts: int) -> list[MergedPart]:
    """Experts' weights in a merged tensor of transformers' modules; empty for any other (official) name.

    gate_up_proj is [experts, 2 * width, hidden], w1's rows first; down_proj is [experts, hidden, width].
    """
    match = _MERGED.match(name)
    if match is None:
        return []
    prefix, kind = match.groups()
    halves = (("w1", 0), ("w3", 1)) if kind == "gate_up_proj" else (("w2", None),)
    return [
        MergedPart(f"{prefix}.{expert}.{weight}.weight", expert, half)
        for expert in range(num_experts)
        for weight, half in halves
    ]
