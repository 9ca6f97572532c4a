// Top-k selection.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "base/rows.h"

namespace dsv4::DSV4_ISA {

// Maps fp32 to unsigned numbers of the same order; -0 == +0, NaN is the smallest.
inline uint32_t rank_of(float x) {
    if (!(x == x)) return 0;
    uint32_t bits = bits_of(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float of_rank(uint32_t rank) {
    return rank == 0 ? NAN : float_of(rank & 0x80000000u ? rank & 0x7FFFFFFFu : ~rank);
}

// The k largest of scores that arrive in pieces; ties go to the lower index, NaN sorts last. With a slack also all
// scores at most that much below the k-th.
//
// Scores not above the k-th so far are skipped, sixteen at a time. The others are appended to a list, which is pruned
// to the k largest, giving a new k-th, whenever it is full.
class TopK {
   public:
    void reset(int64_t k, float slack = 0.0f) {
        k_ = static_cast<size_t>(k);
        slack_ = slack;
        size_ = 0;
        limit_ = NAN;
        reserve(4 * k_ + 256);
    }

    // Adds the scores of indices first, first + 1, ..., which are above the indices of earlier calls.
    void add_scores(const float* scores, int64_t count, int64_t first) {
        for (int64_t i = 0; i < count; i += LANES) {
            const int left = static_cast<int>(std::min<int64_t>(LANES, count - i));
            add_lanes(load_n(scores + i, left), left, first + i);
        }
    }
    [[gnu::always_inline]] void add_lanes(V scores, int count, int64_t first) {
        uint32_t lanes = above(scores, set1(limit_)) & ((1u << count) - 1u);
        if (!lanes) return;
        alignas(64) float score[LANES];
        store(score, scores);
        for (; lanes; lanes &= lanes - 1) add(score[__builtin_ctz(lanes)], first + __builtin_ctz(lanes));
    }
    void add(float score, int64_t index) {
        ranked_[size_++] = static_cast<uint64_t>(rank_of(score)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index));
        if (size_ == capacity_) prune();
    }

    // Adds the scores that `other`, of the same k and slack, has kept.
    void merge(const TopK& other) {
        for (size_t i = 0; i < other.size_; ++i) {
            ranked_[size_++] = other.ranked_[i];
            if (size_ == capacity_) prune();
        }
    }
    // Drops scores that are not among the k largest so far, nor within the slack.
    void compact() {
        if (size_ > k_) prune();
    }

    int64_t size() const { return static_cast<int64_t>(size_); }

    // Writes the k indices, ascending. Without slack only.
    void finish(int32_t* to) { std::sort(to, finish_unsorted(to)); }
    int32_t* finish_unsorted(int32_t* to) {  // returns the end of the indices
        compact();
        for (size_t i = 0; i < size_; ++i) to[i] = index_of(ranked_[i]);
        return to + size_;
    }

    // With slack: writes the indices of scores more than the slack above the k-th to `to`, unsorted, the others to
    // `undecided`. Returns the number of indices in `to`.
    int64_t finish_with_slack(int32_t* to, std::vector<int32_t>& undecided) {
        undecided.clear();
        compact();
        const float limit = size_ > k_ ? of_rank(static_cast<uint32_t>(ranked_[k_ - 1] >> 32)) + slack_ : -INFINITY;
        int64_t decided = 0;
        for (size_t i = 0; i < size_; ++i) {
            const int32_t index = index_of(ranked_[i]);
            if (of_rank(static_cast<uint32_t>(ranked_[i] >> 32)) > limit)
                to[decided++] = index;
            else
                undecided.push_back(index);
        }
        return decided;
    }

   private:
    static int32_t index_of(uint64_t key) { return static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(key)); }

    void reserve(size_t capacity) {
        capacity_ = capacity;
        if (ranked_.size() < capacity_) ranked_.resize(capacity_);
    }
    void prune() {
        auto begin = ranked_.begin(), kth = begin + static_cast<int64_t>(k_), end = begin + static_cast<int64_t>(size_);
        std::nth_element(begin, kth - 1, end, std::greater<>());
        limit_ = of_rank(static_cast<uint32_t>(kth[-1] >> 32)) - slack_;
        if (slack_ > 0.0f) {
            auto within_slack = [&](uint64_t key) { return !(of_rank(static_cast<uint32_t>(key >> 32)) <= limit_); };
            size_ = static_cast<size_t>(std::partition(kth, end, within_slack) - begin);
            if (size_ * 2 > capacity_) reserve(4 * size_);
        } else {
            size_ = k_;
        }
    }

    std::vector<uint64_t> ranked_;  // upper half: rank of the score; lower half: complement of the index
    size_t k_ = 0, size_ = 0, capacity_ = 0;
    float slack_ = 0.0f, limit_ = NAN;
};

// Indices of the k largest of n scores, ascending; ties go to the lower index, NaN sorts last. k <= n.
inline void top_k(const float* scores, int64_t n, int64_t k, int32_t* to) {
    thread_local TopK best;
    if (k == 0) return;
    best.reset(k);
    best.add_scores(scores, n, 0);
    best.finish(to);
}

}  // namespace dsv4::DSV4_ISA
