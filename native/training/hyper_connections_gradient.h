// Gradients of mHC: of the reads and writes of the residual streams, with Sinkhorn.
//
// What a token's few weights need runs on 16 tokens at a time, a token per lane: value i of 16 tokens is row i of an
// array [.][16].
#pragma once

#include <algorithm>
#include <vector>

#include "gemm/gemm_backward.h"
#include "model/hyper_connections.h"
#include "training/row_gradients.h"

namespace dsv4::DSV4_ISA {

// Sums of c [s, s][16] over the first index (columns) or the second.
inline V line_sum(const V* c, int64_t s, bool columns, int64_t line) {
    V total = c[columns ? line : line * s];
    for (int64_t i = 1; i < s; ++i) total = add(total, c[columns ? i * s + line : line * s + i]);
    return total;
}

// Gradient of sinkhorn for 16 tokens: logits [s, s][16]; g [s, s][16], the gradient of its result, becomes that of the
// logits.
inline void sinkhorn_gradient(const V* logits, int64_t s, int64_t iters, float eps, V* g) {
    const int64_t size = s * s, steps = 2 * iters - 1;
    V* before =
        scratch<V>(Scratch::sinkhorn_steps, (steps + 1) * size);  // the matrix before each step, then the softmax
    V *soft = before + steps * size, inverse[MOST_STREAMS];
    for (int64_t i = 0; i < s; ++i) {
        V top = logits[i * s];
        for (int64_t j = 1; j < s; ++j) top = max(top, logits[i * s + j]);
        for (int64_t j = 0; j < s; ++j) soft[i * s + j] = exp(sub(logits[i * s + j], top));
        const V total = line_sum(soft, s, false, i);
        for (int64_t j = 0; j < s; ++j) {
            soft[i * s + j] = div(soft[i * s + j], total);
            before[i * s + j] = add(soft[i * s + j], set1(eps));
        }
    }
    auto invert = [&](const V* c, bool columns) {
        for (int64_t a = 0; a < s; ++a) inverse[a] = div(set1(1.0f), add(line_sum(c, s, columns, a), set1(eps)));
    };
    for (int64_t step = 0; step + 1 < steps; ++step) {
        const V* c = before + step * size;
        const bool columns = step % 2 == 0;
        invert(c, columns);
        for (int64_t i = 0; i < s; ++i)
            for (int64_t j = 0; j < s; ++j)
                before[(step + 1) * size + i * s + j] = mul(c[i * s + j], inverse[columns ? j : i]);
    }
    V product[MOST_STREAMS * MOST_STREAMS];
    for (int64_t step = steps - 1; step >= 0; --step) {
        const V* c = before + step * size;
        const bool columns = step % 2 == 0;
        invert(c, columns);
        for (int64_t i = 0; i < size; ++i) product[i] = mul(g[i], c[i]);
        // y = c / d(c), so dc = (g - sum(g * y)) / d.
        for (int64_t a = 0; a < s; ++a) {
            const V along = mul(line_sum(product, s, columns, a), inverse[a]);
            for (int64_t b = 0; b < s; ++b) {
                V& at = g[columns ? b * s + a : a * s + b];
                at = mul(sub(at, along), inverse[a]);
            }
        }
    }
    for (int64_t i = 0; i < size; ++i) product[i] = mul(g[i], soft[i]);
    for (int64_t i = 0; i < s; ++i) {
        const V along = line_sum(product, s, false, i);
        for (int64_t j = 0; j < s; ++j) g[i * s + j] = mul(soft[i * s + j], sub(g[i * s + j], along));
    }
}

// Streams read by a site, and the gradients of the read. count: numbers of the site per token, s * (2 + s), or s for the
// read-out, which has no post, comb and norm.
struct StreamRead {
    const HyperConnection& site;
    const Config& config;
    int64_t count;
    const float *norm, *streams;        // norm [d]: weight of the norm that follows; null: none
    const float *dx, *d_post, *d_comb;  // [n, d], [n, s], [n, s, s]
    float* d_streams;                   // [n, s, d]
};

// to[t] += sum over m < count of raw[t * count + m] times `left` columns of row m of fn, whose rows are n apart. WHOLE:
// left is 16, without which the sums would not stay in registers.
template <bool WHOLE, int R>
[[gnu::noinline]] inline void add_mixes(const float* raw, int64_t count, const float* fn, int64_t n, int left,
                                        V (&to)[R]) {
    V acc[R];
    for (int t = 0; t < R; ++t) acc[t] = to[t];
    for (int64_t m = 0; m < count; ++m, fn += n) {
        const V weight = WHOLE ? load(fn) : load_n(fn, left);
        for (int t = 0; t < R; ++t) acc[t] = fma(set1(raw[t * count + m]), weight, acc[t]);
    }
    for (int t = 0; t < R; ++t) to[t] = acc[t];
}

// The gradients of 16 tokens or fewer; adds to d_base [count], d_scale [3] and d_norm [d], and writes d_raw [rows, count]:
// the gradients of the products of fn with the streams.
class StreamReadGradient {
   public:
    StreamReadGradient(const StreamRead& in_, int64_t first_, int rows_, float* d_raw_)
        : in(in_), s(in_.config.hc_mult), d(in_.config.hidden_size), first(first_), rows(rows_), d_raw(d_raw_) {}

    void run(float* d_base, float* d_scale, float* d_norm) {
        read_mixes();
        float* d_read = scratch(Scratch::stream_read, (rows + 1) * d);  // [rows, d] before the norm
        for (int r = 0; r < rows; ++r) differentiate_read(r, d_read + r * d, d_read + rows * d, d_norm);
        differentiate_weights(d_base, d_scale);
        for (int r = 0; r < rows;) {
            const int some = next_rows<MIX_ROWS>(rows - r);
            with_count<MIX_ROWS>(some, [&](auto block) __attribute__((always_inline)) {
                this->write_streams<decltype(block)::value>(r, d_read + r * d);
            });
            r += some;
        }
    }

   private:
#if defined(DSV4_ISA_AVX512)
    static constexpr int MIX_ROWS = 8;
#else
    static constexpr int MIX_ROWS = 4;
#endif
    static constexpr int64_t MOST_MIXES = MOST_STREAMS * (2 + MOST_STREAMS);

    const float* token(int r) const { return in.streams + (first + r) * s * d; }
    int64_t group(int64_t i) const { return std::min<int64_t>(i / s, 2); }  // pre, post or comb

    void read_mixes() {
        const int64_t n = s * d;
        constexpr int TOGETHER = 4;
        float raw[TOGETHER * MOST_MIXES];
        for (int64_t i = 0; i < in.count; ++i) mix[i] = zero();
        for (int r = 0; r < rows;) {
            const int some = next_rows<TOGETHER>(rows - r);
            with_count<TOGETHER>(some, [&](auto block) __attribute__((always_inline)) {
                mixes<decltype(block)::value>(token(r), in.site.fn, in.count, n, eps(), raw);
            });
            for (int t = 0; t < some; ++t, ++r) {
                inverse[r] = 1.0f / std::sqrt(dot(token(r), token(r), n) / static_cast<float>(n) + eps());
                for (int64_t i = 0; i < in.count; ++i) lane(mix, i, r) = raw[t * in.count + i];
            }
        }
        for (int64_t j = 0; j < s; ++j) {
            const V scale = set1(in.site.scale[0]), base = set1(in.site.base[j]);
            open[j] = sigmoid(fma(mix[j], scale, base));
        }
    }

    // From dx of token r: its gradient before the norm, to, and those of the pre weights.
    void differentiate_read(int r, float* to, float* read, float* d_norm) {
        const float *x = token(r), *dx = in.dx + (first + r) * d;
        if (in.norm) {
            float pre[MOST_STREAMS];
            for (int64_t j = 0; j < s; ++j) pre[j] = lane(open, j, r) + static_cast<float>(in.config.hc_eps);
            collect(pre, x, s, d, read);
            rms_norm_gradient(read, in.norm, dx, d, eps(), to, d_norm);
        } else {
            std::copy_n(dx, d, to);
        }
        for (int64_t j = 0; j < s; ++j) lane(d_mix, j, r) = dot(to, x + j * d, d);
    }

    // From the gradients of pre, post and comb to those of the mixes; zero in lanes without a token.
    void differentiate_weights(float* d_base, float* d_scale) {
        const uint32_t held = rows == LANES ? 0xFFFFu : (1u << rows) - 1u;
        for (int64_t j = 0; j < s; ++j) d_mix[j] = mul(d_mix[j], mul(open[j], sub(set1(1.0f), open[j])));
        if (in.count > s) {
            for (int64_t j = s; j < in.count; ++j) d_mix[j] = zero();
            for (int r = 0; r < rows; ++r) {
                for (int64_t j = 0; j < s; ++j) lane(d_mix, s + j, r) = in.d_post[(first + r) * s + j];
                for (int64_t j = 0; j < s * s; ++j) lane(d_mix, 2 * s + j, r) = in.d_comb[(first + r) * s * s + j];
            }
            for (int64_t j = s; j < 2 * s; ++j) {
                const V own = sigmoid(fma(mix[j], set1(in.site.scale[1]), set1(in.site.base[j])));
                d_mix[j] = mul(mul(set1(2.0f), d_mix[j]), mul(own, sub(set1(1.0f), own)));
            }
            V logits[MOST_STREAMS * MOST_STREAMS];
            for (int64_t j = 0; j < s * s; ++j)
                logits[j] = fma(mix[2 * s + j], set1(in.site.scale[2]), set1(in.site.base[2 * s + j]));
            sinkhorn_gradient(logits, s, in.config.hc_sinkhorn_iters, static_cast<float>(in.config.hc_eps),
                              d_mix + 2 * s);
        }
        V along = zero();
        for (int64_t i = 0; i < in.count; ++i) {
            d_mix[i] = select(held, d_mix[i], zero());
            d_base[i] += sum(d_mix[i]);
            d_scale[group(i)] += sum(mul(d_mix[i], mix[i]));
            d_mix[i] = mul(d_mix[i], set1(in.site.scale[group(i)]));
            along = fma(d_mix[i], mix[i], along);
        }
        // mix = raw * inverse, and d inverse / dX = -inverse^3 / n * X.
        alignas(64) float lanes[LANES];
        store(lanes, along);
        for (int r = 0; r < rows; ++r) {
            back[r] = -lanes[r] * inverse[r] * inverse[r] / static_cast<float>(s * d);
            for (int64_t i = 0; i < in.count; ++i) d_raw[r * in.count + i] = lane(d_mix, i, r) * inverse[r];
        }
    }

    // Gradients of the streams of R tokens from r on: by the read, the mixes and the norm of the mixes.
    template <int R>
    void write_streams(int r, const float* d_read) {
        const int64_t n = s * d;
        const float* raw = d_raw + r * in.count;
        for (int64_t j = 0; j < s; ++j) {
            V pre[R], pull[R];
            for (int t = 0; t < R; ++t) {
                pre[t] = set1(lane(open, j, r + t) + static_cast<float>(in.config.hc_eps));
                pull[t] = set1(back[r + t]);
            }
            for (int64_t i = 0; i < d; i += LANES) {
                const int left = lanes_left(d, i);
                V acc[R];
                for (int t = 0; t < R; ++t)
                    acc[t] = fma(pre[t], load_n(d_read + t * d + i, left),
                                 mul(pull[t], load_n(token(r + t) + j * d + i, left)));
                const float* fn = in.site.fn + j * d + i;
                left == LANES ? add_mixes<true>(raw, in.count, fn, n, LANES, acc)
                              : add_mixes<false>(raw, in.count, fn, n, left, acc);
                for (int t = 0; t < R; ++t) store_n(in.d_streams + (first + r + t) * n + j * d + i, acc[t], left);
            }
        }
    }

    float eps() const { return static_cast<float>(in.config.rms_norm_eps); }
    // Token r's number i of an array [.][16].
    static float& lane(V* values, int64_t i, int r) { return reinterpret_cast<float*>(values + i)[r]; }

    const StreamRead& in;
    int64_t s, d, first;
    int rows;
    float* d_raw;
    float inverse[LANES] = {}, back[LANES] = {};
    V mix[MOST_MIXES], d_mix[MOST_MIXES], open[MOST_STREAMS];
};

// All gradients of a read of n tokens: in.d_streams, d_fn [count, s * d], d_base [count], d_scale [3, the read-out's 1]
// and d_norm [d], null without a norm.
inline void stream_read_gradients(const StreamRead& in, int64_t n, float* d_fn, float* d_base, float* d_scale,
                                  float* d_norm) {
    const int64_t s = in.config.hc_mult, d = in.config.hidden_size, count = in.count;
    const int64_t scales = count > s ? 3 : 1, norms = in.norm ? d : 0;
    std::vector<float> d_raw(static_cast<size_t>(n * count)), small(static_cast<size_t>(count + scales + norms));
    sum_rows(n, static_cast<int64_t>(small.size()), small.data(), [&](int64_t first, int64_t last, float* partial) {
        for (int64_t row = first; row < last; row += LANES) {
            StreamReadGradient block(in, row, lanes_left(last, row), d_raw.data() + row * count);
            block.run(partial, partial + count, partial + count + scales);
        }
    });
    std::copy_n(small.data(), count, d_base);
    std::copy_n(small.data() + count, scales, d_scale);
    if (in.norm) std::copy_n(small.data() + count + scales, d, d_norm);
    Weight rows;
    rows.data = reinterpret_cast<const uint8_t*>(in.streams);
    rows.out = n;
    rows.in = s * d;
    rows.stride = s * d * static_cast<int64_t>(sizeof(float));
    sums({{d_raw.data(), count, 1, count, rows, {d_fn, s * d}}});
}

// The read-out of the streams: x [n, d].
inline void read_out_streams(const Config& c, const HyperConnection& site, const float* streams, int64_t n, float* x) {
    const int64_t s = c.hc_mult, d = c.hidden_size;
    for_each_row(n, [&](int64_t row) { read_out_token(c, site, streams + row * s * d, x + row * d); });
}

// A token's write to the streams and its gradients, all rows of one token.
struct StreamWrite {
    const float *g, *y, *streams, *post, *comb;  // g [s, d]: gradient of the new streams
    float *dy, *d_streams, *d_post, *d_comb;
};

// S: the number of streams, with the sums in registers; 0: any number s.
template <int S>
inline void stream_write_gradient(const StreamWrite& t, int64_t s, int64_t d) {
    if constexpr (S > 0) {
        V sums[S];
        for (V& one : sums) one = zero();
        for (int64_t i = 0; i < d; i += LANES) {
            const int left = lanes_left(d, i);
            const V y = load_n(t.y + i, left);
            V dy = zero();
            for (int k = 0; k < S; ++k) {
                const V g = load_n(t.g + k * d + i, left);
                dy = fma(set1(t.post[k]), g, dy);
                sums[k] = fma(y, g, sums[k]);
            }
            store_n(t.dy + i, dy, left);
        }
        for (int k = 0; k < S; ++k) t.d_post[k] = sum(sums[k]);
        for (int j = 0; j < S; ++j) {
            for (V& one : sums) one = zero();
            for (int64_t i = 0; i < d; i += LANES) {
                const int left = lanes_left(d, i);
                const V x = load_n(t.streams + j * d + i, left);
                V acc = zero();
                for (int k = 0; k < S; ++k) {
                    const V g = load_n(t.g + k * d + i, left);
                    acc = fma(set1(t.comb[j * S + k]), g, acc);
                    sums[k] = fma(x, g, sums[k]);
                }
                store_n(t.d_streams + j * d + i, acc, left);
            }
            for (int k = 0; k < S; ++k) t.d_comb[j * S + k] = sum(sums[k]);
        }
    } else {
        collect(t.post, t.g, s, d, t.dy);
        for (int64_t j = 0; j < s; ++j) {
            t.d_post[j] = dot(t.y, t.g + j * d, d);
            collect(t.comb + j * s, t.g, s, d, t.d_streams + j * d);
            for (int64_t k = 0; k < s; ++k) t.d_comb[j * s + k] = dot(t.streams + j * d, t.g + k * d, d);
        }
    }
}

inline void stream_write_gradients(const StreamWrite& all, int64_t n, int64_t s, int64_t d) {
    for_each_row(n, [&](int64_t row) {
        const int64_t wide = row * s * d, narrow = row * s, square = row * s * s;
        const StreamWrite t{all.g + wide,         all.y + row * d,     all.streams + wide,
                            all.post + narrow,    all.comb + square,   all.dy + row * d,
                            all.d_streams + wide, all.d_post + narrow, all.d_comb + square};
        s == 4 ? stream_write_gradient<4>(t, s, d) : stream_write_gradient<0>(t, s, d);
    });
}

}  // namespace dsv4::DSV4_ISA
