// The router and the experts of a ubatch.
#pragma once

#include <algorithm>
#include <vector>

#include "base/rows.h"
#include "base/top_k.h"
#include "gemm/gemm.h"

namespace dsv4::DSV4_ISA {

// Routes one token by its router logits: expert index [k] and weights [k]. Hash layers look the experts up by token id,
// the others select the k best of score + bias, in ascending order. An expert that the hash table repeats counts each
// time in the normalizing sum, but its output once: later repeats have weight 0.
inline void route(const float* logits, const Layer& layer, const Config& c, int64_t token_id, std::vector<float>& work,
                  int32_t* index, float* weights) {
    int64_t experts = c.n_routed_experts, k = c.num_experts_per_tok;
    work.resize(static_cast<size_t>(2 * experts));
    float *scores = work.data(), *ranked = work.data() + experts;
    for (int64_t e = 0; e < experts; ++e) {
        float x = logits[e];
        scores[e] = std::sqrt(std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))));
    }
    if (layer.tid2eid) {
        for (int64_t i = 0; i < k; ++i) index[i] = static_cast<int32_t>(layer.tid2eid[token_id * k + i]);
    } else {
        for (int64_t e = 0; e < experts; ++e) ranked[e] = scores[e] + layer.bias[e];
        top_k(ranked, experts, k, index);
    }
    float total = 0.0f;
    for (int64_t i = 0; i < k; ++i) total += scores[index[i]];
    for (int64_t i = 0; i < k; ++i) {
        const bool repeat = layer.tid2eid && std::find(index, index + i, index[i]) != index + i;
        weights[i] = repeat ? 0.0f : scores[index[i]] / (total + 1e-20f) * static_cast<float>(c.routed_scaling_factor);
    }
}

// Runs the routed experts of n tokens x [n, d]: rows [n, k, d] get the weighted output of each selected expert. hidden
// is scratch [n * k, 2 * width]. `beside` is an independent product of n rows that shares the threads with the experts.
inline void run_experts(const Layer& layer, const Config& c, const float* x, int64_t n, const int32_t* index,
                        const float* weights, float* hidden, float* rows, const Product& beside) {
    int64_t k = c.num_experts_per_tok, d = c.hidden_size, width = c.moe_intermediate_size;
    auto expert_of = [&](int64_t slot) -> const Expert& { return layer.experts[static_cast<size_t>(index[slot])]; };
    auto finish = [&](int64_t slot) {
        float* gate = hidden + slot * 2 * width;
        swiglu(gate, gate + width, width, static_cast<float>(c.swiglu_limit), weights[slot]);
        if (c.quantize) fake_quant_fp8(gate, width, 128);
    };
    if (n == 1) {  // all selected experts at once; threads split the outputs
        std::vector<Product> list;
        for (int64_t slot = 0; slot < k; ++slot) {
            float* gate = hidden + slot * 2 * width;
            Rows from{const_cast<float*>(x), d};
            list.push_back({from, &expert_of(slot).w1, {gate, width}});
            list.push_back({from, &expert_of(slot).w3, {gate + width, width}});
        }
        products(list.data(), static_cast<int>(list.size()), 1);
        list.assign(1, beside);
        for (int64_t slot = 0; slot < k; ++slot) {
            finish(slot);
            list.push_back({{hidden + slot * 2 * width, 2 * width}, &expert_of(slot).w2, {rows + slot * d, d}});
        }
        products(list.data(), static_cast<int>(list.size()), 1);
        return;
    }
    products(&beside, 1, n);
    std::vector<std::vector<int64_t>> slots(layer.experts.size());
    for (int64_t slot = 0; slot < n * k; ++slot) slots[static_cast<size_t>(index[slot])].push_back(slot);
    std::vector<size_t> busy;
    for (size_t e = 0; e < slots.size(); ++e)
        if (!slots[e].empty()) busy.push_back(e);
    // Longest tasks first, so that the threads finish together.
    std::stable_sort(busy.begin(), busy.end(), [&](size_t a, size_t b) { return slots[a].size() > slots[b].size(); });
    parallel(static_cast<int64_t>(busy.size()), [&](int64_t task, int) {
        const auto& mine = slots[busy[static_cast<size_t>(task)]];
        const Expert& expert = layer.experts[busy[static_cast<size_t>(task)]];
        int64_t count = static_cast<int64_t>(mine.size());
        std::vector<const float*> from(mine.size());
        std::vector<float*> gate(mine.size()), up(mine.size()), to(mine.size());
        for (size_t i = 0; i < mine.size(); ++i) {
            from[i] = x + mine[i] / k * d;
            gate[i] = hidden + mine[i] * 2 * width;
            up[i] = gate[i] + width;
            to[i] = rows + mine[i] * d;
        }
        gemm(from.data(), count, expert.w1, 0, width, gate.data());
        gemm(from.data(), count, expert.w3, 0, width, up.data());
        for (int64_t slot : mine) finish(slot);
        for (size_t i = 0; i < mine.size(); ++i) from[i] = gate[i];
        gemm(from.data(), count, expert.w2, 0, d, to.data());
    });
}

}  // namespace dsv4::DSV4_ISA
