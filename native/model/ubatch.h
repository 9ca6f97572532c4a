// A ubatch: tokens that go through the layers together (llama.cpp's word for a physical batch).
#pragma once

#include <algorithm>
#include <vector>

#include "model/compressor.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t UBATCH_TOKENS = 1024;  // enough that an expert's packed weights serve a hundred rows
constexpr int64_t ATTENTION_TOKENS = 8;  // neighbouring tokens that share the packed keys of their windows

// Activations of a ubatch; the memory is reused from ubatch to ubatch and from layer to layer.
struct Buffers {
    std::vector<std::vector<float>> memory;
    size_t next = 0;

    void restart() { next = 0; }
    float* get(int64_t size) {
        if (next == memory.size()) memory.emplace_back();
        auto& own = memory[next++];
        if (static_cast<int64_t>(own.size()) < size) own.resize(static_cast<size_t>(size));
        return own.data();
    }
};

struct Ubatch {
    const Model& model;
    const Cache& cache;
    int64_t n = 0;
    std::vector<Segment> segments;
    std::vector<int64_t> token_ids, positions;
    std::vector<float> cos[2], sin[2];  // [n, pairs]: 0 for window-only layers, 1 for compressed ones
    Buffers buffers;
    ChoiceNotes notes;  // of its first token in the layer that comes next
};

// Calls f(first, last) for all rows of a ubatch, several rows per task.
template <class F>
inline void for_each_rows(int64_t n, F&& f) {
    int64_t chunk = std::max<int64_t>(1, n < 4 ? n : std::min<int64_t>(64, n / (2 * thread_count())));
    parallel((n + chunk - 1) / chunk, [&](int64_t task, int) { f(task * chunk, std::min(n, (task + 1) * chunk)); });
}

template <class F>
inline void for_each_row(int64_t n, F&& f) {
    for_each_rows(n, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) f(row);
    });
}

}  // namespace dsv4::DSV4_ISA
