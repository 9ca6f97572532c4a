// Candidates for a token's k best entries, from index scores of quantized values with an error bound.
//
// A quantized score is within `error` of the exact one (the indexer's fp32 chain). Entries more than 2 * error below
// the k-th quantized score are not among the k best, entries more than 2 * error above it are; the others get exact
// scores. So the selection equals that by exact scores.
#pragma once

#include <optional>

#include "base/threads.h"
#include "base/top_k.h"
#include "model/compressor.h"
#include "model/index_fp4.h"
#include "model/index_quantization.h"

#if defined(DSV4_ISA_AVX512_VNNI)

namespace dsv4::DSV4_ISA {

constexpr int64_t PAIR = 2 * LANES;  // keys of two adjacent panels
static_assert(LANES == IndexKeyCache::ROWS);

// Upper bound of a row's norm from its sum of squares as `dot` computes it, allowing for squares that underflow.
inline float norm_bound(float squares, int64_t width) {
    return std::sqrt(squares + static_cast<float>(width + 64) * 0x1p-149f) * 1.001f;
}

// Maximum of the merged bounds; NaN counts as infinite.
struct MaxBounds : IndexKeyCache::Bounds {
    void merge(const IndexKeyCache::Bounds& other) {
        square = other.square < INFINITY ? std::max(square, other.square) : INFINITY;
        step = std::max(step, other.step);
    }
};

// Quantizes up to 16 keys, from number `first` on, into a panel in VNNI layout, TILE_WORDS per group of 32 channels; missing keys are zeros.
template <class Quantizer>
inline MaxBounds quantize_panel(const Entries& keys, int64_t first, int64_t count, uint16_t* to, float* steps) {
    const int64_t width = keys.width, groups = groups_of(width);
    uint16_t* rows = scratch<uint16_t>(Scratch::staging, LANES * groups * GROUP);
    float* decoded = scratch(Scratch::index_keys, width);
    MaxBounds bounds;
    for (int64_t j = 0; j < LANES; ++j) {
        uint16_t* row = rows + j * groups * GROUP;
        float step = 0.0f;
        if (j < count) {
            const float* key = keys.read(first + j, decoded);
            step = Quantizer::step_of(key, width);
            bounds.merge({dot(key, key, width), step});
            Quantizer::quantize_row(key, width, step, row);
        } else {
            std::fill_n(row, groups * GROUP, uint16_t{0});
        }
        if (Quantizer::HAS_STEPS) steps[j] = step;
    }
    for (int64_t g = 0; g < groups; ++g) {
        const uint16_t* row[LANES];
        for (int64_t j = 0; j < LANES; ++j) row[j] = rows + (j * groups + g) * GROUP;
        transpose_16x16_pairs(row, to + g * TILE_WORDS);
    }
    return bounds;
}

// Bounds over all index keys of a call.
template <class Quantizer>
struct IndexKeyBounds {
    float max_norm = 0.0f;   // infinite if a key has a NaN
    float max_error = 0.0f;  // largest norm of a key's quantization error

    void set(const MaxBounds& bounds, int64_t width) {
        max_norm = norm_bound(bounds.square, width);
        max_error = Quantizer::max_error(max_norm, bounds.step, width);
    }
};

// Calls f(panel) for each of [0, panels), several per task; returns the maximum of the bounds.
template <class F>
inline MaxBounds for_each_panel(int64_t panels, F&& f) {
    constexpr int64_t TASK_PANELS = 16;
    std::vector<MaxBounds> tasks(static_cast<size_t>((panels + TASK_PANELS - 1) / TASK_PANELS));
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t task, int) {
        for (int64_t p = task * TASK_PANELS; p < std::min(panels, (task + 1) * TASK_PANELS); ++p)
            tasks[static_cast<size_t>(task)].merge(f(p));
    });
    MaxBounds bounds;
    for (const MaxBounds& task : tasks) bounds.merge(task);
    return bounds;
}

// Index keys [0, count) of a sequence, quantized for one call.
template <class Quantizer>
struct CallIndexKeys : IndexKeyBounds<Quantizer> {
    static_assert(!Quantizer::HAS_STEPS);
    int64_t groups = 0;

    void quantize(const Entries& index_keys, IndexKeyCache*, int64_t count) {
        groups = groups_of(index_keys.width);
        const int64_t panels = (count + PAIR - 1) / PAIR * 2;
        first = memory.reserve(panels * groups * TILE_WORDS);
        const MaxBounds bounds = for_each_panel(panels, [&](int64_t p) {
            const int64_t rows = std::clamp<int64_t>(count - p * LANES, 0, LANES);
            return quantize_panel<Quantizer>(index_keys, p * LANES, rows, first + p * groups * TILE_WORDS, nullptr);
        });
        IndexKeyBounds<Quantizer>::set(bounds, index_keys.width);
    }
    const uint16_t* panel_pair(int64_t e) const { return first + e / LANES * groups * TILE_WORDS; }
    const float* steps(int64_t) const { return nullptr; }

   private:
    Aligned<uint16_t> memory;
    uint16_t* first = nullptr;
};

// Index keys [0, count) of a sequence, quantized in an IndexKeyCache: only panels written since the last call are
// quantized again.
struct CachedIndexKeys : IndexKeyBounds<Int16Quantizer> {
    int64_t groups = 0;

    void quantize(const Entries& index_keys, IndexKeyCache* index_key_cache, int64_t count) {
        groups = groups_of(index_keys.width);
        cache = index_key_cache;
        entries.emplace(index_keys);
        cache->reserve(groups * TILE_WORDS);
        std::vector<int64_t> stale;
        MaxBounds bounds;
        for (int64_t p = 0; p * LANES < count; ++p) {
            const int64_t panel = panel_of(p * LANES), rows = std::min<int64_t>(LANES, count - p * LANES);
            if (cache->valid_rows(panel) < rows) {
                stale.push_back(p);
                cache->count_quantized(rows);
            } else {
                bounds.merge(cache->bounds(panel));
            }
        }
        const MaxBounds fresh = for_each_panel(static_cast<int64_t>(stale.size()), [&](int64_t i) {
            const int64_t p = stale[static_cast<size_t>(i)], panel = panel_of(p * LANES);
            const int64_t rows = std::min<int64_t>(LANES, count - p * LANES);
            const MaxBounds found =
                quantize_panel<Int16Quantizer>(index_keys, p * LANES, rows, cache->panel(panel), cache->steps(panel));
            cache->set_valid(panel, rows, found, index_keys.stored(p * LANES),
                             index_keys.pool.format.bytes);  // a panel's rows are contiguous
            return found;
        });
        bounds.merge(fresh);
        IndexKeyBounds::set(bounds, index_keys.width);
    }
    // Panels of keys e to e + 31, e a multiple of 32: contiguous, as a page's panels are.
    const uint16_t* panel_pair(int64_t e) const { return cache->panel(panel_of(e)); }
    const float* steps(int64_t e) const { return cache->steps(panel_of(e)); }

   private:
    IndexKeyCache* cache = nullptr;
    std::optional<Entries> entries;  // of the call

    int64_t panel_of(int64_t e) const { return entries->row(e) / LANES; }
};

// Index keys [0, count) of a sequence that are stored in FP4, read as they lie.
struct Fp4IndexKeys : IndexKeyBounds<Fp4Quantizer> {
    int64_t groups = 0;

    void quantize(const Entries& index_keys, IndexKeyCache*, int64_t count) {
        constexpr int64_t TASK_PAGES = 16;
        entries.emplace(index_keys);
        groups = groups_of(index_keys.width);
        const int64_t pages = (count + PAIR - 1) / PAIR;
        std::vector<float> norms(static_cast<size_t>((pages + TASK_PAGES - 1) / TASK_PAGES));
        parallel(static_cast<int64_t>(norms.size()), [&](int64_t task, int) {
            const int64_t first = task * TASK_PAGES * PAIR, stop = std::min(count, first + TASK_PAGES * PAIR);
            float& norm = norms[static_cast<size_t>(task)];
            for (int64_t e = first; e < stop; e += PAIR)
                norm = std::max(norm,
                                fp4_norm_bound(index_keys.pool.format, index_keys.stored(e), std::min(PAIR, stop - e)));
        });
        max_norm = *std::max_element(norms.begin(), norms.end());
    }
    // Panels of keys e to e + 31 in this thread's scratch. A page has 32 keys, which are contiguous.
    const uint16_t* panel_pair(int64_t e) const {
        uint8_t* to = scratch<uint8_t>(Scratch::index_panels, 2 * groups * FP4_PANEL_BYTES);
        const StoredRows& pool = entries->pool;
        unpack_fp4_panel(pool.format, entries->stored(e), to);
        unpack_fp4_panel(pool.format, entries->stored(e) + LANES * pool.format.bytes, to + groups * FP4_PANEL_BYTES);
        return reinterpret_cast<const uint16_t*>(to);
    }
    const float* steps(int64_t) const { return nullptr; }

   private:
    std::optional<Entries> entries;  // of the call
};

// Bound on |quantized - exact| of a token's scores; infinite if either may overflow. q [heads, width]. It covers the
// quantization of queries and keys, the fp32 rounding of both accumulations, and the flush of values below 2^-126 to
// zero by AMX tiles.
template <class Quantizer>
inline float index_error(const float* q, const float* weights, int64_t heads, int64_t width,
                         const IndexKeyBounds<Quantizer>& index_keys) {
    const float relative = static_cast<float>(width + heads + 8) * 0x1p-21f;
    float error = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
        const float norm = norm_bound(dot(q + h * width, q + h * width, width), width), weight = std::fabs(weights[h]);
        const float q_error = Quantizer::max_error(norm, Quantizer::step_of(q + h * width, width), width);
        if (!(norm * index_keys.max_norm < 0x1p120f)) return INFINITY;
        if (weight == 0.0f) continue;  // the dots are finite, so the head adds 0
        if (!(weight >= Quantizer::MIN_WEIGHT && weight <= Quantizer::MAX_WEIGHT)) return INFINITY;
        const float max_quantized = index_keys.max_norm + index_keys.max_error;  // norm of a quantized key
        const float products =
            relative * (norm + q_error) * max_quantized + norm * index_keys.max_error + q_error * max_quantized;
        const float tiny = static_cast<float>(width) * 0x1p-120f * (norm + index_keys.max_norm + 1.0f);
        error += weight * (products + tiny) + 0x1p-140f;  // 2^-140 covers the rounding of subnormal sums
    }
    return error < 0x1p100f ? error * 1.01f : INFINITY;
}

// Quantized queries of some tokens, in this thread's scratch. The scores of a block of tokens fit the first-level
// cache.
template <class Quantizer>
struct QuantizedQueries {
    int64_t tokens, heads, groups, stride, block, block_rows;
    uint16_t* rows;
    float *factors, *dots;  // [tokens, heads] head weight times query step; dot products of a block

    // q [tokens, heads, width], weights [tokens, heads].
    QuantizedQueries(const float* q, const float* weights, int64_t tokens_, int64_t heads_, int64_t width)
        : tokens(tokens_), heads(heads_), groups(groups_of(width)), stride((groups | 1) * GROUP) {
        block = std::min(tokens, std::max<int64_t>(1, 128 / heads));
        block_rows = padded_rows(block);
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
                const float step = Quantizer::step_of(from, width);
                Quantizer::quantize_row(from, width, step, to);
                factors[first + r] = weights[first + r] * step;
            }
        }
    }

    // Calls f(token, low, high) with the scores of keys e to e + 31 for tokens t0 to t1 - 1 of one block.
    template <class IndexKeys, class F>
    void scores(Quantizer& quantizer, const IndexKeys& index_keys, int64_t e, int64_t t0, int64_t t1, F&& f) const {
        quantizer.dot_panels(rows + t0 / block * block_rows * stride, stride, padded_rows(t1 - t0),
                             index_keys.panel_pair(e), groups, dots);
        const float* at = dots;
        for (int64_t t = t0; t < t1; ++t) {
            V low = zero(), high = zero();
            for (int64_t h = 0; h < heads; ++h, at += PAIR) {
                const V factor = set1(factors[t * heads + h]);
                low = fma(factor, max(load(at), zero()), low);
                high = fma(factor, max(load(at + LANES), zero()), high);
            }
            if (Quantizer::HAS_STEPS) {
                const float* steps = index_keys.steps(e);
                low = mul(low, load(steps));
                high = mul(high, load(steps + LANES));
            }
            f(t, low, high);
        }
    }

   private:
    int64_t padded_rows(int64_t count) const {
        return (count * heads + Quantizer::ROWS - 1) / Quantizer::ROWS * Quantizer::ROWS;
    }
};

// Adds entries [from, visible[t]) to the candidates of each token t, whose slack is twice its index_error. q [tokens,
// heads, width], weights [tokens, heads]; from is a multiple of 32, visible[t] ascends. False if there are too many
// candidates.
template <class Quantizer, class IndexKeys>
inline bool find_candidates(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width,
                            const IndexKeys& index_keys, int64_t from, const int64_t* visible, int64_t k,
                            TopK* candidates) {
    constexpr int64_t CHUNK_WORDS = 1 << 17;  // quantized keys that fit the second-level cache
    const QuantizedQueries<Quantizer> queries(q, weights, tokens, heads, width);
    const int64_t chunk = std::max<int64_t>(1, CHUNK_WORDS / (2 * queries.groups * TILE_WORDS)) * PAIR;
    [[maybe_unused]] Quantizer quantizer;  // holds the AMX tile configuration that dot_panels needs
    for (int64_t e0 = from; e0 < visible[tokens - 1]; e0 += chunk) {
        for (int64_t t0 = 0; t0 < tokens; t0 += queries.block) {
            const int64_t t1 = std::min(tokens, t0 + queries.block), stop = std::min(e0 + chunk, visible[t1 - 1]);
            for (int64_t e = e0; e < stop; e += PAIR)
                queries.scores(
                    quantizer, index_keys, e, t0, t1, [&](int64_t t, V low, V high) __attribute__((always_inline)) {
                        const int64_t left = visible[t] - e;
                        if (left > 0) candidates[t].add_lanes(low, static_cast<int>(std::min<int64_t>(LANES, left)), e);
                        if (left > LANES)
                            candidates[t].add_lanes(high, static_cast<int>(std::min<int64_t>(LANES, left - LANES)),
                                                    e + LANES);
                    });
        }
        int64_t total = 0;
        for (int64_t t = 0; t < tokens; ++t) total += candidates[t].size();
        if (total > tokens * (8 * k + 2048)) return false;  // e.g. many ties: exact scores alone are faster
    }
    return true;
}

}  // namespace dsv4::DSV4_ISA

#endif
