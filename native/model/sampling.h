// Samples one token from a row of logits. dsv4/kernels/sampling has the contract; its reference computes the same bits:
// all that decides is a fixed sequence of IEEE operations, none of them fused, or a sum of integers.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <vector>

#include "base/top_k.h"

namespace dsv4::DSV4_ISA {

// Number `id` of the SplitMix64 stream (Steele, Lea, Flood 2014) that begins at `key`.
inline uint64_t noise_bits(uint64_t key, int64_t id) {
    uint64_t x = key + (static_cast<uint64_t>(id) + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// ln x of a normal x > 0 to 1 unit in the last place: FreeBSD's e_log.c as musl has it.
inline double natural_log(double x) {
    const uint64_t shifted = std::bit_cast<uint64_t>(x) + 0x0009'5F62'0000'0000u;  // x / 2^k from 0.7071 to 1.4142
    const double k = static_cast<double>(static_cast<int64_t>(shifted >> 52) - 1023);
    const double f = std::bit_cast<double>((shifted & 0x000F'FFFF'FFFF'FFFFu) + 0x3FE6'A09E'0000'0000u) - 1.0;
    const double s = f / (2.0 + f), z = s * s, w = z * z;
    const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    const double odd =
        z * (6.666666666666735130e-01 +
             w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    const double half = 0.5 * f * f;
    return s * (half + (even + odd)) + k * 1.90821492927058770002e-10 - half + f + k * 6.93147180369123816490e-01;
}

// A number of the standard Gumbel distribution, from -3.61 to 36.74.
inline double gumbel(uint64_t bits) {
    const double u = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
    return -natural_log(-natural_log(u));
}
constexpr double LEAST_NOISE = -3.61, MOST_NOISE = 36.75, LOG2_E = 1.4426950408889634;

// e^((x - top) / temperature) to 4 units in the last place; at least e^-60. Not `exp`, which fuses where it can.
inline V weight_of(V x, V top, V temperature) {
    const V z = max(div(sub(x, top), temperature), set1(-60.0f));
    const V n = nearest(mul(z, set1(1.44269504f)));
    const V r = sub(sub(z, mul(n, set1(0.693359375f))), mul(n, set1(-2.12194440e-4f)));
    V p = set1(1.0f / 5040.0f);
    p = add(mul(p, r), set1(1.0f / 720.0f));
    p = add(mul(p, r), set1(1.0f / 120.0f));
    p = add(mul(p, r), set1(1.0f / 24.0f));
    p = add(mul(p, r), set1(1.0f / 6.0f));
    p = add(mul(p, r), set1(0.5f));
    p = add(mul(p, r), set1(1.0f));
    p = add(mul(p, r), set1(1.0f));
    return scale_or_zero(p, n, z, -60.0f);
}

// A weight as a whole multiple of 2^-35, plus NO_MASS: sums of these are exact in any order.
inline uint64_t mass_of(float weight) { return std::bit_cast<uint64_t>(static_cast<double>(weight) + 1.5 * 0x1p17); }
constexpr uint64_t NO_MASS = std::bit_cast<uint64_t>(1.5 * 0x1p17);
constexpr double MASSLESS = -25.5;  // e^-25.5 < 2^-36

// Logits with a bit per token that says if it may be drawn; null: all may.
struct Row {
    const float* logits;
    int64_t vocab;
    const uint32_t* allowed;

    // Of the tokens i, i + 1, ...: those that may be drawn.
    uint32_t lanes(int64_t i) const {
        const uint32_t inside = vocab - i < LANES ? (1u << (vocab - i)) - 1u : 0xFFFFu;
        return allowed ? allowed[i / 32] >> (i % 32) & inside : inside;
    }
    V load(int64_t i) const { return load_n(logits + i, static_cast<int>(std::min<int64_t>(LANES, vocab - i))); }
    // -inf where none may be drawn.
    V block(int64_t i) const {
        const uint32_t drawable = lanes(i);
        return drawable == 0xFFFFu ? dsv4::DSV4_ISA::load(logits + i) : select(drawable, load(i), set1(-INFINITY));
    }
    float operator[](int64_t id) const {
        return !allowed || (allowed[id / 32] >> (id % 32) & 1u) ? logits[id] : -INFINITY;
    }
    float highest_logit() const {
        V top = set1(-INFINITY);
        for (int64_t i = 0; i < vocab; i += LANES)
            if (lanes(i)) top = max(block(i), top);
        return highest(top);
    }
    // The lowest token that may be drawn whose logit is x; -1 if there is none.
    int64_t first(float x) const {
        for (int64_t i = 0; i < vocab; i += LANES) {
            const uint32_t lower = above(set1(x), load(i));
            if (const uint32_t found = lanes(i) & ~lower) return i + __builtin_ctz(found);
        }
        return -1;
    }
};

// The tokens that the filters keep.
class Filter {
   public:
    Filter(const Row& row, float top, const Sampling& s) : row_(row), top_(set1(top)), highest_(top), min_p_(s.min_p) {
        const double temperature = std::clamp(s.temperature, 1e-37, 1e37);
        temperature_ = set1(static_cast<float>(temperature));
        massless_ = to_float(top + MASSLESS * temperature);
        // No token further below the likeliest one can win, whatever the noise.
        double lowest = top + (LEAST_NOISE - MOST_NOISE) * s.temperature;
        if (min_p_ > 0.0) lowest = std::max(lowest, top + (std::log(min_p_) - 0.01) * temperature);  // a weight rounds
        lowest_ = to_float(lowest);
        if ((s.top_k > 0 && s.top_k < row.vocab) || s.top_p < 1.0) find_last(s);
    }

    // A bound on the logits of tokens that are kept and can win.
    float lowest() const { return std::max(lowest_, last_logit_); }

    bool keeps(float x, int64_t id) const {
        if (x < last_logit_ || (x == last_logit_ && id > last_)) return false;
        if (min_p_ <= 0.0 || x == highest_) return true;
        alignas(64) float weight[LANES];
        store(weight, weight_of(set1(x), top_, temperature_));
        return static_cast<double>(weight[0]) >= min_p_;
    }

   private:
    static float to_float(double x) { return static_cast<float>(std::max(x, static_cast<double>(-FLT_MAX))); }

    // Finds the last token, the likeliest first, that top_k and top_p keep.
    void find_last(const Sampling& s) {
        thread_local std::vector<int32_t> ids;
        const bool all = s.top_k == 0 || s.top_k >= row_.vocab;
        const int64_t most = all ? row_.vocab : s.top_k;
        uint64_t total = all ? mass_of_row() : 0;
        // The likeliest 64, then 8 times as many, ...: a few of a hundred thousand often reach top_p.
        for (int64_t some = all ? std::min<int64_t>(64, most) : most;; some = std::min(most, 8 * some)) {
            likeliest(some, ids);
            int64_t count = some;
            if (s.top_p < 1.0) {
                const std::vector<uint64_t>& masses = masses_of(ids);
                if (!all) total = 0;
                for (int64_t i = 0; !all && i < some; ++i) total += masses[static_cast<size_t>(i)];
                const double enough = s.top_p * static_cast<double>(total);
                uint64_t before = 0;
                for (count = 0; count < some && (count == 0 || static_cast<double>(before) < enough); ++count)
                    before += masses[static_cast<size_t>(count)];
                if (count == some && some < most) continue;
            }
            last_ = ids[static_cast<size_t>(count - 1)];
            last_logit_ = row_[last_];
            return;
        }
    }

    // The likeliest `count` tokens, in their order.
    void likeliest(int64_t count, std::vector<int32_t>& ids) const {
        thread_local TopK best;
        best.reset(count);
        for (int64_t i = 0; i < row_.vocab; i += LANES)
            best.add_lanes(row_.block(i), static_cast<int>(std::min<int64_t>(LANES, row_.vocab - i)), i);
        ids.resize(static_cast<size_t>(count));
        best.finish(ids.data());
        std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return row_[a] > row_[b]; });
    }

    const std::vector<uint64_t>& masses_of(const std::vector<int32_t>& ids) const {
        thread_local std::vector<uint64_t> masses;
        masses.resize(ids.size());
        alignas(64) float x[LANES];
        for (size_t i = 0; i < ids.size(); i += LANES) {
            const size_t left = std::min<size_t>(LANES, ids.size() - i);
            for (size_t j = 0; j < LANES; ++j) x[j] = row_[ids[i + std::min(j, left - 1)]];
            store(x, weight_of(load(x), top_, temperature_));
            for (size_t j = 0; j < left; ++j) masses[i + j] = mass_of(x[j]) - NO_MASS;
        }
        return masses;
    }

    uint64_t mass_of_row() const {
        uint64_t masses[LANES] = {}, added = 0;
        alignas(64) float weights[LANES];
        for (int64_t i = 0; i < row_.vocab; i += LANES) {
            const V x = row_.block(i);
            if ((above(set1(massless_), x) & 0xFFFFu) == 0xFFFFu) continue;
            store(weights, weight_of(x, top_, temperature_));
            for (int j = 0; j < LANES; ++j) masses[j] += mass_of(weights[j]);
            added += LANES;
        }
        uint64_t total = 0;
        for (uint64_t mass : masses) total += mass;
        return total - added * NO_MASS;
    }

    const Row& row_;
    V top_, temperature_;
    float highest_;
    double min_p_;
    float massless_, lowest_, last_logit_ = -INFINITY;
    int64_t last_ = INT64_MAX;
};

// The token that is kept and has the largest sum of noise and logit / temperature, the lower id among equals.
//
// With v = 1 - u the noise -ln(-ln u) is at most -ln v, and ln v is at least what a straight line between powers of two
// reads off the bits of v. Where that bound does not reach the best sum so far, no logarithm is taken.
inline int64_t winner(const Row& row, float top, const Sampling& s, const Filter& filter, uint64_t key) {
    constexpr float SLACK = 0.01f;                               // more than the bound's rounding, in powers of two
    const double temperature = std::max(s.temperature, 1e-200);  // no logit divided by it is infinite
    const double at_top = static_cast<double>(top) / temperature;
    auto bound_at = [](double lead) { return SLACK - static_cast<float>(lead * LOG2_E); };
    const V scale = set1(static_cast<float>(std::min(LOG2_E / temperature, 1e30)));
    const V lowest = set1(filter.lowest());
    double best = -INFINITY;
    float bound = bound_at(LEAST_NOISE);  // what the likeliest token has at least
    int64_t winner = -1;
    for (int64_t i = 0; i < row.vocab; i += LANES) {
        uint32_t lanes = row.lanes(i);
        if (!lanes) continue;
        const V x = row.load(i);
        lanes &= ~above(lowest, x);
        if (!lanes) continue;
        alignas(64) float needed[LANES];  // log2 v, at most, less the token's lead in powers of two
        for (int j = 0; j < LANES; ++j) {
            const auto v = static_cast<float>(static_cast<int32_t>(~noise_bits(key, i + j) >> 33));
            needed[j] = static_cast<float>(std::bit_cast<int32_t>(v)) * 0x1p-23f - (127.0f + 31.0f);
        }
        store(needed, sub(load(needed), mul(max(sub(x, set1(top)), set1(-FLT_MAX)), scale)));
        lanes &= ~above(load(needed), set1(bound));
        for (; lanes; lanes &= lanes - 1) {
            const int j = __builtin_ctz(lanes);
            const int64_t id = i + j;
            if (needed[j] > bound || !filter.keeps(row.logits[id], id)) continue;
            const double sum = static_cast<double>(row.logits[id]) / temperature + gumbel(noise_bits(key, id));
            if (!(sum > best)) continue;
            best = sum;
            winner = id;
            bound = bound_at(best - at_top);
        }
    }
    return winner;
}

// The token drawn, at temperature 0 the likeliest; -1 if none may be drawn.
inline int64_t sample_row(const float* logits, int64_t vocab, const uint32_t* allowed, const Sampling& s,
                          uint64_t key) {
    const Row row{logits, vocab, allowed};
    const float top = row.highest_logit();
    if (s.temperature == 0.0 || top == -INFINITY) return row.first(top);
    const int64_t id = winner(row, top, s, Filter(row, top, s), key);
    return id < 0 ? row.first(top) : id;
}

}  // namespace dsv4::DSV4_ISA
