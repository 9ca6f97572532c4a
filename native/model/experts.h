// The router and the experts of a ubatch.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "base/expert_residency.h"
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

// Memory and inputs of the routed experts of n tokens: x [n, d], the experts that the router chose and their weights
// [n, k], scratch `hidden` [n * k, 2 * width]. Rows [n, k, d] get the weighted output of each chosen expert.
struct ExpertInputs {
    const Layer& layer;
    const Config& config;
    const float* x;
    int64_t n;
    const int32_t* index;
    const float* weights;
    float *hidden, *rows;

    float* gate(int64_t slot) const { return hidden + slot * 2 * config.moe_intermediate_size; }
    const Expert& expert_of(int64_t slot) const { return layer.experts[static_cast<size_t>(index[slot])]; }

    void finish(int64_t slot) const {
        const int64_t width = config.moe_intermediate_size;
        swiglu(gate(slot), gate(slot) + width, width, static_cast<float>(config.swiglu_limit), weights[slot]);
        round_input(config, gate(slot), width);
    }
};

// Runs some slots of a single token, all their experts at once; threads split the outputs. `beside`, unless null, is an
// independent product that shares the threads.
inline void run_slots(const ExpertInputs& in, const std::vector<int64_t>& slots, const Product* beside) {
    const int64_t d = in.config.hidden_size, width = in.config.moe_intermediate_size;
    std::vector<Product> list;
    const Rows from{const_cast<float*>(in.x), d};
    for (int64_t slot : slots) {
        list.push_back({from, &in.expert_of(slot).w1, {in.gate(slot), width}});
        list.push_back({from, &in.expert_of(slot).w3, {in.gate(slot) + width, width}});
    }
    products(list.data(), static_cast<int>(list.size()), 1);
    list.clear();
    if (beside) list.push_back(*beside);
    for (int64_t slot : slots) {
        in.finish(slot);
        list.push_back({{in.gate(slot), 2 * width}, &in.expert_of(slot).w2, {in.rows + slot * d, d}});
    }
    products(list.data(), static_cast<int>(list.size()), 1);
}

// Runs the experts of a single token, with a residency in the order in which they come into memory.
inline void run_token(const ExpertInputs& in, ExpertResidency* residency, int64_t layer, const Product& beside) {
    const int64_t k = in.config.num_experts_per_tok;
    std::vector<int64_t> slots(static_cast<size_t>(k));
    std::iota(slots.begin(), slots.end(), int64_t{0});
    if (!residency) return run_slots(in, slots, &beside);
    std::vector<int32_t> experts;
    for (int64_t slot : slots)
        if (std::find(experts.begin(), experts.end(), in.index[slot]) == experts.end())
            experts.push_back(in.index[slot]);
    ExpertClaim claim(*residency, layer, experts);
    products(&beside, 1, 1);
    while (!experts.empty()) {
        const std::vector<int32_t> ready = claim.take_ready(experts);
        slots.clear();
        for (int64_t slot = 0; slot < k; ++slot)
            if (std::find(ready.begin(), ready.end(), in.index[slot]) != ready.end()) slots.push_back(slot);
        run_slots(in, slots, nullptr);
        for (int32_t expert : ready) claim.done(expert);
    }
}

// Runs one expert on all of its slots.
inline void run_expert(const ExpertInputs& in, const Expert& expert, const std::vector<int64_t>& slots) {
    const int64_t k = in.config.num_experts_per_tok, d = in.config.hidden_size, width = in.config.moe_intermediate_size;
    const int64_t count = static_cast<int64_t>(slots.size());
    std::vector<const float*> from(slots.size());
    std::vector<float*> gate(slots.size()), up(slots.size()), to(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) {
        from[i] = in.x + slots[i] / k * d;
        gate[i] = in.gate(slots[i]);
        up[i] = gate[i] + width;
        to[i] = in.rows + slots[i] * d;
    }
    gemm(from.data(), count, expert.w1, 0, width, gate.data());
    gemm(from.data(), count, expert.w3, 0, width, up.data());
    for (int64_t slot : slots) in.finish(slot);
    for (size_t i = 0; i < slots.size(); ++i) from[i] = gate[i];
    gemm(from.data(), count, expert.w2, 0, d, to.data());
}

// Counts tokens of an expert. One thread counts at a time, so that none is lost; others may read meanwhile.
inline void count_tokens(const Layer& layer, int32_t expert, int64_t tokens) {
    if (!layer.load) return;
    std::atomic_ref<int64_t> total(layer.load[expert]);
    total.store(total.load(std::memory_order_relaxed) + tokens, std::memory_order_relaxed);
}

// Runs the routed experts. `beside` is an independent product of n rows that shares the threads with the experts. No
// row's bits depend on the order of the experts.
inline void run_experts(const ExpertInputs& in, ExpertResidency* residency, int64_t layer, const Product& beside) {
    if (in.n == 1) {
        for (int64_t i = 0; i < in.config.num_experts_per_tok; ++i) count_tokens(in.layer, in.index[i], 1);
        return run_token(in, residency, layer, beside);
    }
    std::vector<std::vector<int64_t>> slots(in.layer.experts.size());
    for (int64_t slot = 0; slot < in.n * in.config.num_experts_per_tok; ++slot)
        slots[static_cast<size_t>(in.index[slot])].push_back(slot);
    std::vector<int32_t> busy;
    for (size_t e = 0; e < slots.size(); ++e)
        if (!slots[e].empty()) busy.push_back(static_cast<int32_t>(e));
    for (int32_t e : busy) count_tokens(in.layer, e, static_cast<int64_t>(slots[static_cast<size_t>(e)].size()));
    auto slots_of = [&](int32_t e) -> const std::vector<int64_t>& { return slots[static_cast<size_t>(e)]; };
    // Longest tasks first, so that the threads finish together.
    std::stable_sort(busy.begin(), busy.end(),
                     [&](int32_t a, int32_t b) { return slots_of(a).size() > slots_of(b).size(); });
    std::optional<ExpertClaim> claim;
    if (residency) claim.emplace(*residency, layer, busy);  // reads while the product beside is computed
    products(&beside, 1, in.n);
    parallel(static_cast<int64_t>(busy.size()), [&](int64_t task, int) {
        const int32_t e = busy[static_cast<size_t>(task)];
        if (claim) claim->wait(e);
        run_expert(in, in.layer.experts[static_cast<size_t>(e)], slots_of(e));
        if (claim) claim->done(e);
    });
}

// Begins to read the experts of hash layers [first, last), which the token ids name.
inline void read_ahead(const Model& model, const std::vector<int64_t>& token_ids, int64_t first, int64_t last) {
    const int64_t k = model.config.num_experts_per_tok;
    std::vector<std::pair<int64_t, std::vector<int32_t>>> certain;
    for (int64_t l = first; l < last; ++l) {
        const int64_t* table = model.layers[static_cast<size_t>(l)].tid2eid;
        if (!table) continue;
        std::vector<int32_t> experts;
        for (int64_t id : token_ids)
            for (int64_t i = 0; i < k; ++i) experts.push_back(static_cast<int32_t>(table[id * k + i]));
        std::sort(experts.begin(), experts.end());
        experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
        certain.emplace_back(l, std::move(experts));
    }
    if (!certain.empty()) model.residency->read_ahead(certain);
}

}  // namespace dsv4::DSV4_ISA
