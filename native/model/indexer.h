// The indexer: scores of compressed entries, and the entries that each token reads.
//
// A score is a chain over the heads, of weight times relu of a chain over the channels, both ascending and from zero.
#pragma once

#include <vector>

#include "model/index_filter.h"
#include "gemm/gemm.h"
#include "model/token_tile.h"
#include "base/top_k.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t KEY_CHUNK = 512;      // keys of one task when few tokens score many
constexpr int64_t INDEX_TOKENS = 64;    // neighbouring tokens of one task when many do
#if defined(DSV4_ISA_AVX512)
constexpr int INDEX_HEADS = 8, INDEX_PANELS = 2;
#else
constexpr int INDEX_HEADS = 4, INDEX_PANELS = 1;
#endif
constexpr int64_t INDEX_KEYS = INDEX_PANELS * LANES;

// R more heads of a token: to[key] += weight_r * relu(q_r . key), heads in order, from zero if they are the first. Keys
// [P][width][16].
template <int R, int P>
[[gnu::noinline]] inline void add_heads(const float* q, int64_t width, const float* keys, const float* weights, bool first, float* to) {
    constexpr int UNROLL = 4;
    const int64_t whole = width / UNROLL * UNROLL;
    V acc[R][P];
    clear(acc);
    StridedRows<R> rows(q, width);
    multiply_panels<UNROLL>(acc, rows, 1, whole, keys, width * LANES);
    multiply_panels<1>(acc, rows, 1, width - whole, keys + whole * LANES, width * LANES);
    for (int p = 0; p < P; ++p) {
        V sum = first ? zero() : load(to + p * LANES);
        for (int r = 0; r < R; ++r) sum = fma(set1(weights[r]), max(acc[r][p], zero()), sum);
        store(to + p * LANES, sum);
    }
}

template <int P>
inline void token_scores(const float* q, const float* weights, int64_t heads, int64_t width, const float* keys, float* to) {
    for (int64_t h = 0; h < heads; h += INDEX_HEADS)
        with_count<INDEX_HEADS>(static_cast<int>(std::min<int64_t>(INDEX_HEADS, heads - h)), [&](auto block) __attribute__((always_inline)) {
            add_heads<decltype(block)::value, P>(q + h * width, width, keys, weights + h, h == 0, to);
        });
}

// Scores of tokens for `count` keys, key(i) the i-th's channels. q [tokens, heads, width], weights [tokens, heads]
// -> to[token * stride + i], written up to a multiple of INDEX_KEYS.
template <class Key>
inline void index_scores(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width, Key key, int64_t count,
                         float* to, int64_t stride) {
    float* panels = scratch(Scratch::panel, width * INDEX_KEYS);
    auto ask = [&](int64_t from) {
        for (int64_t i = from; i < std::min(count, from + INDEX_KEYS); ++i)
            for (int64_t k = 0; k < width; k += LANES) __builtin_prefetch(key(i) + k);
    };
    ask(0);
    for (int64_t i = 0; i < count; i += INDEX_KEYS) {
        ask(i + INDEX_KEYS);
        const bool whole = i + LANES < count;  // more than one panel
        for (int64_t p = 0; p < (whole ? INDEX_PANELS : 1); ++p) {
            const float* from[LANES];
            const int64_t at = i + p * LANES, keys = std::min<int64_t>(LANES, count - at);
            for (int64_t j = 0; j < keys; ++j) from[j] = key(at + j);
            pack_rows(from, static_cast<int>(keys), width, panels + p * width * LANES);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const float *query = q + t * heads * width, *weight = weights + t * heads;
            float* place = to + t * stride + i;
            whole ? token_scores<INDEX_PANELS>(query, weight, heads, width, panels, place)
                  : token_scores<1>(query, weight, heads, width, panels, place);
        }
    }
}

// The k best entries of each of some neighbouring tokens of a sequence -> chosen [tokens, k], for those that see more.
struct Choice {
    const float *q, *weights;  // [tokens, heads, width], [tokens, heads]
    int64_t heads, width, k;
    Entries keys;
    KeptKeys* kept;  // of the keys' rows

    void all(int64_t tokens, const int64_t* seen, int32_t* chosen) const {
        thread_local std::vector<Largest> best;
        for (int64_t t0 = 0; t0 < tokens; t0 += ATTENTION_TOKENS) {
            const int64_t count = std::min(ATTENTION_TOKENS, tokens - t0);
            if (seen[t0 + count - 1] <= k) continue;
            float* scores = scratch(Scratch::index_scores, count * KEY_CHUNK);
            start(best, count);
            for (int64_t e = 0; e < seen[t0 + count - 1]; e += KEY_CHUNK) {
                const int64_t some = std::min(KEY_CHUNK, seen[t0 + count - 1] - e);
                index_scores(q + t0 * heads * width, weights + t0 * heads, count, heads, width, [&](int64_t i) { return keys[e + i]; },
                             some, scores, KEY_CHUNK);
                for (int64_t t = 0; t < count; ++t)
                    if (seen[t0 + t] > e)
                        best[static_cast<size_t>(t)].take(scores + t * KEY_CHUNK, std::min(some, seen[t0 + t] - e), e);
            }
            for (int64_t t = 0; t < count; ++t)
                if (seen[t0 + t] > k) best[static_cast<size_t>(t)].finish(chosen + (t0 + t) * k);
        }
    }

#if defined(DSV4_ISA_AVX512_VNNI)
    template <class Rounding, class Keys>
    void filtered(int64_t tokens, const int64_t* seen, const Keys& rounded, int32_t* chosen) const {
        thread_local std::vector<Largest> near;
        if (seen[tokens - 1] <= k) return;
        if (near.size() < static_cast<size_t>(tokens)) near.resize(static_cast<size_t>(tokens));
        if (!find<Rounding>(tokens, seen, rounded, 0, near.data())) return all(tokens, seen, chosen);
        for (int64_t t = 0; t < tokens; ++t)
            if (seen[t] > k) decide(t, near[static_cast<size_t>(t)], chosen + t * k);
    }

    // What may be among the best of entries from `from` on, for each token. False where chains have to say it.
    template <class Rounding, class Keys>
    bool find(int64_t tokens, const int64_t* seen, const Keys& rounded, int64_t from, Largest* near) const {
        for (int64_t t = 0; t < tokens; ++t) {
            const float error = index_error<Rounding>(q + t * heads * width, weights + t * heads, heads, width, rounded);
            if (!(error < INFINITY)) return false;
            near[t].begin(k, 2.0f * error);
        }
        return filter_entries<Rounding>(q, weights, tokens, heads, width, rounded, from, seen, k, near);
    }

    // Token t's choice from what `find` has found.
    void decide(int64_t t, Largest& near, int32_t* chosen) const {
        thread_local std::vector<int32_t> close;
        thread_local Largest best;
        const int64_t certain = near.finish(chosen, close), count = static_cast<int64_t>(close.size());
        float* scores = scratch(Scratch::index_scores, count + INDEX_KEYS);
        index_scores(q + t * heads * width, weights + t * heads, 1, heads, width,
                     [&](int64_t i) { return keys[close[static_cast<size_t>(i)]]; }, count, scores, 0);
        best.begin(k - certain);
        for (int64_t i = 0; i < count; ++i) best.add(scores[i], close[static_cast<size_t>(i)]);
        std::sort(chosen, best.finish_unsorted(chosen + certain));
    }
#endif

   private:
    void start(std::vector<Largest>& of, int64_t tokens) const {
        if (of.size() < static_cast<size_t>(tokens)) of.resize(static_cast<size_t>(tokens));
        for (int64_t t = 0; t < tokens; ++t) of[static_cast<size_t>(t)].begin(k);
    }
};

// A segment whose tokens choose, into chosen [count, k].
struct Chooser {
    Segment s;
    Choice choice;
    int32_t* chosen;

    int64_t seen(int64_t t) const { return (s.start + t + 1) / 4; }  // entries, by token t
    int64_t entries() const { return seen(s.count - 1); }
};

// Segments of few tokens: scores key chunk by key chunk on all threads, then the choices.
inline void choose_of_few(const std::vector<Chooser>& list, Buffers& buffers) {
    struct Task {
        const Chooser* of;
        float* scores;
        int64_t stride, at;
    };
    std::vector<Task> keys, tokens;
    for (const Chooser& one : list) {
        const int64_t most = one.entries(), stride = (most + INDEX_KEYS - 1) / INDEX_KEYS * INDEX_KEYS;
        float* scores = buffers.get(one.s.count * stride);
        for (int64_t e = 0; e < most; e += KEY_CHUNK) keys.push_back({&one, scores, stride, e});
        for (int64_t i = 0; i < one.s.count; ++i) tokens.push_back({&one, scores, stride, i});
    }
    parallel(static_cast<int64_t>(keys.size()), [&](int64_t number, int) {
        const Task& task = keys[static_cast<size_t>(number)];
        const Choice& c = task.of->choice;
        index_scores(c.q, c.weights, task.of->s.count, c.heads, c.width, [&](int64_t i) { return c.keys[task.at + i]; },
                     std::min(KEY_CHUNK, task.of->entries() - task.at), task.scores + task.at, task.stride);
    });
    parallel(static_cast<int64_t>(tokens.size()), [&](int64_t number, int) {
        const Task& task = tokens[static_cast<size_t>(number)];
        const int64_t seen = task.of->seen(task.at), k = task.of->choice.k;
        if (seen > k) top_k(task.scores + task.at * task.stride, seen, k, task.of->chosen + task.at * k);
    });
}

// f(choice, tokens, seen, chosen) for the tokens of a segment, block by block, each on one thread.
template <class F>
inline void each_block(const Chooser& of, F&& f) {
    const Choice& all = of.choice;
    const int64_t count = of.s.count, fair = (count + 2 * thread_count() - 1) / (2 * thread_count());
    const int64_t block = std::clamp<int64_t>(fair, ATTENTION_TOKENS, INDEX_TOKENS), blocks = (count + block - 1) / block;
    parallel(blocks, [&](int64_t task, int) {
        const int64_t i = (blocks - 1 - task) * block, some = std::min(block, count - i);  // the longest first
        int64_t seen[INDEX_TOKENS];
        for (int64_t j = 0; j < some; ++j) seen[j] = of.seen(i + j);
        const Choice mine{all.q + i * all.heads * all.width, all.weights + i * all.heads, all.heads, all.width, all.k, all.keys, all.kept};
        f(mine, some, seen, of.chosen + i * all.k);
    });
}

#if defined(DSV4_ISA_AVX512_VNNI)
template <class Rounding, class Keys>
inline void choose_filtered(const Chooser& of) {
    thread_local Keys memory;
    Keys& rounded = memory;  // this thread's, for all
    rounded.take(of.choice.keys, of.choice.kept, of.entries());
    each_block(of, [&](const Choice& mine, int64_t tokens, const int64_t* seen, int32_t* chosen) {
        mine.filtered<Rounding>(tokens, seen, rounded, chosen);
    });
}

// Segments of few tokens: candidates part by part of their keys on all threads, then the choices -> the segments left to chains.
inline std::vector<Chooser> choose_of_few_filtered(const std::vector<Chooser>& list) {
    constexpr int64_t LEAST = 2048;  // keys of a part
    struct Part {
        size_t of = 0;
        int64_t from = 0, to = 0;
        std::vector<Largest> near;  // of each token
    };
    struct Token {
        size_t of, first, stop;  // parts
        int64_t t;
    };
    thread_local std::vector<RoundedKeys> rounded_memory;
    thread_local std::vector<Part> part_memory;
    if (rounded_memory.size() < list.size()) rounded_memory.resize(list.size());
    std::vector<Token> tokens;
    size_t count = 0;
    const int64_t most = (2 * thread_count() - 1) / std::max<int64_t>(1, static_cast<int64_t>(list.size())) + 1;
    for (size_t i = 0; i < list.size(); ++i) {
        const Chooser& one = list[i];
        const int64_t entries = one.entries(), fair = std::clamp<int64_t>(entries / LEAST, 1, most);
        const int64_t size = (entries + fair * PAIR - 1) / (fair * PAIR) * PAIR;
        rounded_memory[i].take(one.choice.keys, one.choice.kept, entries);
        const size_t first = count;
        for (int64_t e = 0; e < entries; e += size, ++count) {
            if (count == part_memory.size()) part_memory.emplace_back();
            Part& part = part_memory[count];
            part.of = i, part.from = e, part.to = std::min(entries, e + size);
            if (part.near.size() < static_cast<size_t>(one.s.count)) part.near.resize(static_cast<size_t>(one.s.count));
        }
        for (int64_t t = 0; t < one.s.count; ++t) tokens.push_back({i, first, count, t});
    }
    std::vector<char> known(count);  // not bits: threads write to neighbours
    Part* const parts = part_memory.data();  // this thread's, for all
    const RoundedKeys* const rounded = rounded_memory.data();
    parallel(static_cast<int64_t>(count), [&](int64_t number, int) {
        Part& part = parts[number];
        const Chooser& one = list[part.of];
        int64_t seen[ATTENTION_TOKENS];
        for (int64_t t = 0; t < one.s.count; ++t) seen[t] = std::min(part.to, one.seen(t));
        known[static_cast<size_t>(number)] =
            one.choice.find<WholeNumbers>(one.s.count, seen, rounded[part.of], part.from, part.near.data());
        for (int64_t t = 0; t < one.s.count; ++t) part.near[static_cast<size_t>(t)].settle();
    });
    std::vector<char> left(list.size());
    for (size_t i = 0; i < count; ++i)
        if (!known[i]) left[parts[i].of] = 1;
    parallel(static_cast<int64_t>(tokens.size()), [&](int64_t number, int) {
        const Token& token = tokens[static_cast<size_t>(number)];
        const Chooser& one = list[token.of];
        if (left[token.of] || one.seen(token.t) <= one.choice.k) return;
        Largest& near = parts[token.first].near[static_cast<size_t>(token.t)];
        for (size_t i = token.first + 1; i < token.stop; ++i) near.add(parts[i].near[static_cast<size_t>(token.t)]);
        one.choice.decide(token.t, near, one.chosen + token.t * one.choice.k);
    });
    std::vector<Chooser> rest;
    for (size_t i = 0; i < list.size(); ++i)
        if (left[i]) rest.push_back(list[i]);
    return rest;
}
#endif

inline void choose_of_many(const Chooser& of) {
#if defined(DSV4_ISA_AMX)
    // The heads' errors add up, their scores grow like the root of their number: of many heads BF16 says too little.
    constexpr int64_t HEADS_FOR_BF16 = 16;
    if (of.choice.heads <= HEADS_FOR_BF16) return choose_filtered<Bf16Tiles, TurnedKeys<Bf16Tiles>>(of);
#endif
#if defined(DSV4_ISA_AVX512_VNNI)
    choose_filtered<WholeNumbers, RoundedKeys>(of);
#else
    each_block(of, [](const Choice& mine, int64_t tokens, const int64_t* seen, int32_t* chosen) {
        mine.all(tokens, seen, chosen);
    });
#endif
}

// chosen [count, k] of each for its tokens that see more than k entries; few tokens' scores take memory of the buffers.
inline void choose(const std::vector<Chooser>& list, Buffers& buffers) {
    std::vector<Chooser> few;
    for (const Chooser& one : list) {
        if (one.entries() <= one.choice.k) continue;
        one.s.count < ATTENTION_TOKENS ? few.push_back(one) : choose_of_many(one);
    }
#if defined(DSV4_ISA_AVX512_VNNI)
    few = choose_of_few_filtered(few);
#endif
    choose_of_few(few, buffers);
}

// Entries that each token of the tile reads, [n, index_topk]; null where no token sees more than it keeps.
inline const int32_t* choose_entries(Tile& t, const Layer& layer, const LayerCache& cache, float* latent, const float* head_weights,
                                     std::vector<int32_t>& chosen) {
    const Config& c = t.model.config;
    int64_t heads = c.index_n_heads, width = c.index_head_dim, k = c.index_topk, pairs = c.qk_rope_head_dim / 2;
    auto chooses = [&](const Segment& s) { return (s.start + s.count) / 4 > k; };
    if (std::none_of(t.segments.begin(), t.segments.end(), chooses)) return nullptr;
    chosen.resize(static_cast<size_t>(t.n * k));
    float* q = t.buffers.get(t.n * heads * width);
    Product project{{latent, c.q_lora_rank}, &layer.index_wq_b, {q, heads * width}};
    products(&project, 1, t.n);
    each_row(t.n, [&](int64_t row) {
        for (int64_t h = 0; h < heads; ++h) {
            float* x = q + (row * heads + h) * width;
            rotate(x, width, t.cos[1].data() + row * pairs, t.sin[1].data() + row * pairs, pairs, 1.0f);
            if (!c.quantize) continue;
            hadamard(x, width);
            fake_quant_fp4(x, width, 32);
        }
    });
    std::vector<Chooser> list;
    for (const Segment& s : t.segments) {
        Entries keys(cache.index.entries, t.cache, s.slot, 4, width);
        const Choice choice{q + s.first * heads * width, head_weights + s.first * heads, heads, width, k, keys, cache.index.kept};
        list.push_back({s, choice, chosen.data() + s.first * k});
    }
    choose(list, t.buffers);
    return chosen.data();
}

}  // namespace dsv4::DSV4_ISA
