// Samples one token from a row of logits.
#pragma once

#include <algorithm>
#include <vector>

#include "base/top_k.h"

namespace dsv4::DSV4_ISA {

// The first allowed token, by id, at which the running sum of the weights exceeds u times their total; u in [0, 1).
// Weights are e^((logit - highest) / temperature) in fp32, sums in double; of equal logits the lower id counts as
// likelier.
inline int64_t sample_row(const float* logits, int64_t vocab, const Sampling& s, double u) {
    thread_local std::vector<float> weights;
    thread_local std::vector<int32_t> allowed;
    weights.resize(static_cast<size_t>(vocab + LANES));
    V top = set1(-INFINITY);
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int left = static_cast<int>(std::min<int64_t>(LANES, vocab - i));
        V x = load_n(logits + i, left);
        if (left < LANES) {
            alignas(64) float lanes[LANES];
            store(lanes, x);
            std::fill(lanes + left, lanes + LANES, -INFINITY);
            x = load(lanes);
        }
        top = max(x, top);
    }
    const V highest_logit = set1(highest(top)), temperature = set1(std::max(static_cast<float>(s.temperature), 1e-37f));
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int left = static_cast<int>(std::min<int64_t>(LANES, vocab - i));
        store(weights.data() + i, exp(div(sub(load_n(logits + i, left), highest_logit), temperature)));
    }
    auto weight = [&](int64_t id) { return static_cast<double>(weights[static_cast<size_t>(id)]); };
    // Draws one of `count` ids; id(i) is the i-th, in ascending order.
    auto draw = [&](int64_t count, auto id) {
        double sum = 0.0, past = 0.0;
        for (int64_t i = 0; i < count; ++i) sum += weight(id(i));
        int64_t last = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (weight(id(i)) == 0.0) continue;
            last = id(i);
            past += weight(last);
            if (past > u * sum) break;
        }
        return last;
    };
    const bool all = s.top_k == 0 || s.top_k >= vocab;
    if (all && s.top_p >= 1.0 && s.min_p <= 0.0) return draw(vocab, [](int64_t i) { return i; });

    // The likeliest 64 tokens, then 8 times as many, ...: a few of a hundred thousand often reach top_p.
    const int64_t most = all ? vocab : s.top_k;
    double total = 0.0;
    if (all)
        for (int64_t id = 0; id < vocab; ++id) total += weight(id);
    for (int64_t some = all ? std::min<int64_t>(64, vocab) : most;; some = std::min(most, 8 * some)) {
        allowed.resize(static_cast<size_t>(some));
        top_k(logits, vocab, some, allowed.data());
        std::stable_sort(allowed.begin(), allowed.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
        if (!all)
            for (int32_t id : allowed) total += weight(id);
        double before = 0.0;
        int64_t count = 0;
        while (count < some && (s.top_p >= 1.0 || before < s.top_p * total) &&
               weight(allowed[static_cast<size_t>(count)]) >= s.min_p)
            before += weight(allowed[static_cast<size_t>(count++)]);
        if (count == some && some < most) continue;
        allowed.resize(static_cast<size_t>(std::max<int64_t>(count, 1)));
        break;
    }
    std::sort(allowed.begin(), allowed.end());
    return draw(static_cast<int64_t>(allowed.size()),
                [&](int64_t i) { return static_cast<int64_t>(allowed[static_cast<size_t>(i)]); });
}

}  // namespace dsv4::DSV4_ISA
