// Views of a cache's tensors from Python.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/arguments.h"

namespace dsv4 {

// A cache's tensors: per layer the window, then kv, score and entries of each compressor.
class NativeCache {
   public:
    Cache cache;

    // num_pages: pages of the entry pool; the block table [slots, pages per slot] lists each slot's pages; stored
    // [slots] as in Cache.
    NativeCache(const std::vector<std::vector<MutableFloats>>& layers, Longs block_table, Longs stored,
                int64_t num_pages, bool checked)
        : layers_(layers), block_table_(std::move(block_table)), stored_(std::move(stored)), num_pages_(num_pages) {
        if (block_table_.ndim() != 2) wrong("block_table has 2 dimensions");
        cache.block_table = block_table_.data();
        cache.pages_per_slot = static_cast<int64_t>(block_table_.shape(1));
        expect(stored_, {slots()}, "stored");
        cache.stored = stored_.data();
        for (const auto& tensors : layers_) {
            if (tensors.size() % 3 != 1 || tensors.size() > 7) wrong("a layer's cache has 1, 4 or 7 tensors");
            auto part = [&](size_t i) -> CompressorCache {
                if (i >= tensors.size()) return {};
                if (tensors[i + 2].ndim() != 2) wrong("entries have 2 dimensions");
                return {tensors[i].data(), tensors[i + 1].data(), tensors[i + 2].data()};
            };
            cache.layers.push_back({tensors[0].data(), part(1), part(4)});
            if (tensors.size() < 7) continue;
            index_keys_.push_back(std::make_unique<IndexKeyCache>(static_cast<int64_t>(tensors[6].shape(0)), checked));
            cache.layers.back().index.quantized = index_keys_.back().get();
        }
    }

    NativeCache(const NativeCache&) = delete;
    NativeCache& operator=(const NativeCache&) = delete;

    // Drops the quantized index keys of a page; must follow writes to its entries from outside the kernels.
    void forget(int64_t page) {
        if (page < 0 || page >= num_pages_)
            wrong("page " + std::to_string(page) + ": the cache has pages 0 to " + std::to_string(num_pages_ - 1));
        constexpr int64_t ROWS = PAGE_TOKENS / CSA.ratio;
        for (auto& layer : index_keys_) layer->invalidate(page * ROWS, ROWS);
    }

    // Number of index keys quantized since construction, over all layers.
    int64_t quantized_rows() const {
        int64_t rows = 0;
        for (const auto& layer : index_keys_) rows += layer->quantized_rows();
        return rows;
    }

    // (layer, page) of the first quantized index key whose entry has changed unnoticed; (-1, -1) if there is none or
    // the cache was created with checked = false.
    std::tuple<int64_t, int64_t> stale() const {
        for (size_t l = 0; l < layers_.size(); ++l) {
            const CompressorCache& index = cache.layers[l].index;
            if (!index.quantized) continue;
            int64_t row = index.quantized->stale_row(index.entries, static_cast<int64_t>(layers_[l][6].shape(1)));
            if (row >= 0) return {static_cast<int64_t>(l), row / (PAGE_TOKENS / CSA.ratio)};
        }
        return {-1, -1};
    }

    int64_t slots() const { return static_cast<int64_t>(block_table_.shape(0)); }

    // ValueError unless the slot's block table has valid pages for tokens [0, stop).
    void expect_pages(int64_t slot, int64_t stop) const {
        const int64_t* pages = cache.block_table + slot * cache.pages_per_slot;
        for (int64_t i = 0; i < (stop + PAGE_TOKENS - 1) / PAGE_TOKENS; ++i)
            if (pages[i] < 0 || pages[i] >= num_pages_)
                wrong("cache row " + std::to_string(slot) + ": no page for tokens from " +
                      std::to_string(i * PAGE_TOKENS) + " on");
    }

    // ValueError unless a layer's tensors have the sizes that this configuration needs.
    void expect_fits(const Config& c, const Layer& layer, size_t l) const {
        const auto& tensors = layers_[l];
        auto is = [](const MutableFloats& array, int64_t a, int64_t b, int64_t width) {
            return array.ndim() == 3 && static_cast<int64_t>(array.shape(0)) == a &&
                   static_cast<int64_t>(array.shape(1)) == b && static_cast<int64_t>(array.shape(2)) == width;
        };
        auto part = [&](size_t i, const Compressor& w) {
            const MutableFloats& entries = tensors[i + 2];
            int64_t tokens = w.kind.state_tokens();
            return is(tensors[i], slots(), tokens, w.total) && is(tensors[i + 1], slots(), tokens, w.total) &&
                   entries.ndim() == 2 && static_cast<int64_t>(entries.shape(1)) == w.width &&
                   static_cast<int64_t>(entries.shape(0)) >= num_pages_ * (PAGE_TOKENS / w.kind.ratio);
        };
        size_t compressors = (layer.kind.ratio ? 1 : 0) + (layer.kind.has_indexer ? 1 : 0);
        bool fits = tensors.size() == 1 + 3 * compressors && is(tensors[0], slots(), WINDOW, c.head_dim) &&
                    (compressors < 1 || part(1, layer.main)) && (compressors < 2 || part(4, layer.index));
        if (!fits) wrong("layer " + std::to_string(l) + ": the cache was made for another model");
    }

   private:
    std::vector<std::vector<MutableFloats>> layers_;
    Longs block_table_, stored_;
    int64_t num_pages_;
    std::vector<std::unique_ptr<IndexKeyCache>> index_keys_;
};

}  // namespace dsv4
