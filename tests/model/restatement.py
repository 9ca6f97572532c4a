"""V4's forward pass restated from its description: numpy, float64, loops where they read better.

It shares the weights with dsv4.model and dsv4.kernels, but no code. `mistake` names one mistake that other
implementations shipped; the trap tests show that the model agrees with the description and not with the mistake.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4.config import ModelConfig

from ..kernels.number_formats import fake_fp4, fake_fp8, to_bf16

Array = np.ndarray[Any, Any]

# Linear maps whose input the shipped model rounds to FP8.
QUANTIZED = ("wq_a", "wq_b", "wkv", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def hadamard_matrix(n: int) -> Array:
    """Sylvester's matrix, from the parity of the common bits of row and column."""
    i = np.arange(n)
    return np.array([[1.0 - 2.0 * (int(a & b).bit_count() % 2) for b in i] for a in i]) / np.sqrt(n)


class Restatement:
    """One sequence at a time: streams(ids) -> [S, 4, d], logits(h) -> [S, V], mtp(h, next_ids) -> logits [S, V]."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig, mistake: str = "", shipped: bool = False) -> None:
        self.w: dict[str, Array] = {
            n: t.detach().double().numpy() if t.is_floating_point() else t.numpy() for n, t in weights.items()
        }
        self.c, self.mistake, self.shipped = config, mistake, shipped
        self.asked: set[str] = set()

    def wrong(self, mistake: str) -> bool:
        self.asked.add(mistake)
        return self.mistake == mistake

    def linear(self, x: Array, name: str) -> Array:
        if self.shipped and name.split(".")[-1] in QUANTIZED and "compressor" not in name:
            x = fake_fp8(x, 128)
        return x @ self.w[f"{name}.weight"].T

    def rms(self, x: Array, name: str | None = None) -> Array:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.rms_norm_eps)
        return y * self.w[f"{name}.weight"] if name else y

    # mHC, 2.1

    def mixes(self, h: Array, name: str) -> Array:
        return self.rms(h.reshape(len(h), -1)) @ self.w[f"{name}_fn"].T

    def hc_pre(self, h: Array, name: str) -> tuple[Array, Array, Array]:
        s, eps = self.c.hc_mult, self.c.hc_eps
        mu, base, scale = self.mixes(h, name), self.w[f"{name}_base"], self.w[f"{name}_scale"]
        pre = sigmoid(mu[:, :s] * scale[0] + base[:s]) + (0 if self.wrong("pre without eps") else eps)
        post = sigmoid(mu[:, s : 2 * s] * scale[1] + base[s : 2 * s]) * (1 if self.wrong("post not doubled") else 2)
        post = post + (eps if self.wrong("post with eps") else 0)
        comb = np.empty((len(h), s, s))
        for j in range(s):
            for k in range(s):
                i = 2 * s + s * j + k
                comb[:, j, k] = mu[:, i] * scale[2] + base[i]
        comb = softmax(comb, 2) + (0 if self.wrong("softmax without eps") else eps)
        order = [1]
        for _ in range(self.c.hc_sinkhorn_iters - (0 if self.wrong("a row and column pass too many") else 1)):
            order += [2, 1]
        for axis in order[1:] if self.wrong("first column step left out") else order:
            comb = comb / (comb.sum(axis, keepdims=True) + eps)
        return np.einsum("tj,tjd->td", pre, h), post, comb

    def hc_post(self, y: Array, h: Array, post: Array, comb: Array) -> Array:
        if self.wrong("combine matrix not transposed"):
            comb = comb.transpose(0, 2, 1)
        return post[:, :, None] * y[:, None] + np.einsum("tjk,tjd->tkd", comb, h)

    def hc_head(self, h: Array, name: str) -> Array:
        w = sigmoid(self.mixes(h, name) * self.w[f"{name}_scale"] + self.w[f"{name}_base"]) + self.c.hc_eps
        return np.einsum("tj,tjd->td", w, h)

    # Rotary positions, 2.2

    def frequencies(self, compressed: bool) -> Array:
        c, r, yarn = self.c, self.c.qk_rope_head_dim, self.c.rope_scaling
        theta = c.compress_rope_theta if compressed else c.rope_theta
        f = np.array([theta ** (-2 * i / r) for i in range(r // 2)])
        if not compressed and not self.wrong("YaRN in window layers"):
            return f
        if yarn is None or self.wrong("no YaRN in compressed layers"):
            return f

        def corr(n: float) -> float:
            return r * np.log(yarn.original_max_position_embeddings / (2 * np.pi * n)) / (2 * np.log(theta))

        low, high = max(np.floor(corr(yarn.beta_fast)), 0), min(np.ceil(corr(yarn.beta_slow)), r - 1)
        ramp = np.clip((np.arange(r // 2) - low) / max(high - low, 1e-3), 0, 1)
        return f * (1 - ramp) + f / yarn.factor * ramp

    def rope(self, x: Array, positions: Array, ratio: int, inverse: bool = False) -> Array:
        """Rotate x [S, ..., D], one position per row."""
        r = self.c.qk_rope_head_dim
        angle = np.multiply.outer(positions, self.frequencies(bool(ratio)))
        turn = np.exp(-1j * angle if inverse else 1j * angle)
        if ratio and self.wrong("YaRN scales magnitudes"):
            turn = turn * (0.1 * np.log(16) + 1)
        turn = turn.reshape(len(x), *[1] * (x.ndim - 2), r // 2)
        out = x.copy()
        part = out[..., :r] if self.wrong("rotary channels lead") else out[..., x.shape[-1] - r :]
        if self.wrong("rotary halves, not pairs"):
            first, second = slice(0, r // 2), slice(r // 2, r)
        else:
            first, second = slice(0, r, 2), slice(1, r, 2)
        turned = (part[..., first] + 1j * part[..., second]) * turn
        part[..., first], part[..., second] = turned.real, turned.imag
        return out

    # Compressor, 2.4

    def compress(self, x: Array, name: str, ratio: int, width: int) -> Array:
        """Entries [S // ratio, width], normed and rotated."""
        u, z = self.linear(x, f"{name}.wkv"), self.linear(x, f"{name}.wgate")
        bias = self.w[f"{name}.ape"][np.arange(len(x)) % ratio]
        z = z if self.wrong("ape left out") else z + bias
        u = u + bias if self.wrong("ape added to the values too") else u
        entries, positions = [], []
        for i in range(len(x) // ratio):
            own = slice(i * ratio, (i + 1) * ratio)
            if ratio == 128:
                logits, values = z[own], u[own]
            else:
                a, b = slice(0, width), slice(width, 2 * width)
                if self.wrong("overlap halves swapped"):
                    a, b = b, a
                before = slice((i - 1) * ratio, i * ratio)
                old_z, old_u = (
                    (z[before, a], u[before, a]) if i else (np.full((4, width), -np.inf), np.zeros((4, width)))
                )
                if i == 0 and self.wrong("first window's missing half counts"):
                    old_z = np.zeros((4, width))
                if self.wrong("no overlap"):
                    old_z = np.full((4, width), -np.inf)
                logits, values = np.concatenate((old_z, z[own, b])), np.concatenate((old_u, u[own, b]))
            entries.append((softmax(logits, 0) * values).sum(0))
            positions.append(i * ratio + (ratio - 1 if self.wrong("entry position at the window's end") else 0))
        if not entries:
            return np.zeros((0, width))
        return self.rope(self.rms(np.array(entries), f"{name}.norm"), np.array(positions), ratio)

    def keys_as_stored(self, k: Array) -> Array:
        nope = self.c.head_dim - self.c.qk_rope_head_dim
        return np.concatenate((fake_fp8(k[:, :nope], 64), to_bf16(k[:, nope:])), -1) if self.shipped and len(k) else k

    # Attention, 2.3 and 2.5

    def index_scores(self, x: Array, latent: Array, name: str) -> Array:
        c, S = self.c, len(x)
        q = self.linear(latent, f"{name}.wq_b").reshape(S, c.index_n_heads, c.index_head_dim)
        q = self.rope(q, np.arange(S), 4)
        k = self.compress(x, f"{name}.compressor", 4, c.index_head_dim)
        if self.shipped and len(k):
            H = hadamard_matrix(c.index_head_dim)
            q, k = fake_fp4(q @ H), fake_fp4(k @ H)
        dots = np.einsum("thd,nd->thn", q, k)
        dots = dots if self.wrong("indexer without relu") else np.maximum(dots, 0)
        w = self.linear(x, f"{name}.weights_proj") * (c.index_head_dim * c.index_n_heads) ** -0.5
        return np.einsum("th,thn->tn", w, dots)

    def visible(self, t: int, ratio: int) -> int:
        if self.wrong("entry seen before its window closes"):
            return (t + ratio) // ratio
        return t // ratio if self.wrong("entry hidden from its last token") else (t + 1) // ratio

    def attention(self, x: Array, name: str, ratio: int) -> Array:
        c, S = self.c, len(x)
        H, D, at = c.num_attention_heads, c.head_dim, np.arange(S)
        plain = 0 if self.wrong("base theta for window keys of compressed layers") else ratio
        latent = self.rms(self.linear(x, f"{name}.wq_a"), f"{name}.q_norm")
        q = self.linear(latent, f"{name}.wq_b").reshape(S, H, D)
        q = self.rope(q if self.wrong("no norm of query heads") else self.rms(q), at, plain)
        kv = self.keys_as_stored(self.rope(self.rms(self.linear(x, f"{name}.wkv"), f"{name}.kv_norm"), at, plain))
        entries = np.zeros((0, D))
        if ratio:
            entries = self.keys_as_stored(self.compress(x, f"{name}.compressor", ratio, D))
        scores = self.index_scores(x, latent, f"{name}.indexer") if ratio == 4 else None
        sink = self.w[f"{name}.attn_sink"]
        out = np.empty((S, H, D))
        for t in range(S):
            window = kv[max(0, t - (128 if self.wrong("window of 129") else 127)) : t + 1]
            n = min(self.visible(t, ratio), len(entries)) if ratio else 0
            chosen = np.arange(n)
            if scores is not None and n > c.index_topk:
                row = scores[t, :n]
                tie = -chosen if self.wrong("ties to the higher index") else chosen
                chosen = np.lexsort((tie, -row))[: c.index_topk]
            keys = np.concatenate((window, entries[chosen]))
            s = q[t] @ keys.T * D**-0.5
            extra = sink * D**-0.5 if self.wrong("sink scaled") else sink
            if self.wrong("no sink"):
                extra = np.full(H, -np.inf)
            top = s.max(-1)
            e = np.exp(s - top[:, None])
            out[t] = e @ keys / (e.sum(-1) + np.exp(extra - top))[:, None]
        if not self.wrong("output not rotated back"):
            out = self.rope(out, at, plain, inverse=True)
        groups = out.reshape(S, c.o_groups, -1)
        wo_a = self.w[f"{name}.wo_a.weight"].reshape(c.o_groups, c.o_lora_rank, -1)
        return self.linear(np.einsum("tgi,goi->tgo", groups, wo_a).reshape(S, -1), f"{name}.wo_b")

    # Experts, 2.6

    def expert(self, x: Array, name: str, weight: Array | float = 1.0, clamp: bool = True) -> Array:
        limit = self.c.swiglu_limit if clamp else np.inf
        gate, up = self.linear(x, f"{name}.w1"), self.linear(x, f"{name}.w3")
        gate = np.maximum(gate, -limit) if self.wrong("gate clamped from below too") else gate
        up = np.minimum(up, limit) if self.wrong("up clamped from above only") else np.clip(up, -limit, limit)
        gate = np.minimum(gate, limit)
        return self.linear(weight * gate * sigmoid(gate) * up, f"{name}.w2")

    def moe(self, x: Array, name: str, ids: Array) -> Array:
        c = self.c
        s = np.sqrt(np.logaddexp(0, self.linear(x, f"{name}.gate")))
        table, bias = self.w.get(f"{name}.gate.tid2eid"), self.w.get(f"{name}.gate.bias")
        y = self.expert(x, f"{name}.shared_experts", clamp=not self.wrong("shared expert not clamped"))
        for t in range(len(x)):
            if table is not None:
                picked = table[ids[t]]
                weighed = np.ones_like(s[t]) if self.wrong("hash layers weigh evenly") else s[t]
            else:
                assert bias is not None
                biased = s[t] if self.wrong("bias left out of the choice") else s[t] + bias
                picked = np.lexsort((np.arange(len(biased)), -biased))[: c.num_experts_per_tok]
                weighed = biased if self.wrong("bias in the weights") else s[t]
            weights = weighed[picked] / (1 if self.wrong("weights not normalized") else weighed[picked].sum())
            weights = weights * (1 if self.wrong("weights not scaled") else c.routed_scaling_factor)
            pairs = list(zip(picked.tolist(), weights, strict=True))
            for e, weight in pairs if self.wrong("a repeated expert counts twice") else dict(pairs).items():
                y[t] += self.expert(x[t : t + 1], f"{name}.experts.{e}", weight)[0]
        return y

    # Model, 2.0 and 2.7

    def block(self, h: Array, name: str, ratio: int, ids: Array) -> Array:
        x, post, comb = self.hc_pre(h, f"{name}.hc_attn")
        h = self.hc_post(self.attention(self.rms(x, f"{name}.attn_norm"), f"{name}.attn", ratio), h, post, comb)
        x, post, comb = self.hc_pre(h, f"{name}.hc_ffn")
        return self.hc_post(self.moe(self.rms(x, f"{name}.ffn_norm"), f"{name}.ffn", ids), h, post, comb)

    def streams(self, ids: Array) -> Array:
        h = self.w["embed.weight"][ids][:, None].repeat(self.c.hc_mult, 1)
        for i in range(self.c.num_hidden_layers):
            h = self.block(h, f"layers.{i}", self.c.compress_ratios[i], ids)
        return h

    def logits(self, h: Array) -> Array:
        return self.rms(self.hc_head(h, "hc_head"), "norm") @ self.w["head.weight"].T

    def mtp(self, h: Array, next_ids: Array) -> Array:
        if self.wrong("MTP embeds the current token"):
            next_ids = np.roll(next_ids, 1)
        e = self.linear(self.rms(self.w["embed.weight"][next_ids], "mtp.0.enorm"), "mtp.0.e_proj")
        u = self.linear(self.rms(h, "mtp.0.hnorm"), "mtp.0.h_proj")
        if self.wrong("MTP reads the mean stream"):
            u = u.mean(1, keepdims=True).repeat(self.c.hc_mult, 1)
        if self.wrong("MTP embedding joins the first stream only"):
            e = np.stack([e] + [0 * e] * (self.c.hc_mult - 1), 1)
        else:
            e = e[:, None]
        x = self.block(e + u, "mtp.0", 0, next_ids)
        head = "hc_head" if self.wrong("MTP uses the main read-out") else "mtp.0.hc_head"
        norm = "norm" if self.wrong("MTP uses the main norm") else "mtp.0.norm"
        return self.rms(self.hc_head(x, head), norm) @ self.w["head.weight"].T
