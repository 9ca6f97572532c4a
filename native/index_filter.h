// Which entries can be among the k best of a token: index scores in BF16 on AMX tiles, with a bound on their error.
//
// A score is within `error` of what the indexer's fp32 chain gives. Whatever is further than twice that below the k-th of the BF16
// scores is not among the k best, however the chain rounds; the others' chains are computed. So the choice is the chain's own.
#pragma once

#include "amx_tiles.h"
#include "compressor.h"
#include "threads.h"
#include "top_k.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

// A row's channels rounded to BF16, zeros up to whole groups.
inline void round_row(const float* from, int64_t width, uint16_t* to) {
    for (int64_t k = 0; k < width; k += GROUP) {
        auto part = [&](int64_t at) {
            const int64_t count = std::clamp<int64_t>(width - at, 0, LANES);
            return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from + at);
        };
        _mm512_storeu_si512(to + k, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part(k + LANES), part(k))));
    }
}

// No norm of a row is above it, from the sum of its squares as `dot` gives it: what is too small for fp32 is added.
inline float norm_bound(float squares, int64_t width) {
    return std::sqrt(squares + static_cast<float>(width + 64) * 0x1p-149f) * 1.001f;
}

// The first `count` index keys of a sequence, turned: tile g of keys 16 * p and on at panels + (p * groups + g) * TILE_WORDS.
struct TurnedKeys {
    std::vector<uint16_t> memory;
    const uint16_t* panels = nullptr;
    int64_t groups = 0;
    float longest = 0.0f;  // no key's norm is above it; infinite where one is no number

    void take(const Entries& keys, int64_t count) {
        constexpr int64_t PANELS_A_TASK = 16;
        const int64_t width = keys.width, pairs = (count + 2 * LANES - 1) / (2 * LANES), all = 2 * pairs;
        groups = groups_of(width);
        const size_t words = static_cast<size_t>(all * groups * TILE_WORDS + 32);
        if (memory.size() < words) memory.resize(words + words / 4);
        auto* to = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        panels = to;
        const int64_t tasks = (all + PANELS_A_TASK - 1) / PANELS_A_TASK;
        std::vector<float> squares(static_cast<size_t>(tasks));
        parallel(tasks, [&](int64_t task, int) {
            uint16_t* rows = aligned_words(Scratch::wide, LANES * groups * GROUP);
            float most = 0.0f;
            for (int64_t p = task * PANELS_A_TASK; p < std::min(all, (task + 1) * PANELS_A_TASK); ++p) {
                for (int64_t j = 0; j < LANES; ++j) {
                    uint16_t* row = rows + j * groups * GROUP;
                    if (p * LANES + j >= count) {
                        std::fill_n(row, groups * GROUP, uint16_t{0});
                        continue;
                    }
                    const float* key = keys[p * LANES + j];
                    const float square = dot(key, key, width);
                    most = square < INFINITY ? std::max(most, square) : INFINITY;
                    round_row(key, width, row);
                }
                for (int64_t g = 0; g < groups; ++g) {
                    const uint16_t* row[LANES];
                    for (int64_t j = 0; j < LANES; ++j) row[j] = rows + (j * groups + g) * GROUP;
                    turn_pairs(row, to + (p * groups + g) * TILE_WORDS);
                }
            }
            squares[static_cast<size_t>(task)] = most;
        });
        float most = 0.0f;
        for (float square : squares) most = std::max(most, square);
        longest = norm_bound(most, width);
    }
};

// The most by which a token's score on tiles and in the chain differ, infinite where either may overflow. q [heads, width]. Each factor
// is rounded to a 512th of itself at most, both ways of adding to fp32, and tiles take for zero what is below 2^-126.
inline float index_error(const float* q, const float* weights, int64_t heads, int64_t width, float longest) {
    const float relative = 0x1p-8f + 0x1p-17f + static_cast<float>(width + heads + 8) * 0x1p-21f;
    float error = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
        const float norm = norm_bound(dot(q + h * width, q + h * width, width), width);
        if (!(norm * longest < 0x1p120f)) return INFINITY;
        if (weights[h] == 0.0f) continue;  // zero times what is finite
        const float tiny = static_cast<float>(width) * 0x1p-120f * (norm + longest + 1.0f);
        error += std::fabs(weights[h]) * (relative * norm * longest + tiny) + 0x1p-147f;  // sums of subnormals round by that
    }
    return error < 0x1p100f ? error * 1.01f : INFINITY;
}

// R tiles of 16 rows of queries, `stride` words a row, times two panels of keys -> to[row * 32 + key].
template <int R>
inline void index_tiles(const uint16_t* q, int64_t stride, const uint16_t* keys, int64_t groups, float* to) {
    const uint16_t* rows[R];
    const uint16_t* panel[2] = {keys, keys + groups * TILE_WORDS};
    for (int i = 0; i < R; ++i) rows[i] = q + i * LANES * stride;
    each<2 * R>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
    add_tiles<R, 2, false>(rows, {GROUP, 2 * stride}, panel, {TILE_WORDS, 64}, 1, groups);
    each<2 * R>([&](auto t) __attribute__((always_inline)) {
        constexpr int T = decltype(t)::value;
        tile_store<T>(to + T / 2 * LANES * 2 * LANES + T % 2 * LANES, 2 * LANES * sizeof(float));
    });
}

// Adds the entries that each token sees to what may be among its best: of[t] has begun, with twice index_error as its slack.
// q [tokens, heads, width], weights [tokens, heads], seen[t] ascending. False where most are among them, as equal scores are: then
// chains alone are quicker.
inline bool filter_entries(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width, const TurnedKeys& keys,
                           const int64_t* seen, int64_t k, Largest* of) {
    constexpr int64_t ROWS = 128, CHUNK_WORDS = 1 << 17;  // queries whose scores stay in the first cache, keys that do in the second
    const int64_t groups = keys.groups, stride = (groups | 1) * GROUP, block = std::max<int64_t>(1, ROWS / heads);
    const int64_t tiles_of_block = (block * heads + LANES - 1) / LANES;
    const int64_t blocks = (tokens + block - 1) / block, block_words = tiles_of_block * LANES * stride;
    uint16_t* rows = aligned_words(Scratch::wide, blocks * block_words);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t count = std::min(block, tokens - b * block) * heads;
        for (int64_t r = 0; r < tiles_of_block * LANES; ++r) {
            uint16_t* to = rows + b * block_words + r * stride;
            if (r < count)
                round_row(q + (b * block * heads + r) * width, width, to);
            else
                std::fill_n(to, stride, uint16_t{0});
        }
    }
    float* dots = reinterpret_cast<float*>(aligned_words(Scratch::hidden, tiles_of_block * LANES * 4 * LANES));
    const int64_t chunk = std::max<int64_t>(1, CHUNK_WORDS / (2 * groups * TILE_WORDS)) * 2 * LANES;
    Tiles tiles(WIDE_TILES);
    for (int64_t e0 = 0; e0 < seen[tokens - 1]; e0 += chunk) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t t0 = b * block, t1 = std::min(tokens, t0 + block), stop = std::min(e0 + chunk, seen[t1 - 1]);
            const int64_t used = ((t1 - t0) * heads + LANES - 1) / LANES;
            for (int64_t e = e0; e < stop; e += 2 * LANES) {
                const uint16_t* panel = keys.panels + e / LANES * groups * TILE_WORDS;
                for (int64_t i = 0; i < used; i += 3) {
                    const uint16_t* from = rows + b * block_words + i * LANES * stride;
                    float* to = dots + i * LANES * 2 * LANES;
                    switch (used - i) {
                        case 1: index_tiles<1>(from, stride, panel, groups, to); break;
                        case 2: index_tiles<2>(from, stride, panel, groups, to); break;
                        default: index_tiles<3>(from, stride, panel, groups, to);
                    }
                }
                const float* at = dots;
                for (int64_t t = t0; t < t1; ++t) {
                    V low = zero(), high = zero();
                    for (int64_t h = 0; h < heads; ++h, at += 2 * LANES) {
                        const V weight = set1(weights[t * heads + h]);
                        low = fma(weight, max(load(at), zero()), low);
                        high = fma(weight, max(load(at + LANES), zero()), high);
                    }
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
