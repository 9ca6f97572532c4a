// Bindings of the kernels of training (dispatch/training_ops.h): forwards over sequences, without a cache, and the
// gradients of the operations.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>

#include "python/arguments.h"

namespace dsv4 {
namespace {

using Maybe = std::optional<MutableFloats>;

int64_t size_of(const MutableFloats& array, size_t dimension) { return static_cast<int64_t>(array.shape(dimension)); }

float* data_of(const Maybe& array) { return array ? array->data() : nullptr; }

void expect_maybe(const Maybe& array, const std::vector<int64_t>& shape, const char* name) {
    if (array) expect(*array, shape, name);
}

const TrainingOps& training() { return ops().training; }

void rms_norm_gradient(MutableFloats x, const Maybe& weight, double eps, MutableFloats dy, MutableFloats dx,
                       const Maybe& d_weight) {
    expect_dimensions(x, 2, "x");
    const int64_t n = size_of(x, 0), width = size_of(x, 1);
    expect(dy, {n, width}, "dy");
    expect(dx, {n, width}, "dx");
    expect_maybe(weight, {width}, "weight");
    expect_maybe(d_weight, {width}, "d_weight");
    Computing now;
    training().rms_norm_gradient(x.data(), data_of(weight), dy.data(), n, width, static_cast<float>(eps), dx.data(),
                                 data_of(d_weight));
}

void swiglu_gradient(MutableFloats gate, MutableFloats up, double limit, MutableFloats weight, MutableFloats dy,
                     MutableFloats d_gate, MutableFloats d_up, MutableFloats d_weight) {
    expect_dimensions(gate, 2, "gate");
    const int64_t n = size_of(gate, 0), width = size_of(gate, 1);
    for (auto& [array, name] :
         {std::pair{&up, "up"}, std::pair{&dy, "dy"}, std::pair{&d_gate, "d_gate"}, std::pair{&d_up, "d_up"}})
        expect(*array, {n, width}, name);
    expect(weight, {n}, "weight");
    expect(d_weight, {n}, "d_weight");
    Computing now;
    training().swiglu_gradient(gate.data(), up.data(), n, width, static_cast<float>(limit), weight.data(), dy.data(),
                               d_gate.data(), d_up.data(), d_weight.data());
}

void route_gradient(MutableFloats logits, const Longs& index, double scale, MutableFloats d_weights,
                    const Maybe& d_scores, MutableFloats d_logits) {
    expect_dimensions(logits, 2, "logits");
    expect_dimensions(d_weights, 2, "d_weights");
    const int64_t n = size_of(logits, 0), experts = size_of(logits, 1), k = size_of(d_weights, 1);
    expect(d_weights, {n, k}, "d_weights");
    expect(index, {n, k}, "index");
    expect_maybe(d_scores, {n, experts}, "d_scores");
    expect(d_logits, {n, experts}, "d_logits");
    for (size_t i = 0; i < index.size(); ++i)
        if (index.data()[i] < 0 || index.data()[i] >= experts) wrong("index: no such expert");
    Computing now;
    training().route_gradient(logits.data(), index.data(), n, experts, k, static_cast<float>(scale), d_weights.data(),
                              data_of(d_scores), d_logits.data());
}

// Configuration with s and d of streams [n, s, d].
Config streams_config(const MutableFloats& streams) {
    expect_dimensions(streams, 3, "streams");
    Config c{};
    c.hc_mult = size_of(streams, 1);
    c.hidden_size = size_of(streams, 2);
    if (c.hc_mult < 1 || c.hc_mult > MOST_STREAMS)
        wrong(std::to_string(c.hc_mult) + " streams; allowed are 1 to " + std::to_string(MOST_STREAMS));
    return c;
}

// norm, d_post, d_comb and d_norm None: the read-out.
void hc_pre_gradient(MutableFloats streams, MutableFloats fn, MutableFloats scale, MutableFloats base,
                     const Maybe& norm, int64_t iters, double norm_eps, double eps, MutableFloats dx,
                     const Maybe& d_post, const Maybe& d_comb, MutableFloats d_streams, MutableFloats d_fn,
                     MutableFloats d_scale, MutableFloats d_base, const Maybe& d_norm) {
    Config c = streams_config(streams);
    c.hc_sinkhorn_iters = iters;
    c.rms_norm_eps = norm_eps;
    c.hc_eps = eps;
    const int64_t n = size_of(streams, 0), s = c.hc_mult, d = c.hidden_size;
    const int64_t count = norm ? s * (2 + s) : s, scales = norm ? 3 : 1;
    if (norm && (!d_post || !d_comb || !d_norm || iters < 1)) wrong("norm without d_post, d_comb, d_norm or iters");
    expect(fn, {count, s * d}, "fn");
    expect(scale, {scales}, "scale");
    expect(base, {count}, "base");
    expect_maybe(norm, {d}, "norm");
    expect(dx, {n, d}, "dx");
    expect_maybe(d_post, {n, s}, "d_post");
    expect_maybe(d_comb, {n, s, s}, "d_comb");
    expect(d_streams, {n, s, d}, "d_streams");
    expect(d_fn, {count, s * d}, "d_fn");
    expect(d_scale, {scales}, "d_scale");
    expect(d_base, {count}, "d_base");
    expect_maybe(d_norm, {d}, "d_norm");
    const HyperConnection site{fn.data(), base.data(), scale.data()};
    Computing now;
    training().hc_pre_gradient(c, site, data_of(norm), streams.data(), n, dx.data(), data_of(d_post), data_of(d_comb),
                               d_streams.data(), d_fn.data(), d_base.data(), d_scale.data(), data_of(d_norm));
}

void hc_post_gradient(MutableFloats g, MutableFloats y, MutableFloats streams, MutableFloats post, MutableFloats comb,
                      MutableFloats dy, MutableFloats d_streams, MutableFloats d_post, MutableFloats d_comb) {
    const Config c = streams_config(streams);
    const int64_t n = size_of(streams, 0), s = c.hc_mult, d = c.hidden_size;
    expect(g, {n, s, d}, "g");
    expect(y, {n, d}, "y");
    expect(post, {n, s}, "post");
    expect(comb, {n, s, s}, "comb");
    expect(dy, {n, d}, "dy");
    expect(d_streams, {n, s, d}, "d_streams");
    expect(d_post, {n, s}, "d_post");
    expect(d_comb, {n, s, s}, "d_comb");
    Computing now;
    training().hc_post_gradient(c, g.data(), y.data(), streams.data(), post.data(), comb.data(), n, dy.data(),
                                d_streams.data(), d_post.data(), d_comb.data());
}

void hc_head(MutableFloats streams, MutableFloats fn, MutableFloats scale, MutableFloats base, double norm_eps,
             double eps, MutableFloats x) {
    Config c = streams_config(streams);
    c.rms_norm_eps = norm_eps;
    c.hc_eps = eps;
    expect(fn, {c.hc_mult, c.hc_mult * c.hidden_size}, "fn");
    expect(scale, {1}, "scale");
    expect(base, {c.hc_mult}, "base");
    expect(x, {size_of(streams, 0), c.hidden_size}, "x");
    const HyperConnection site{fn.data(), base.data(), scale.data()};
    Computing now;
    training().hc_head(c, site, streams.data(), size_of(streams, 0), x.data());
}

// Sequences of `lengths` tokens from positions `starts` on, checked.
Sequences sequences_of(const Longs& lengths, const Longs& starts) {
    const Sequences sequences{lengths.data(), starts.data(), static_cast<int64_t>(lengths.size())};
    expect(lengths, {sequences.count}, "lengths");
    expect(starts, {sequences.count}, "starts");
    for (int64_t s = 0; s < sequences.count; ++s) {
        if (sequences.lengths[s] < 1)
            wrong("lengths: " + std::to_string(sequences.lengths[s]) + "; allowed are 1 or more");
        if (sequences.starts[s] < 0)
            wrong("starts: " + std::to_string(sequences.starts[s]) + "; allowed are 0 or more");
    }
    return sequences;
}

// Tokens of all sequences, with up to `most` earlier ones of each.
int64_t count_rows(const Sequences& sequences, int64_t most) {
    int64_t rows = 0;
    for (int64_t s = 0; s < sequences.count; ++s) rows += sequences.earlier(s, most) + sequences.lengths[s];
    return rows;
}

void expect_rows(const Sequences& sequences, int64_t most, int64_t rows) {
    const int64_t total = count_rows(sequences, most);
    if (total != rows) wrong("lengths add up to " + std::to_string(total) + ", expected " + std::to_string(rows));
}

CompressionKind kind_of(int64_t ratio) {
    const CompressionKind* kind = compression_kind(ratio);
    if (!kind) wrong("ratio " + std::to_string(ratio) + "; allowed are 0, 4 and 128");
    return *kind;
}

// Sizes of a compression, checked: kv and score [rows, total], entries [., width] of the windows that close.
struct Compression {
    CompressionKind kind;
    Sequences sequences;
    int64_t total, width;

    Compression(int64_t ratio, const MutableFloats& kv, const MutableFloats& score, const Longs& lengths,
                const Longs& starts, const MutableFloats& entries)
        : kind(kind_of(ratio)), sequences(sequences_of(lengths, starts)) {
        expect_dimensions(kv, 2, "kv");
        total = size_of(kv, 1);
        if (!ratio || total < 1 || (kind.overlap && total % 2))
            wrong("kv: " + std::to_string(total) + " channels; allowed are 1 or more, an even number with ratio 4");
        width = kind.overlap ? total / 2 : total;
        expect_rows(sequences, kind.state_tokens() - 1, size_of(kv, 0));
        int64_t count = 0;
        for (int64_t s = 0; s < sequences.count; ++s) count += sequences.end(s) / ratio - sequences.starts[s] / ratio;
        expect(score, {size_of(kv, 0), total}, "score");
        expect(entries, {count, width}, "entries");
    }
};

void compress_batch(int64_t ratio, MutableFloats kv, MutableFloats score, const Longs& lengths, const Longs& starts,
                    MutableFloats entries) {
    const Compression c(ratio, kv, score, lengths, starts, entries);
    Computing now;
    training().compress(c.kind, c.sequences, kv.data(), score.data(), c.total, c.width, entries.data());
}

void compress_gradient(int64_t ratio, MutableFloats kv, MutableFloats score, const Longs& lengths, const Longs& starts,
                       MutableFloats d_entries, MutableFloats d_kv, MutableFloats d_score) {
    const Compression c(ratio, kv, score, lengths, starts, d_entries);
    expect(d_kv, {size_of(kv, 0), c.total}, "d_kv");
    expect(d_score, {size_of(kv, 0), c.total}, "d_score");
    Computing now;
    training().compress_gradient(c.kind, c.sequences, kv.data(), score.data(), c.total, c.width, d_entries.data(),
                                 d_kv.data(), d_score.data());
}

// The entries chosen by tokens that see more than k, checked; -1 for the others. chosen [tokens, k], or [0, k] if no
// token sees more.
std::vector<int32_t> picks_of(const Longs& chosen, const Sequences& sequences, const AttentionSizes& sizes) {
    if (!sizes.kind.has_indexer) return {};
    std::vector<int32_t> picks(chosen.size(), -1);
    const int64_t k = sizes.top_k, rows = static_cast<int64_t>(chosen.shape(0));
    int64_t row = 0;
    for (int64_t s = 0; s < sequences.count; ++s)
        for (int64_t t = 0; t < sequences.lengths[s]; ++t, ++row) {
            const int64_t visible = (sequences.starts[s] + t + 1) / sizes.kind.ratio;
            if (visible <= k) continue;
            if (row >= rows) wrong("chosen: none, but a token sees " + std::to_string(visible) + " entries");
            for (int64_t i = 0; i < k; ++i) {
                const int64_t pick = chosen.data()[row * k + i];
                if (pick < 0 || pick >= visible)
                    wrong("chosen entry " + std::to_string(pick) + ": allowed are 0 to " + std::to_string(visible - 1));
                picks[static_cast<size_t>(row * k + i)] = static_cast<int32_t>(pick);
            }
        }
    return picks;
}

// Inputs of attention, checked: q [tokens, heads, width], keys [rows, width] of the tokens and earlier ones, entries
// [., width], chosen as in picks_of.
struct Attending {
    AttentionSizes sizes;
    Sequences sequences;
    std::vector<int32_t> picks;

    Attending(const MutableFloats& q, const MutableFloats* keys, const MutableFloats& entries, const Longs& chosen,
              int64_t ratio, const Longs& lengths, const Longs& starts)
        : sequences(sequences_of(lengths, starts)) {
        expect_dimensions(q, 3, "q");
        expect_dimensions(chosen, 2, "chosen");
        const int64_t tokens = size_of(q, 0);
        sizes = {kind_of(ratio), size_of(q, 1), size_of(q, 2), static_cast<int64_t>(chosen.shape(1))};
        for (int64_t size : {tokens, sizes.heads, sizes.width, sizes.top_k})
            if (size < 1) wrong("tokens, heads, channels or k: allowed are 1 or more");
        expect_rows(sequences, 0, tokens);
        int64_t count = 0;
        for (int64_t s = 0; ratio && s < sequences.count; ++s) count += sequences.end(s) / ratio;
        if (keys) expect(*keys, {count_rows(sequences, WINDOW - 1), sizes.width}, "keys");
        expect(entries, {count, sizes.width}, "entries");
        if (chosen.shape(0)) expect(chosen, {tokens, sizes.top_k}, "chosen");
        picks = picks_of(chosen, sequences, sizes);
    }
};

void attend_batch(MutableFloats q, MutableFloats keys, MutableFloats entries, const Longs& chosen, int64_t ratio,
                  const Longs& lengths, const Longs& starts, MutableFloats sink, MutableFloats o, const Maybe& probs) {
    const Attending in(q, &keys, entries, chosen, ratio, lengths, starts);
    const int64_t tokens = size_of(q, 0);
    expect(sink, {in.sizes.heads}, "sink");
    expect(o, {tokens, in.sizes.heads, in.sizes.width}, "o");
    expect_maybe(probs, {tokens, in.sizes.top_k}, "probs");
    if (probs && !in.sizes.kind.has_indexer) wrong("probs: layers with an indexer have them");
    Computing now;
    training().attend(in.sizes, in.sequences, q.data(), keys.data(), entries.data(), in.picks.data(), sink.data(),
                      o.data(), data_of(probs));
}

void attend_gradient(MutableFloats q, MutableFloats keys, MutableFloats entries, const Longs& chosen, int64_t ratio,
                     const Longs& lengths, const Longs& starts, MutableFloats sink, MutableFloats d_o,
                     MutableFloats d_q, MutableFloats d_keys, MutableFloats d_entries, MutableFloats d_sink) {
    const Attending in(q, &keys, entries, chosen, ratio, lengths, starts);
    const int64_t tokens = size_of(q, 0), heads = in.sizes.heads, width = in.sizes.width;
    expect(sink, {heads}, "sink");
    expect(d_o, {tokens, heads, width}, "d_o");
    expect(d_q, {tokens, heads, width}, "d_q");
    expect(d_keys, {size_of(keys, 0), width}, "d_keys");
    expect(d_entries, {size_of(entries, 0), width}, "d_entries");
    expect(d_sink, {heads}, "d_sink");
    Computing now;
    training().attend_gradient(in.sizes, in.sequences, q.data(), keys.data(), entries.data(), in.picks.data(),
                               sink.data(), d_o.data(), d_q.data(), d_keys.data(), d_entries.data(), d_sink.data());
}

void index_loss(MutableFloats q, MutableFloats weights, MutableFloats keys, const Longs& chosen, MutableFloats probs,
                const Longs& lengths, const Longs& starts, MutableFloats losses, const Maybe& d_q,
                const Maybe& d_weights, const Maybe& d_keys) {
    const Attending in(q, nullptr, keys, chosen, CSA.ratio, lengths, starts);
    const int64_t tokens = size_of(q, 0), heads = in.sizes.heads, width = in.sizes.width;
    expect(weights, {tokens, heads}, "weights");
    expect(probs, {tokens, in.sizes.top_k}, "probs");
    expect(losses, {tokens}, "losses");
    if (d_q.has_value() != d_weights.has_value() || d_q.has_value() != d_keys.has_value())
        wrong("gradients: all or none");
    expect_maybe(d_q, {tokens, heads, width}, "d_q");
    expect_maybe(d_weights, {tokens, heads}, "d_weights");
    expect_maybe(d_keys, {size_of(keys, 0), width}, "d_keys");
    Computing now;
    training().index_loss(in.sizes, in.sequences, q.data(), weights.data(), keys.data(), in.picks.data(), probs.data(),
                          losses.data(), data_of(d_q), data_of(d_weights), data_of(d_keys));
}

void cross_entropy(MutableFloats x, const nb::object& weight, const Longs& targets, MutableFloats losses,
                   MutableLongs predicted, const Maybe& dx, const Maybe& d_weight, bool bf16) {
    const Stored held = stored_weight(weight, "weight");
    const Weight& w = held.view;
    expect_dimensions(x, 2, "x");
    const int64_t n = size_of(x, 0);
    expect(x, {n, w.in}, "x");
    expect(targets, {n}, "targets");
    expect(losses, {n}, "losses");
    expect(predicted, {n}, "predicted");
    expect_maybe(dx, {n, w.in}, "dx");
    expect_maybe(d_weight, {w.out, w.in}, "d_weight");
    for (int64_t i = 0; i < n; ++i)
        if (targets.data()[i] < 0 || targets.data()[i] >= w.out)
            wrong("target " + std::to_string(targets.data()[i]) + ": allowed are 0 to " + std::to_string(w.out - 1));
    Computing now;
    training().cross_entropy(x.data(), n, w, targets.data(), losses.data(), predicted.data(), data_of(dx),
                             data_of(d_weight), bf16);
}

// `kernel` on the matrices `x`, whose numbers are Number in the function table.
template <class Number, class Array>
void newton_schulz(const Array& x, const std::vector<float>& coefficients,
                   void (*kernel)(Number*, int64_t, int64_t, int64_t, const NewtonSchulzStep*, int64_t)) {
    expect_dimensions(x, 3, "x");
    const int64_t count = static_cast<int64_t>(x.shape(0)), n = static_cast<int64_t>(x.shape(1)),
                  m = static_cast<int64_t>(x.shape(2));
    if (n > m) wrong("x: " + std::to_string(n) + " rows, more than its " + std::to_string(m) + " columns");
    if (coefficients.size() % 3 != 0)
        wrong("coefficients: three per step, found " + std::to_string(coefficients.size()));
    if (!kernel) wrong("newton_schulz: this instruction set has no kernel for these numbers");
    std::vector<NewtonSchulzStep> steps;
    for (size_t i = 0; i < coefficients.size(); i += 3)
        steps.push_back({coefficients[i], coefficients[i + 1], coefficients[i + 2]});
    Computing now;
    kernel(reinterpret_cast<Number*>(x.data()), count, n, m, steps.data(), static_cast<int64_t>(steps.size()));
}

void newton_schulz_bf16(const MutableShorts& x, const std::vector<float>& coefficients) {
    newton_schulz<uint16_t>(x, coefficients, training().newton_schulz_bf16);
}

void newton_schulz_fp32(const MutableFloats& x, const std::vector<float>& coefficients) {
    newton_schulz<float>(x, coefficients, training().newton_schulz);
}

}  // namespace

void define_training(nb::module_& m) {
    const auto none = nb::none();
    m.def("rms_norm_gradient", &rms_norm_gradient, nb::arg("x"), nb::arg("weight").none(), nb::arg("eps"),
          nb::arg("dy"), nb::arg("dx").noconvert(), nb::arg("d_weight").noconvert().none());
    m.def("swiglu_gradient", &swiglu_gradient, nb::arg("gate"), nb::arg("up"), nb::arg("limit"), nb::arg("weight"),
          nb::arg("dy"), nb::arg("d_gate").noconvert(), nb::arg("d_up").noconvert(), nb::arg("d_weight").noconvert());
    m.def("route_gradient", &route_gradient, nb::arg("logits"), nb::arg("index"), nb::arg("scale"),
          nb::arg("d_weights"), nb::arg("d_scores").none(), nb::arg("d_logits").noconvert());
    m.def("hc_pre_gradient", &hc_pre_gradient, nb::arg("streams"), nb::arg("fn"), nb::arg("scale"), nb::arg("base"),
          nb::arg("norm").none(), nb::arg("iters"), nb::arg("norm_eps"), nb::arg("eps"), nb::arg("dx"),
          nb::arg("d_post").none(), nb::arg("d_comb").none(), nb::arg("d_streams").noconvert(),
          nb::arg("d_fn").noconvert(), nb::arg("d_scale").noconvert(), nb::arg("d_base").noconvert(),
          nb::arg("d_norm").noconvert().none());
    m.def("hc_post_gradient", &hc_post_gradient, nb::arg("g"), nb::arg("y"), nb::arg("streams"), nb::arg("post"),
          nb::arg("comb"), nb::arg("dy").noconvert(), nb::arg("d_streams").noconvert(), nb::arg("d_post").noconvert(),
          nb::arg("d_comb").noconvert());
    m.def("hc_head", &hc_head, nb::arg("streams"), nb::arg("fn"), nb::arg("scale"), nb::arg("base"),
          nb::arg("norm_eps"), nb::arg("eps"), nb::arg("x").noconvert());
    m.def("compress_batch", &compress_batch, nb::arg("ratio"), nb::arg("kv"), nb::arg("score"), nb::arg("lengths"),
          nb::arg("starts"), nb::arg("entries").noconvert());
    m.def("compress_gradient", &compress_gradient, nb::arg("ratio"), nb::arg("kv"), nb::arg("score"),
          nb::arg("lengths"), nb::arg("starts"), nb::arg("d_entries"), nb::arg("d_kv").noconvert(),
          nb::arg("d_score").noconvert());
    m.def("attend_batch", &attend_batch, nb::arg("q"), nb::arg("keys"), nb::arg("entries"), nb::arg("chosen"),
          nb::arg("ratio"), nb::arg("lengths"), nb::arg("starts"), nb::arg("sink"), nb::arg("o").noconvert(),
          nb::arg("probs").noconvert().none() = none);
    m.def("attend_gradient", &attend_gradient, nb::arg("q"), nb::arg("keys"), nb::arg("entries"), nb::arg("chosen"),
          nb::arg("ratio"), nb::arg("lengths"), nb::arg("starts"), nb::arg("sink"), nb::arg("d_o"),
          nb::arg("d_q").noconvert(), nb::arg("d_keys").noconvert(), nb::arg("d_entries").noconvert(),
          nb::arg("d_sink").noconvert());
    m.def("index_loss", &index_loss, nb::arg("q"), nb::arg("weights"), nb::arg("keys"), nb::arg("chosen"),
          nb::arg("probs"), nb::arg("lengths"), nb::arg("starts"), nb::arg("losses").noconvert(),
          nb::arg("d_q").noconvert().none() = none, nb::arg("d_weights").noconvert().none() = none,
          nb::arg("d_keys").noconvert().none() = none);
    m.def("cross_entropy", &cross_entropy, nb::arg("x"), nb::arg("weight"), nb::arg("targets"),
          nb::arg("losses").noconvert(), nb::arg("predicted").noconvert(), nb::arg("dx").noconvert().none() = none,
          nb::arg("d_weight").noconvert().none() = none, nb::arg("bf16") = false);
    m.def("has_bf16_gradients", [] { return training().has_pairs; });
    m.def("newton_schulz", &newton_schulz_bf16, nb::arg("x").noconvert(), nb::arg("coefficients"));
    m.def("newton_schulz", &newton_schulz_fp32, nb::arg("x").noconvert(), nb::arg("coefficients"));
}

}  // namespace dsv4
