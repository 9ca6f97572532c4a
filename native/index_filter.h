// Which entries can be among the k best of a token: index scores of rounded numbers, with a bound on their error.
//
// A score is within `error` of what the indexer's fp32 chain gives. Whatever is further than twice that below the k-th of the
// rounded scores is not among the k best, however the chain rounds; the others' chains are computed. So the choice is the
// chain's own.
#pragma once

#include "compressor.h"
#include "index_rounding.h"
#include "threads.h"
#include "top_k.h"

#if defined(DSV4_ISA_AVX512_VNNI)

namespace dsv4::DSV4_ISA {

// No norm of a row is above it, from the sum of its squares as `dot` gives it: what is too small for fp32 is added.
inline float norm_bound(float squares, int64_t width) {
    return std::sqrt(squares + static_cast<float>(width + 64) * 0x1p-149f) * 1.001f;
}

// The first `count` index keys of a sequence, rounded and turned: group g of keys 16 * p and on at panels + (p * groups + g) *
// TILE_WORDS.
template <class Rounding>
struct TurnedKeys {
    std::vector<uint16_t> memory;
    const uint16_t* panels = nullptr;
    std::vector<float> steps;  // a key is its step times the rounded one
    int64_t groups = 0;
    float longest = 0.0f;  // no key's norm is above it; infinite where one is no number
    float apart = 0.0f;    // no key is further from its rounded one

    void take(const Entries& keys, int64_t count) {
        constexpr int64_t PANELS_A_TASK = 16;
        const int64_t width = keys.width, pairs = (count + 2 * LANES - 1) / (2 * LANES), all = 2 * pairs;
        groups = groups_of(width);
        const size_t words = static_cast<size_t>(all * groups * TILE_WORDS + 32);
        if (memory.size() < words) memory.resize(words + words / 4);
        if (Rounding::STEPS_DIFFER) steps.resize(static_cast<size_t>(all * LANES));
        auto* to = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        panels = to;
        const int64_t tasks = (all + PANELS_A_TASK - 1) / PANELS_A_TASK;
        struct Most {
            float square = 0.0f, step = 0.0f;
            void add(float other_square, float other_step) {  // no number counts as infinite
                square = other_square < INFINITY ? std::max(square, other_square) : INFINITY;
                step = std::max(step, other_step);
            }
        };
        std::vector<Most> parts(static_cast<size_t>(tasks));
        parallel(tasks, [&](int64_t task, int) {
            uint16_t* rows = aligned_words(Scratch::wide, LANES * groups * GROUP);
            Most most;
            for (int64_t p = task * PANELS_A_TASK; p < std::min(all, (task + 1) * PANELS_A_TASK); ++p) {
                for (int64_t j = 0; j < LANES; ++j) {
                    uint16_t* row = rows + j * groups * GROUP;
                    float step = 0.0f;
                    if (p * LANES + j < count) {
                        const float* key = keys[p * LANES + j];
                        step = Rounding::step_of(key, width);
                        most.add(dot(key, key, width), step);
                        Rounding::round_row(key, width, step, row);
                    } else {
                        std::fill_n(row, groups * GROUP, uint16_t{0});
                    }
                    if (Rounding::STEPS_DIFFER) steps[static_cast<size_t>(p * LANES + j)] = step;
                }
                for (int64_t g = 0; g < groups; ++g) {
                    const uint16_t* row[LANES];
                    for (int64_t j = 0; j < LANES; ++j) row[j] = rows + (j * groups + g) * GROUP;
                    turn_pairs(row, to + (p * groups + g) * TILE_WORDS);
                }
            }
            parts[static_cast<size_t>(task)] = most;
        });
        Most most;
        for (const Most& part : parts) most.add(part.square, part.step);
        longest = norm_bound(most.square, width);
        apart = Rounding::moved(longest, most.step, width);
    }
};

// The most by which a token's rounded score and the chain's differ, infinite where either may overflow. q [heads, width].
// Rounding moves queries and keys, both ways of adding round to fp32, and tiles take for zero what is below 2^-126.
template <class Rounding>
inline float index_error(const float* q, const float* weights, int64_t heads, int64_t width, const TurnedKeys<Rounding>& keys) {
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

// Adds the entries that each token sees to what may be among its best: of[t] has begun, with twice index_error as its slack.
// q [tokens, heads, width], weights [tokens, heads], seen[t] ascending. False where most are among them, as equal scores are:
// then chains alone are quicker.
template <class Rounding>
inline bool filter_entries(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width,
                           const TurnedKeys<Rounding>& keys, const int64_t* seen, int64_t k, Largest* of) {
    constexpr int64_t ROWS = 128, CHUNK_WORDS = 1 << 17;  // queries whose scores stay in the first cache, keys that do in the second
    const int64_t groups = keys.groups, stride = (groups | 1) * GROUP, block = std::max<int64_t>(1, ROWS / heads);
    const int64_t block_rows = (block * heads + LANES - 1) / LANES * LANES, blocks = (tokens + block - 1) / block;
    uint16_t* rows = aligned_words(Scratch::wide, blocks * block_rows * stride);
    float* dots = aligned_scratch(Scratch::dots, block_rows * 2 * LANES);
    float* factors = scratch(Scratch::lanes, tokens * heads);  // a head's weight times its query's step
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
    const int64_t chunk = std::max<int64_t>(1, CHUNK_WORDS / (2 * groups * TILE_WORDS)) * 2 * LANES;
    [[maybe_unused]] Rounding unit;  // while it lives, the dots can be computed
    for (int64_t e0 = 0; e0 < seen[tokens - 1]; e0 += chunk) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t t0 = b * block, t1 = std::min(tokens, t0 + block), stop = std::min(e0 + chunk, seen[t1 - 1]);
            const int64_t used = ((t1 - t0) * heads + LANES - 1) / LANES * LANES;
            for (int64_t e = e0; e < stop; e += 2 * LANES) {
                const uint16_t* panels = keys.panels + e / LANES * groups * TILE_WORDS;
                unit.dots(rows + b * block_rows * stride, stride, used, panels, groups, dots);
                const float* at = dots;
                for (int64_t t = t0; t < t1; ++t) {
                    V low = zero(), high = zero();
                    for (int64_t h = 0; h < heads; ++h, at += 2 * LANES) {
                        const V factor = set1(factors[t * heads + h]);
                        low = fma(factor, max(load(at), zero()), low);
                        high = fma(factor, max(load(at + LANES), zero()), high);
                    }
                    if (Rounding::STEPS_DIFFER)
                        low = mul(low, load(keys.steps.data() + e)), high = mul(high, load(keys.steps.data() + e + LANES));
                    const int64_t left = seen[t] - e;
                    if (left > 0) of[t].take(low, static_cast<int>(std::min<int64_t>(LANES, left)), e);
                    if (left > LANES) of[t].take(high, static_cast<int>(std::min<int64_t>(LANES, left - LANES)), e + LANES);
                }
            }
        }
        int64_t near = 0;
        for (int64_t t = 0; t < tokens; ++t) near += of[t].size();
        if (near > tokens * (8 * k + 2048)) return false;
    }
    return true;
}

}  // namespace dsv4::DSV4_ISA

#endif
