// Which entries can be among the k best of a token: index scores of rounded numbers, with a bound on their error.
//
// A score is within `error` of what the indexer's fp32 chain gives. Whatever is further than twice that below the k-th of the
// rounded scores is not among the k best, whatever is further above it is, however the chain rounds; the chains of the others
// are computed. So the choice is the chain's own.
#pragma once

#include <optional>

#include "model/compressor.h"
#include "model/index_quantization.h"
#include "base/threads.h"
#include "base/top_k.h"

#if defined(DSV4_ISA_AVX512_VNNI)

namespace dsv4::DSV4_ISA {

constexpr int64_t PAIR = 2 * LANES;  // keys of two panels, which lie side by side
static_assert(LANES == KeptKeys::ROWS);

// No norm of a row is above it, from the sum of its squares as `dot` gives it: what is too small for fp32 is added.
inline float norm_bound(float squares, int64_t width) {
    return std::sqrt(squares + static_cast<float>(width + 64) * 0x1p-149f) * 1.001f;
}

// The largest of what `with` was given; no number counts as infinite.
struct Most : KeptKeys::Bounds {
    void with(const KeptKeys::Bounds& other) {
        square = other.square < INFINITY ? std::max(square, other.square) : INFINITY;
        step = std::max(step, other.step);
    }
};

// Up to 16 keys, rounded and turned, group after group of TILE_WORDS; missing ones are zeros.
template <class Rounding, class Key>
inline Most round_panel(Key key, int64_t count, int64_t width, uint16_t* to, float* steps) {
    const int64_t groups = groups_of(width);
    uint16_t* rows = scratch<uint16_t>(Scratch::staging, LANES * groups * GROUP);
    Most most;
    for (int64_t j = 0; j < LANES; ++j) {
        uint16_t* row = rows + j * groups * GROUP;
        float step = 0.0f;
        if (j < count) {
            step = Rounding::step_of(key(j), width);
            most.with({dot(key(j), key(j), width), step});
            Rounding::round_row(key(j), width, step, row);
        } else {
            std::fill_n(row, groups * GROUP, uint16_t{0});
        }
        if (Rounding::STEPS_DIFFER) steps[j] = step;
    }
    for (int64_t g = 0; g < groups; ++g) {
        const uint16_t* row[LANES];
        for (int64_t j = 0; j < LANES; ++j) row[j] = rows + (j * groups + g) * GROUP;
        transpose_16x16_pairs(row, to + g * TILE_WORDS);
    }
    return most;
}

// How long keys are and how far from their rounded ones.
template <class Rounding>
struct KeyBounds {
    float longest = 0.0f;  // no key's norm is above it; infinite where one is no number
    float apart = 0.0f;    // no key is further from its rounded one

    void take(const Most& most, int64_t width) {
        longest = norm_bound(most.square, width);
        apart = Rounding::moved(longest, most.step, width);
    }
};

// f(panel) for each of [0, panels), many a task; the largest of what it gives.
template <class F>
inline Most each_panel(int64_t panels, F&& f) {
    constexpr int64_t OF_TASK = 16;
    std::vector<Most> parts(static_cast<size_t>((panels + OF_TASK - 1) / OF_TASK));
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task, int) {
        for (int64_t p = task * OF_TASK; p < std::min(panels, (task + 1) * OF_TASK); ++p) parts[static_cast<size_t>(task)].with(f(p));
    });
    Most most;
    for (const Most& part : parts) most.with(part);
    return most;
}

// The first `count` index keys of a sequence, rounded for one call.
template <class Rounding>
struct TurnedKeys : KeyBounds<Rounding> {
    static_assert(!Rounding::STEPS_DIFFER);
    int64_t groups = 0;

    void take(const Entries& keys, KeptKeys*, int64_t count) {
        groups = groups_of(keys.width);
        const int64_t panels = (count + PAIR - 1) / PAIR * 2;
        const size_t words = static_cast<size_t>(panels * groups * TILE_WORDS + 32);
        if (memory.size() < words) memory.resize(words + words / 4);
        first = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        const Most most = each_panel(panels, [&](int64_t p) {
            auto key = [&](int64_t j) { return keys[p * LANES + j]; };
            return round_panel<Rounding>(key, std::clamp<int64_t>(count - p * LANES, 0, LANES), keys.width,
                                         first + p * groups * TILE_WORDS, nullptr);
        });
        KeyBounds<Rounding>::take(most, keys.width);
    }
    const uint16_t* pair(int64_t e) const { return first + e / LANES * groups * TILE_WORDS; }
    const float* steps(int64_t) const { return nullptr; }

   private:
    std::vector<uint16_t> memory;
    uint16_t* first = nullptr;
};

// The same, kept from call to call: only what was written since is rounded.
struct RoundedKeys : KeyBounds<WholeNumbers> {
    int64_t groups = 0;

    void take(const Entries& keys, KeptKeys* of, int64_t count) {
        groups = groups_of(keys.width), kept = of;
        entries.emplace(keys);
        kept->open(groups * TILE_WORDS);
        std::vector<int64_t> stale;
        Most most;
        for (int64_t p = 0; p * LANES < count; ++p) {
            const int64_t panel = panel_of(p * LANES);
            if (kept->known(panel) < std::min<int64_t>(LANES, count - p * LANES))
                stale.push_back(p);
            else
                most.with(kept->bounds(panel));
        }
        const Most fresh = each_panel(static_cast<int64_t>(stale.size()), [&](int64_t i) {
            const int64_t p = stale[static_cast<size_t>(i)], panel = panel_of(p * LANES);
            const int64_t some = std::min<int64_t>(LANES, count - p * LANES);
            auto key = [&](int64_t j) { return keys[p * LANES + j]; };
            const Most found = round_panel<WholeNumbers>(key, some, keys.width, kept->words(panel), kept->steps(panel));
            kept->bounds(panel) = found, kept->known(panel) = static_cast<uint8_t>(some);
            return found;
        });
        most.with(fresh);
        KeyBounds::take(most, keys.width);
    }
    // Those from e on, a multiple of 32: a page's keys lie side by side.
    const uint16_t* pair(int64_t e) const { return kept->words(panel_of(e)); }
    const float* steps(int64_t e) const { return kept->steps(panel_of(e)); }

   private:
    KeptKeys* kept = nullptr;
    std::optional<Entries> entries;  // of the call

    int64_t panel_of(int64_t e) const { return entries->row(e) / LANES; }
};

// The most by which a token's rounded score and the chain's differ, infinite where either may overflow. q [heads, width].
// Rounding moves queries and keys, both ways of adding round to fp32, and tiles take for zero what is below 2^-126.
template <class Rounding>
inline float index_error(const float* q, const float* weights, int64_t heads, int64_t width, const KeyBounds<Rounding>& keys) {
    const float relative = static_cast<float>(width + heads + 8) * 0x1p-21f;
    float error = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
        const float norm = norm_bound(dot(q + h * width, q + h * width, width), width), weight = std::fabs(weights[h]);
        const float moved = Rounding::moved(norm, Rounding::step_of(q + h * width, width), width);
        if (!(norm * keys.longest < 0x1p120f)) return INFINITY;
        if (weight == 0.0f) continue;  // zero times what is finite
        if (!(weight >= Rounding::LEAST_WEIGHT && weight <= Rounding::MOST_WEIGHT)) return INFINITY;
        const float farthest = keys.longest + keys.apart;  // of rounded keys
        const float products = relative * (norm + moved) * farthest + norm * keys.apart + moved * farthest;
        const float tiny = static_cast<float>(width) * 0x1p-120f * (norm + keys.longest + 1.0f);
        error += weight * (products + tiny) + 0x1p-140f;  // sums of subnormals round by less
    }
    return error < 0x1p100f ? error * 1.01f : INFINITY;
}

// Queries of some tokens, rounded, in this thread's scratch: block after block of tokens whose scores stay in the first cache.
template <class Rounding>
struct RoundedQueries {
    int64_t tokens, heads, groups, stride, block, block_rows;
    uint16_t* rows;
    float *factors, *dots;  // a head's weight times its query's step

    // q [tokens, heads, width], weights [tokens, heads].
    RoundedQueries(const float* q, const float* weights, int64_t tokens_, int64_t heads_, int64_t width)
        : tokens(tokens_), heads(heads_), groups(groups_of(width)), stride((groups | 1) * GROUP) {
        block = std::min(tokens, std::max<int64_t>(1, 128 / heads));
        block_rows = whole(block);
        const int64_t blocks = (tokens + block - 1) / block;
        rows = scratch<uint16_t>(Scratch::staging, blocks * block_rows * stride);
        dots = scratch(Scratch::index_dots, block_rows * PAIR);
        factors = scratch(Scratch::lanes, tokens * heads);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * block * heads, count = std::min(block, tokens - b * block) * heads;
            for (int64_t r = 0; r < block_rows; ++r) {
                uint16_t* to = rows + (b * block_rows + r) * stride;
                if (r >= count) {
                    std::fill_n(to, stride, uint16_t{0});
                    continue;
                }
                const float* from = q + (first + r) * width;
                const float step = Rounding::step_of(from, width);
                Rounding::round_row(from, width, step, to);
                factors[first + r] = weights[first + r] * step;
            }
        }
    }

    // f(token, low, high) with the scores of keys e to e + 31 for tokens t0 to t1 - 1 of a block.
    template <class Keys, class F>
    void scores(Rounding& unit, const Keys& keys, int64_t e, int64_t t0, int64_t t1, F&& f) const {
        unit.dots(rows + t0 / block * block_rows * stride, stride, whole(t1 - t0), keys.pair(e), groups, dots);
        const float* at = dots;
        for (int64_t t = t0; t < t1; ++t) {
            V low = zero(), high = zero();
            for (int64_t h = 0; h < heads; ++h, at += PAIR) {
                const V factor = set1(factors[t * heads + h]);
                low = fma(factor, max(load(at), zero()), low);
                high = fma(factor, max(load(at + LANES), zero()), high);
            }
            if (Rounding::STEPS_DIFFER) {
                const float* steps = keys.steps(e);
                low = mul(low, load(steps)), high = mul(high, load(steps + LANES));
            }
            f(t, low, high);
        }
    }

   private:
    int64_t whole(int64_t some) const { return (some * heads + Rounding::ROWS - 1) / Rounding::ROWS * Rounding::ROWS; }
};

// Adds entries [from, seen[t]) to what may be among a token's best: of[t] has begun, with twice index_error as its slack. q
// [tokens, heads, width], weights [tokens, heads], from a multiple of 32, seen[t] ascending. False where there are too many.
template <class Rounding, class Keys>
inline bool filter_entries(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width, const Keys& keys,
                           int64_t from, const int64_t* seen, int64_t k, Largest* of) {
    constexpr int64_t CHUNK_WORDS = 1 << 17;  // keys that stay in the second cache
    const RoundedQueries<Rounding> queries(q, weights, tokens, heads, width);
    const int64_t chunk = std::max<int64_t>(1, CHUNK_WORDS / (2 * queries.groups * TILE_WORDS)) * PAIR;
    [[maybe_unused]] Rounding unit;  // while it lives, the dots can be computed
    for (int64_t e0 = from; e0 < seen[tokens - 1]; e0 += chunk) {
        for (int64_t t0 = 0; t0 < tokens; t0 += queries.block) {
            const int64_t t1 = std::min(tokens, t0 + queries.block), stop = std::min(e0 + chunk, seen[t1 - 1]);
            for (int64_t e = e0; e < stop; e += PAIR)
                queries.scores(unit, keys, e, t0, t1, [&](int64_t t, V low, V high) __attribute__((always_inline)) {
                    const int64_t left = seen[t] - e;
                    if (left > 0) of[t].take(low, static_cast<int>(std::min<int64_t>(LANES, left)), e);
                    if (left > LANES) of[t].take(high, static_cast<int>(std::min<int64_t>(LANES, left - LANES)), e + LANES);
                });
        }
        int64_t near = 0;
        for (int64_t t = 0; t < tokens; ++t) near += of[t].size();
        if (near > tokens * (8 * k + 2048)) return false;  // most of them, as equal scores are: chains alone are quicker
    }
    return true;
}

}  // namespace dsv4::DSV4_ISA

#endif
