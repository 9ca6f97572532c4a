// Products of small factors on one thread, added to their result: for the gradients of attention and of the indexer.
#pragma once

#include "gemm/gemm_backward.h"

namespace dsv4::DSV4_ISA {

// Values of pack_channels' panels.
inline int64_t channel_panels_size(int64_t count, int64_t width) { return (width + LANES - 1) / LANES * LANES * count; }

// Packs `count` rows of `width` channels into panels [count][16] of 16 channels, padded with zeros.
inline void pack_channels(const float* const* rows, int64_t count, int64_t width, float* panels) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; j += LANES)
            store(panels + j * count + i * LANES,
                  load_n(rows[i] + j, static_cast<int>(std::min<int64_t>(LANES, width - j))));
}

// Some rows of packed channels: those from row `panels` points at on; panels are `stride` apart.
struct ChannelPanels {
    const float* panels;
    int64_t stride, width;
};

// y[i][0..b.width) += sum over t of a[i * item + t * term] * row t of b, in one chain over t from zero.
inline void add_products(const float* a, int64_t item, int64_t term, int64_t items, int64_t terms,
                         const ChannelPanels& b, float* y) {
    if (!terms) return;
    const int64_t panels = (b.width + LANES - 1) / LANES;
    for (int64_t i = 0; i < items;) {
        const int count = next_rows<TILE_ROWS>(items - i);
        for (int64_t p = 0; p < panels; p += TILE_PANELS) {
            float* to[TILE_ROWS];
            for (int r = 0; r < count; ++r) to[r] = y + (i + r) * b.width + p * LANES;
            const int columns = static_cast<int>(b.width - p * LANES);
            const float* panel = b.panels + p * b.stride;
            with_count<TILE_ROWS>(count, [&](auto block) __attribute__((always_inline)) {
                constexpr int R = decltype(block)::value;
                columns <= LANES
                    ? backward_tile<R, 1>(a + i * item, item, term, terms, panel, b.stride, to, columns, true)
                    : backward_tile<R, TILE_PANELS>(a + i * item, item, term, terms, panel, b.stride, to, columns,
                                                    true);
            });
        }
        i += count;
    }
}

}  // namespace dsv4::DSV4_ISA
