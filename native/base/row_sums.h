// Sums over rows that do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "base/simd.h"
#include "base/threads.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t SUM_ROWS = 64;  // rows per partial sum

// total [width] = a sum over n rows. add_rows(first, last, partial) adds rows [first, last) to a partial sum, which
// starts from zero; the partial sums are added in order.
template <class F>
inline void sum_rows(int64_t n, int64_t width, float* total, F&& add_rows) {
    const int64_t chunks = (n + SUM_ROWS - 1) / SUM_ROWS;
    std::vector<float> partials(static_cast<size_t>(chunks * width));
    parallel(chunks, [&](int64_t chunk, int) {
        add_rows(chunk * SUM_ROWS, std::min(n, (chunk + 1) * SUM_ROWS), partials.data() + chunk * width);
    });
    std::fill_n(total, width, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < width; ++i) total[i] += partials[static_cast<size_t>(chunk * width + i)];
}

}  // namespace dsv4::DSV4_ISA
