// Bindings of the forward's operations (dispatch/single_ops.h), on tokens of one sequence: the native rung of
// dsv4/kernels.
#include <algorithm>

#include "python/arguments.h"

namespace dsv4 {
namespace {

int64_t size_of(const MutableFloats& array, size_t dimension) { return static_cast<int64_t>(array.shape(dimension)); }

// ValueError unless first <= value <= last.
void expect_within(int64_t value, int64_t first, int64_t last, const char* name) {
    if (value < first || value > last)
        wrong(std::string(name) + " " + std::to_string(value) + ": allowed are " + std::to_string(first) + " to " +
              std::to_string(last));
}

// Data of a contiguous one-dimensional array; ValueError if it is not that.
const float* vector_of(const Floats& array, int64_t size, const char* name) {
    expect(array, {size}, name);
    if (size > 1 && array.stride(0) != 1) wrong(std::string(name) + " must be contiguous");
    return array.data();
}

// Configuration with s and d of streams [n, s, d].
Config streams_config(const MutableFloats& streams) {
    expect_dimensions(streams, 3, "streams");
    Config c{};
    c.hc_mult = size_of(streams, 1);
    c.hidden_size = size_of(streams, 2);
    expect_within(c.hc_mult, 1, MOST_STREAMS, "number of streams");
    return c;
}

void hc_pre(MutableFloats streams, MutableFloats fn, const Floats& scale, const Floats& base, const Floats& norm,
            int64_t iters, double norm_eps, double eps, MutableFloats weights, MutableFloats x) {
    Config c = streams_config(streams);
    c.hc_sinkhorn_iters = iters;
    c.rms_norm_eps = norm_eps;
    c.hc_eps = eps;
    int64_t n = size_of(streams, 0), count = c.hc_mult * (2 + c.hc_mult);
    expect(fn, {count, c.hc_mult * c.hidden_size}, "fn");
    expect(weights, {n, count}, "weights");
    expect(x, {n, c.hidden_size}, "x");
    HyperConnection site{fn.data(), vector_of(base, count, "base"), vector_of(scale, 3, "scale")};
    const float* norm_weight = vector_of(norm, c.hidden_size, "norm");
    Computing now;
    ops().hc_pre(c, site, norm_weight, streams.data(), n, weights.data(), x.data());
}

void hc_post(MutableFloats y, MutableFloats weights, MutableFloats streams) {
    Config c = streams_config(streams);
    int64_t n = size_of(streams, 0);
    expect(y, {n, c.hidden_size}, "y");
    expect(weights, {n, c.hc_mult * (2 + c.hc_mult)}, "weights");
    Computing now;
    ops().hc_post(c, y.data(), weights.data(), n, streams.data());
}

// choice: a bias [E], for the k best of score + bias, or an integer table [vocab, k] of experts by token id.
void route(MutableFloats logits, const nb::object& choice, const Longs& token_ids, double scale, MutableLongs index,
           MutableFloats weights) {
    expect_dimensions(logits, 2, "logits");
    expect_dimensions(index, 2, "index");
    Config c{};
    int64_t n = size_of(logits, 0);
    c.n_routed_experts = size_of(logits, 1);
    c.num_experts_per_tok = static_cast<int64_t>(index.shape(1));
    c.routed_scaling_factor = scale;
    expect_within(c.num_experts_per_tok, 1, c.n_routed_experts, "experts per token");
    expect(index, {n, c.num_experts_per_tok}, "index");
    expect(weights, {n, c.num_experts_per_tok}, "weights");
    expect(token_ids, {n}, "token_ids");
    Layer layer;
    Longs table;
    Floats bias;
    if (nb::try_cast(choice, table, false)) {
        expect_dimensions(table, 2, "tid2eid");
        const auto vocab = static_cast<int64_t>(table.shape(0));
        expect(table, {vocab, c.num_experts_per_tok}, "tid2eid");
        for (int64_t i = 0; i < n; ++i) expect_within(token_ids.data()[i], 0, vocab - 1, "token id");
        for (size_t i = 0; i < table.size(); ++i)
            expect_within(table.data()[i], 0, c.n_routed_experts - 1, "expert of tid2eid");
        layer.tid2eid = table.data();
    } else {
        if (!nb::try_cast(choice, bias, false))
            wrong("choice: allowed are a float32 bias and a contiguous int64 table");
        layer.bias = vector_of(bias, c.n_routed_experts, "bias");
    }
    Computing now;
    ops().route(c, layer, logits.data(), token_ids.data(), n, index.data(), weights.data());
}

// ValueError unless `entries` has `width` channels and a row per closed window.
void expect_entries(const MutableFloats& entries, int64_t closed, int64_t width) {
    expect_dimensions(entries, 2, "entries");
    expect(entries, {std::max(size_of(entries, 0), closed), width}, "entries");
}

// Compressor of a ratio, 4 (with overlap) or 128, for `total` channels per token; see Compressor in base/views.h.
Compressor compressor_of(int64_t ratio, int64_t total) {
    const CompressionKind* kind = compression_kind(ratio);
    if (!kind || !ratio) wrong("ratio " + std::to_string(ratio) + "; allowed are 4 and 128");
    if (total < 1 || (kind->overlap && total % 2))
        wrong("kv: " + std::to_string(total) + " channels; allowed are 1 or more, an even number with ratio 4");
    Compressor w;
    w.kind = *kind;
    w.total = total;
    w.width = kind->overlap ? total / 2 : total;
    return w;
}

// Adds ape [ratio, total] to score [n, total]; writes the entries [., width] of the windows that end here, and the
// state [rows, total] after them.
void compress(int64_t ratio, MutableFloats kv, MutableFloats score, MutableFloats ape, int64_t start,
              MutableFloats state_kv, MutableFloats state_score, MutableFloats entries) {
    expect_dimensions(kv, 2, "kv");
    int64_t n = size_of(kv, 0), total = size_of(kv, 1);
    Compressor w = compressor_of(ratio, total);
    expect(score, {n, total}, "score");
    expect(ape, {ratio, total}, "ape");
    expect(state_kv, {w.kind.state_tokens(), total}, "state_kv");
    expect(state_score, {w.kind.state_tokens(), total}, "state_score");
    expect_within(start, 0, MOST_POSITIONS, "start");
    expect_entries(entries, (start + n) / ratio, w.width);
    w.ape = ape.data();
    CompressorCache state{state_kv.data(), state_score.data(), float_rows(entries.data(), w.width), nullptr};
    Computing now;
    ops().compress(w, state, kv.data(), score.data(), start, n);
}

// q [n, H, D], scaled; kv [n, D] the tokens' own keys; window [128, D] the ring of the keys before. Entries [., D] that
// a token attends to: none for ratio 0; the chosen [n, k], or all if it sees at most k, for ratio 4; all it sees for
// 128. chosen [0, k]: no token chooses.
void attend(MutableFloats q, MutableFloats kv, MutableFloats window, MutableFloats entries, MutableLongs chosen,
            int64_t ratio, int64_t start, const Floats& sink, MutableFloats o) {
    expect_dimensions(q, 3, "q");
    expect_dimensions(chosen, 2, "chosen");
    Config c{};
    int64_t n = size_of(q, 0);
    c.num_attention_heads = size_of(q, 1);
    c.head_dim = size_of(q, 2);
    c.index_topk = static_cast<int64_t>(chosen.shape(1));
    expect(kv, {n, c.head_dim}, "kv");
    expect(window, {WINDOW, c.head_dim}, "window");
    expect(o, {n, c.num_attention_heads, c.head_dim}, "o");
    if (chosen.shape(0)) expect(chosen, {n, c.index_topk}, "chosen");
    for (int64_t size : {n, c.num_attention_heads, c.head_dim, c.index_topk})
        expect_within(size, 1, MOST_POSITIONS, "tokens, heads, channels or k");
    expect_within(start, 0, MOST_POSITIONS, "start");
    const CompressionKind* kind = compression_kind(ratio);
    if (!kind) wrong("ratio " + std::to_string(ratio) + "; allowed are 0, 4 and 128");
    expect_entries(entries, ratio ? (start + n) / ratio : 0, c.head_dim);
    if (kind->has_indexer && !chosen.shape(0))
        expect_within((start + n) / CSA.ratio, 0, c.index_topk, "entries that a token sees without a choice");
    std::vector<int32_t> picks;
    for (int64_t t = 0; t < static_cast<int64_t>(chosen.shape(0)); ++t)
        for (int64_t i = 0; i < c.index_topk; ++i) {
            int64_t pick = chosen.data()[t * c.index_topk + i], visible = (start + t + 1) / CSA.ratio;
            if (kind->has_indexer && visible > c.index_topk) expect_within(pick, 0, visible - 1, "chosen entry");
            picks.push_back(static_cast<int32_t>(pick));
        }
    Layer layer;
    layer.kind = *kind;
    layer.attn_sink = vector_of(sink, c.num_attention_heads, "sink");
    LayerCache cache{
        float_rows(window.data(), c.head_dim), {nullptr, nullptr, float_rows(entries.data(), c.head_dim), nullptr}, {}};
    Computing now;
    ops().attend(c, layer, cache, q.data(), kv.data(), picks.data(), start, n, o.data());
}

void swiglu(MutableFloats gate, MutableFloats up, double limit, const Floats& weight) {
    expect_dimensions(gate, 2, "gate");
    int64_t n = size_of(gate, 0), width = size_of(gate, 1);
    expect(up, {n, width}, "up");
    const float* weights = vector_of(weight, n, "weight");
    Computing now;
    ops().swiglu(gate.data(), up.data(), n, width, static_cast<float>(limit), weights);
}

// Computes cos, sin [n, pairs] of the rotation at n positions.
void rotation(const std::vector<float>& inv_freq, const Longs& positions, MutableFloats cos, MutableFloats sin) {
    const auto n = static_cast<int64_t>(positions.size()), pairs = static_cast<int64_t>(inv_freq.size());
    expect(positions, {n}, "positions");
    expect(cos, {n, pairs}, "cos");
    expect(sin, {n, pairs}, "sin");
    Computing now;
    ops().rotation(inv_freq, positions.data(), n, cos.data(), sin.data());
}

// Rotates the last 2 * pairs channels of each row of x [n, width], in place, by cos and sin [n, pairs].
void rotate(MutableFloats x, MutableFloats cos, MutableFloats sin) {
    expect_dimensions(x, 2, "x");
    expect_dimensions(cos, 2, "cos");
    int64_t n = size_of(x, 0), width = size_of(x, 1), pairs = size_of(cos, 1);
    expect(cos, {n, pairs}, "cos");
    expect(sin, {n, pairs}, "sin");
    expect_within(2 * pairs, 0, width, "channels to rotate");
    Computing now;
    ops().rotate(x.data(), n, width, cos.data(), sin.data(), pairs);
}

}  // namespace

void define_single(nb::module_& m) {
    m.def("hc_pre", &hc_pre, nb::arg("streams"), nb::arg("fn"), nb::arg("scale"), nb::arg("base"), nb::arg("norm"),
          nb::arg("iters"), nb::arg("norm_eps"), nb::arg("eps"), nb::arg("weights").noconvert(),
          nb::arg("x").noconvert());
    m.def("hc_post", &hc_post, nb::arg("y"), nb::arg("weights"), nb::arg("streams").noconvert());
    m.def("route", &route, nb::arg("logits"), nb::arg("choice"), nb::arg("token_ids"), nb::arg("scale"),
          nb::arg("index").noconvert(), nb::arg("weights").noconvert());
    m.def("compress", &compress, nb::arg("ratio"), nb::arg("kv"), nb::arg("score").noconvert(), nb::arg("ape"),
          nb::arg("start"), nb::arg("state_kv").noconvert(), nb::arg("state_score").noconvert(),
          nb::arg("entries").noconvert());
    m.def("attend", &attend, nb::arg("q"), nb::arg("kv"), nb::arg("window"), nb::arg("entries"), nb::arg("chosen"),
          nb::arg("ratio"), nb::arg("start"), nb::arg("sink"), nb::arg("o").noconvert());
    m.def("swiglu", &swiglu, nb::arg("gate").noconvert(), nb::arg("up"), nb::arg("limit"), nb::arg("weight"));
    m.def("rotation", &rotation, nb::arg("inv_freq"), nb::arg("positions"), nb::arg("cos").noconvert(),
          nb::arg("sin").noconvert());
    m.def("rotate", &rotate, nb::arg("x").noconvert(), nb::arg("cos"), nb::arg("sin"));
}

}  // namespace dsv4
