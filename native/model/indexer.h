// The indexer: scores the compressed entries and selects those that each token attends to.
//
// Order of sums: an exact score is a chain over the heads of weight * relu(dot), and each dot is a chain over the
// channels; both ascend and start from zero.
#pragma once

#include <vector>

#include "base/top_k.h"
#include "gemm/gemm.h"
#include "model/index_filter.h"
#include "model/ubatch.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t INDEX_CHUNK = 512;  // index keys per task when few tokens score many keys
constexpr int64_t INDEX_TOKENS = 64;  // neighbouring tokens per task when many tokens do
#if defined(DSV4_ISA_AVX512)
constexpr int INDEX_HEADS = 8, INDEX_PANELS = 2;
#else
constexpr int INDEX_HEADS = 4, INDEX_PANELS = 1;
#endif
constexpr int64_t INDEX_KEYS = INDEX_PANELS * LANES;

// Adds R heads of a token to its scores: to[key] += weight_r * relu(q_r . key), heads in order; `first` starts from
// zero. index_keys [P][width][16].
template <int R, int P>
[[gnu::noinline]] inline void add_heads(const float* q, int64_t width, const float* index_keys, const float* weights,
                                        bool first, float* to) {
    constexpr int UNROLL = 4;
    const int64_t whole = width / UNROLL * UNROLL;
    V acc[R][P];
    clear(acc);
    StridedRows<R> rows(q, width);
    multiply_panels<UNROLL>(acc, rows, 1, whole, index_keys, width * LANES);
    multiply_panels<1>(acc, rows, 1, width - whole, index_keys + whole * LANES, width * LANES);
    for (int p = 0; p < P; ++p) {
        V sum = first ? zero() : load(to + p * LANES);
        for (int r = 0; r < R; ++r) sum = fma(set1(weights[r]), max(acc[r][p], zero()), sum);
        store(to + p * LANES, sum);
    }
}

template <int P>
inline void token_scores(const float* q, const float* weights, int64_t heads, int64_t width, const float* index_keys,
                         float* to) {
    for (int64_t h = 0; h < heads; h += INDEX_HEADS)
        with_count<INDEX_HEADS>(static_cast<int>(std::min<int64_t>(INDEX_HEADS, heads - h)),
                                [&](auto block) __attribute__((always_inline)) {
                                    add_heads<decltype(block)::value, P>(q + h * width, width, index_keys, weights + h,
                                                                         h == 0, to);
                                });
}

// to[token * stride + i] = exact score of index key number(i), i in [0, count), written up to a multiple of INDEX_KEYS.
// q [tokens, heads, width], weights [tokens, heads].
template <class Number>
inline void exact_scores(const float* q, const float* weights, int64_t tokens, int64_t heads, const Entries& index_keys,
                         Number number, int64_t count, float* to, int64_t stride) {
    constexpr int64_t LINE = 64;  // bytes
    const int64_t width = index_keys.width;
    float* panels = scratch(Scratch::panel, width * INDEX_KEYS);
    float* decoded = scratch(Scratch::index_keys, width * LANES);
    auto prefetch = [&](int64_t from) {
        for (int64_t i = from; i < std::min(count, from + INDEX_KEYS); ++i)
            for (int64_t k = 0; k < index_keys.pool.format.bytes; k += LINE)
                __builtin_prefetch(index_keys.stored(number(i)) + k);
    };
    prefetch(0);
    for (int64_t i = 0; i < count; i += INDEX_KEYS) {
        prefetch(i + INDEX_KEYS);
        const bool several = i + LANES < count;  // panels
        for (int64_t p = 0; p < (several ? INDEX_PANELS : 1); ++p) {
            const float* from[LANES];
            const int64_t at = i + p * LANES, rows = std::min<int64_t>(LANES, count - at);
            for (int64_t j = 0; j < rows; ++j) from[j] = index_keys.read(number(at + j), decoded + j * width);
            pack_rows(from, static_cast<int>(rows), width, panels + p * width * LANES);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const float *query = q + t * heads * width, *weight = weights + t * heads;
            float* place = to + t * stride + i;
            several ? token_scores<INDEX_PANELS>(query, weight, heads, width, panels, place)
                    : token_scores<1>(query, weight, heads, width, panels, place);
        }
    }
}

// Selection of the k best entries by each of some neighbouring tokens of a sequence, into selected [tokens, k].
// visible[t] ascends; tokens that see at most k entries select nothing.
struct EntrySelection {
    const float *q, *weights;  // [tokens, heads, width], [tokens, heads]
    int64_t heads, width, k;
    Entries index_keys;
    IndexKeyCache* index_key_cache;  // quantized copies of the rows of index_keys

    EntrySelection from_token(int64_t t) const {
        return {q + t * heads * width, weights + t * heads, heads, width, k, index_keys, index_key_cache};
    }

    void select_exact(int64_t tokens, const int64_t* visible, int32_t* selected) const {
        thread_local std::vector<TopK> best;
        for (int64_t t0 = 0; t0 < tokens; t0 += ATTENTION_TOKENS) {
            const int64_t count = std::min(ATTENTION_TOKENS, tokens - t0), most = visible[t0 + count - 1];
            if (most <= k) continue;
            float* scores = scratch(Scratch::index_scores, count * INDEX_CHUNK);
            if (best.size() < static_cast<size_t>(count)) best.resize(static_cast<size_t>(count));
            for (int64_t t = 0; t < count; ++t) best[static_cast<size_t>(t)].reset(k);
            for (int64_t e = 0; e < most; e += INDEX_CHUNK) {
                const int64_t some = std::min(INDEX_CHUNK, most - e);
                exact_scores(
                    q + t0 * heads * width, weights + t0 * heads, count, heads, index_keys,
                    [&](int64_t i) { return e + i; }, some, scores, INDEX_CHUNK);
                for (int64_t t = 0; t < count; ++t)
                    if (visible[t0 + t] > e)
                        best[static_cast<size_t>(t)].add_scores(scores + t * INDEX_CHUNK,
                                                                std::min(some, visible[t0 + t] - e), e);
            }
            for (int64_t t = 0; t < count; ++t)
                if (visible[t0 + t] > k) best[static_cast<size_t>(t)].finish(selected + (t0 + t) * k);
        }
    }

#if defined(DSV4_ISA_AVX512_VNNI)
    template <class Quantizer, class IndexKeys>
    void select_filtered(int64_t tokens, const int64_t* visible, const IndexKeys& quantized, int32_t* selected) const {
        thread_local std::vector<TopK> candidates;
        if (visible[tokens - 1] <= k) return;
        if (candidates.size() < static_cast<size_t>(tokens)) candidates.resize(static_cast<size_t>(tokens));
        if (!filter<Quantizer>(tokens, visible, quantized, 0, candidates.data()))
            return select_exact(tokens, visible, selected);
        for (int64_t t = 0; t < tokens; ++t)
            if (visible[t] > k) select_from(candidates[static_cast<size_t>(t)], t, selected + t * k);
    }

    // Finds each token's candidates among its entries from `from` on. False if all exact scores are needed.
    template <class Quantizer, class IndexKeys>
    bool filter(int64_t tokens, const int64_t* visible, const IndexKeys& quantized, int64_t from,
                TopK* candidates) const {
        for (int64_t t = 0; t < tokens; ++t) {
            const float error =
                index_error<Quantizer>(q + t * heads * width, weights + t * heads, heads, width, quantized);
            if (!(error < INFINITY)) return false;
            candidates[t].reset(k, 2.0f * error);
        }
        return find_candidates<Quantizer>(q, weights, tokens, heads, width, quantized, from, visible, k, candidates);
    }

    // Selects token t's entries from its candidates.
    void select_from(TopK& candidates, int64_t t, int32_t* selected) const {
        thread_local std::vector<int32_t> undecided;
        thread_local TopK best;
        const int64_t decided = candidates.finish_with_slack(selected, undecided),
                      count = static_cast<int64_t>(undecided.size());
        float* scores = scratch(Scratch::index_scores, count + INDEX_KEYS);
        exact_scores(
            q + t * heads * width, weights + t * heads, 1, heads, index_keys,
            [&](int64_t i) { return undecided[static_cast<size_t>(i)]; }, count, scores, 0);
        best.reset(k - decided);
        for (int64_t i = 0; i < count; ++i) best.add(scores[i], undecided[static_cast<size_t>(i)]);
        std::sort(selected, best.finish_unsorted(selected + decided));
    }
#endif
};

// The selection of one segment's tokens, into selected [count, k].
struct SegmentSelection {
    Segment s;
    EntrySelection selection;
    int32_t* selected;

    int64_t visible(int64_t t) const { return (s.start + t + 1) / CSA.ratio; }  // entries that token t sees
    int64_t entries() const { return visible(s.count - 1); }
};

// Segments of few tokens: all threads compute exact scores, a chunk of index keys per task; then each token selects.
inline void select_few_exact(const std::vector<SegmentSelection>& list, Buffers& buffers) {
    struct Task {
        const SegmentSelection* segment;
        float* scores;
        int64_t stride, at;
    };
    std::vector<Task> key_tasks, token_tasks;
    for (const SegmentSelection& segment : list) {
        const int64_t most = segment.entries(), stride = (most + INDEX_KEYS - 1) / INDEX_KEYS * INDEX_KEYS;
        float* scores = buffers.get(segment.s.count * stride);
        for (int64_t e = 0; e < most; e += INDEX_CHUNK) key_tasks.push_back({&segment, scores, stride, e});
        for (int64_t t = 0; t < segment.s.count; ++t) token_tasks.push_back({&segment, scores, stride, t});
    }
    parallel(static_cast<int64_t>(key_tasks.size()), [&](int64_t number, int) {
        const Task& task = key_tasks[static_cast<size_t>(number)];
        const EntrySelection& c = task.segment->selection;
        exact_scores(
            c.q, c.weights, task.segment->s.count, c.heads, c.index_keys, [&](int64_t i) { return task.at + i; },
            std::min(INDEX_CHUNK, task.segment->entries() - task.at), task.scores + task.at, task.stride);
    });
    parallel(static_cast<int64_t>(token_tasks.size()), [&](int64_t number, int) {
        const Task& task = token_tasks[static_cast<size_t>(number)];
        const int64_t visible = task.segment->visible(task.at), k = task.segment->selection.k;
        if (visible > k) top_k(task.scores + task.at * task.stride, visible, k, task.segment->selected + task.at * k);
    });
}

// Calls f(selection, tokens, visible, selected) for each block of tokens of a segment; a block runs on one thread.
template <class F>
inline void for_each_block(const SegmentSelection& segment, F&& f) {
    const int64_t count = segment.s.count, fair = (count + 2 * thread_count() - 1) / (2 * thread_count());
    const int64_t block = std::clamp<int64_t>(fair, ATTENTION_TOKENS, INDEX_TOKENS),
                  blocks = (count + block - 1) / block;
    parallel(blocks, [&](int64_t task, int) {
        const int64_t first = (blocks - 1 - task) * block,
                      tokens = std::min(block, count - first);  // blocks with most entries first
        int64_t visible[INDEX_TOKENS];
        for (int64_t t = 0; t < tokens; ++t) visible[t] = segment.visible(first + t);
        f(segment.selection.from_token(first), tokens, visible, segment.selected + first * segment.selection.k);
    });
}

#if defined(DSV4_ISA_AVX512_VNNI)
template <class Quantizer, class IndexKeys>
inline void select_many_filtered(const SegmentSelection& segment) {
    thread_local IndexKeys memory;
    IndexKeys& quantized = memory;  // the calling thread's, read by all threads
    quantized.quantize(segment.selection.index_keys, segment.selection.index_key_cache, segment.entries());
    for_each_block(segment,
                   [&](const EntrySelection& block, int64_t tokens, const int64_t* visible, int32_t* selected) {
                       block.select_filtered<Quantizer>(tokens, visible, quantized, selected);
                   });
}

// Segments of few tokens: each task finds candidates in one range of index keys; then each token merges its ranges.
template <class Quantizer, class IndexKeys>
class FewTokensFilter {
   public:
    explicit FewTokensFilter(const std::vector<SegmentSelection>& list) : list_(list) {
        const int64_t segments = static_cast<int64_t>(list.size());
        const int64_t most = (2 * thread_count() - 1) / std::max<int64_t>(1, segments) + 1;
        if (index_keys_.size() < list.size()) index_keys_.resize(list.size());
        for (size_t i = 0; i < list.size(); ++i) add_segment(i, most);
    }

    // Returns the segments left to exact scores.
    std::vector<SegmentSelection> select() {
        std::vector<char> filtered(count_);    // not vector<bool>: threads write neighbouring elements
        Range* const ranges = ranges_.data();  // the calling thread's, used by all threads
        const IndexKeys* const index_keys = index_keys_.data();
        parallel(static_cast<int64_t>(count_), [&](int64_t number, int) {
            Range& range = ranges[number];
            filtered[static_cast<size_t>(number)] = filter_range(range, index_keys[range.segment]);
        });
        std::vector<char> left(list_.size());
        for (size_t i = 0; i < count_; ++i)
            if (!filtered[i]) left[ranges[i].segment] = 1;
        parallel(static_cast<int64_t>(tokens_.size()), [&](int64_t number, int) {
            const Token& token = tokens_[static_cast<size_t>(number)];
            if (!left[token.segment]) select_token(token, ranges);
        });
        std::vector<SegmentSelection> rest;
        for (size_t i = 0; i < list_.size(); ++i)
            if (left[i]) rest.push_back(list_[i]);
        return rest;
    }

   private:
    struct Range {
        size_t segment = 0;
        int64_t first = 0, stop = 0;   // index keys [first, stop)
        std::vector<TopK> candidates;  // per token
    };
    struct Token {
        size_t segment, first_range, stop_range;
        int64_t t;
    };

    void add_segment(size_t i, int64_t most_ranges) {
        constexpr int64_t MIN_RANGE = 2048;  // index keys
        const SegmentSelection& segment = list_[i];
        const int64_t entries = segment.entries(), ranges = std::clamp<int64_t>(entries / MIN_RANGE, 1, most_ranges);
        const int64_t size = (entries + ranges * PAIR - 1) / (ranges * PAIR) * PAIR;
        const size_t tokens = static_cast<size_t>(segment.s.count), first = count_;
        index_keys_[i].quantize(segment.selection.index_keys, segment.selection.index_key_cache, entries);
        for (int64_t e = 0; e < entries; e += size, ++count_) {
            if (count_ == ranges_.size()) ranges_.emplace_back();
            Range& range = ranges_[count_];
            range.segment = i;
            range.first = e;
            range.stop = std::min(entries, e + size);
            if (range.candidates.size() < tokens) range.candidates.resize(tokens);
        }
        for (int64_t t = 0; t < segment.s.count; ++t) tokens_.push_back({i, first, count_, t});
    }

    bool filter_range(Range& range, const IndexKeys& index_keys) const {
        const SegmentSelection& segment = list_[range.segment];
        int64_t visible[ATTENTION_TOKENS];
        for (int64_t t = 0; t < segment.s.count; ++t) visible[t] = std::min(range.stop, segment.visible(t));
        const bool filtered = segment.selection.template filter<Quantizer>(segment.s.count, visible, index_keys,
                                                                           range.first, range.candidates.data());
        for (int64_t t = 0; t < segment.s.count; ++t) range.candidates[static_cast<size_t>(t)].compact();
        return filtered;
    }

    void select_token(const Token& token, Range* ranges) const {
        const SegmentSelection& segment = list_[token.segment];
        const int64_t k = segment.selection.k;
        if (segment.visible(token.t) <= k) return;
        TopK& candidates = ranges[token.first_range].candidates[static_cast<size_t>(token.t)];
        for (size_t i = token.first_range + 1; i < token.stop_range; ++i)
            candidates.merge(ranges[i].candidates[static_cast<size_t>(token.t)]);
        segment.selection.select_from(candidates, token.t, segment.selected + token.t * k);
    }

    static inline thread_local std::vector<IndexKeys> index_keys_;
    static inline thread_local std::vector<Range> ranges_;
    const std::vector<SegmentSelection>& list_;
    std::vector<Token> tokens_;
    size_t count_ = 0;  // ranges in use
};
#endif

inline void select_many(const SegmentSelection& segment) {
#if defined(DSV4_ISA_AMX)
    // The error bound grows with the number of heads, the scores only with its root: for many heads BF16 is too coarse.
    constexpr int64_t MAX_BF16_HEADS = 16;
    if (segment.selection.heads <= MAX_BF16_HEADS)
        return select_many_filtered<Bf16Quantizer, CallIndexKeys<Bf16Quantizer>>(segment);
#endif
#if defined(DSV4_ISA_AVX512_VNNI)
    if (segment.selection.index_keys.pool.format.kind == RowKind::fp4)
        return select_many_filtered<Fp4Quantizer, Fp4IndexKeys>(segment);
    select_many_filtered<Int16Quantizer, CachedIndexKeys>(segment);
#else
    for_each_block(segment, [](const EntrySelection& block, int64_t tokens, const int64_t* visible, int32_t* selected) {
        block.select_exact(tokens, visible, selected);
    });
#endif
}

// Fills selected [count, k] of each segment for its tokens that see more than k entries. Exact scores of segments with
// few tokens use memory of `buffers`.
inline void select_entries(const std::vector<SegmentSelection>& list, Buffers& buffers) {
    std::vector<SegmentSelection> few;
    for (const SegmentSelection& segment : list) {
        if (segment.s.count == 0 || segment.entries() <= segment.selection.k) continue;
        segment.s.count < ATTENTION_TOKENS ? few.push_back(segment) : select_many(segment);
    }
#if defined(DSV4_ISA_AVX512_VNNI)
    if (!few.empty() && few.front().selection.index_keys.pool.format.kind == RowKind::fp4)
        few = FewTokensFilter<Fp4Quantizer, Fp4IndexKeys>(few).select();
    else
        few = FewTokensFilter<Int16Quantizer, CachedIndexKeys>(few).select();
#endif
    select_few_exact(few, buffers);
}

// Selects the entries that each token of the ubatch attends to, [n, index_topk]; null if no token sees more than
// index_topk.
inline const int32_t* select_ubatch_entries(Ubatch& u, const Layer& layer, const LayerCache& cache, float* latent,
                                            const float* head_weights, std::vector<int32_t>& selected) {
    const Config& c = u.model.config;
    int64_t heads = c.index_n_heads, width = c.index_head_dim, k = c.index_topk, pairs = c.qk_rope_head_dim / 2;
    auto selects = [&](const Segment& s) { return (s.start + s.count) / CSA.ratio > k; };
    if (std::none_of(u.segments.begin(), u.segments.end(), selects)) return nullptr;
    selected.resize(static_cast<size_t>(u.n * k));
    float* q = u.buffers.get(u.n * heads * width);
    Product project{{latent, c.q_lora_rank}, &layer.index_wq_b, {q, heads * width}};
    products(&project, 1, u.n);
    for_each_row(u.n, [&](int64_t row) {
        for (int64_t h = 0; h < heads; ++h) {
            float* x = q + (row * heads + h) * width;
            rotate(x, width, u.cos[1].data() + row * pairs, u.sin[1].data() + row * pairs, pairs, 1.0f);
            if (!c.quantize) continue;
            hadamard(x, width);
            fake_quant_fp4(x, width, INDEX_KEY_BLOCK);
        }
    });
    std::vector<SegmentSelection> list;
    for (const Segment& s : u.segments) {
        const Entries index_keys(cache.index.entries, u.cache, s.slot, CSA.ratio);
        const EntrySelection selection{
            q + s.first * heads * width, head_weights + s.first * heads, heads, width, k, index_keys,
            cache.index.quantized};
        list.push_back({s, selection, selected.data() + s.first * k});
    }
    select_entries(list, u.buffers);
    return selected.data();
}

}  // namespace dsv4::DSV4_ISA
