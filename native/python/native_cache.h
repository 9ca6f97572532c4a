// Views of a cache's tensors from Python.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/arguments.h"

namespace dsv4 {

// Row format from Python: kind, channels and rotated channels; see dsv4/cache/formats.py.
inline RowFormat row_format(const std::tuple<std::string, int64_t, int64_t>& native, int64_t bytes) {
    const auto& [name, width, rotary] = native;
    if (name == "float32") return {RowKind::f32, width, 0, width * 4};
    if (name == "bfloat16") return {RowKind::bf16, width, 0, width * 2};
    if (name == "fp8") return {RowKind::fp8, width, rotary, bytes};
    if (name == "fp4") return {RowKind::fp4, width, 0, bytes};
    wrong("rows of " + name + ": the native kernels take float32, bfloat16, fp8 and fp4");
}

// A cache's tensors: per layer the window, then kv, score and entries of each compressor. Window and entries are bytes.
class NativeCache {
   public:
    Cache cache;

    using Format = std::tuple<std::string, int64_t, int64_t>;

    // keys, index_keys: formats of the rows; num_pages: pages of the entry pool; the block table [slots, pages per slot]
    // lists each slot's pages; stored [slots] as in Cache.
    NativeCache(const std::vector<std::vector<nb::object>>& layers, const Format& keys, const Format& index_keys,
                Longs block_table, Longs stored, int64_t num_pages, bool checked)
        : block_table_(std::move(block_table)), stored_(std::move(stored)), num_pages_(num_pages) {
        if (block_table_.ndim() != 2) wrong("block_table has 2 dimensions");
        cache.block_table = block_table_.data();
        cache.pages_per_slot = static_cast<int64_t>(block_table_.shape(1));
        expect(stored_, {slots()}, "stored");
        cache.stored = stored_.data();
        for (const auto& tensors : layers) {
            if (tensors.size() % 3 != 1 || tensors.size() > 7) wrong("a layer's cache has 1, 4 or 7 tensors");
            Tensors kept{{bytes_of(tensors[0], 3, "window")}, {}};
            for (size_t i = 1; i < tensors.size(); i += 3) {
                for (size_t j = i; j < i + 2; ++j) kept.states.push_back(floats_of(tensors[j]));
                kept.rows.push_back(bytes_of(tensors[i + 2], 2, "entries"));
            }
            auto rows_of = [&](size_t i, const Format& format) -> StoredRows {
                const MutableBytes& rows = kept.rows[i];
                const auto bytes = static_cast<int64_t>(rows.shape(rows.ndim() - 1));
                return {rows.data(), row_format(format, bytes)};
            };
            auto part = [&](size_t i, const Format& format) -> CompressorCache {
                if (i >= kept.rows.size()) return {};
                return {kept.states[2 * i - 2].data(), kept.states[2 * i - 1].data(), rows_of(i, format), nullptr};
            };
            cache.layers.push_back({rows_of(0, keys), part(1, keys), part(2, index_keys)});
            layers_.push_back(std::move(kept));
            CompressorCache& index = cache.layers.back().index;
            if (layers_.back().rows.size() < 3 || index.entries.format.kind == RowKind::fp4) continue;
            index_keys_.push_back(
                std::make_unique<IndexKeyCache>(static_cast<int64_t>(layers_.back().rows[2].shape(0)), checked));
            index.quantized = index_keys_.back().get();
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
            int64_t row = index.quantized->stale_row(index.entries.data, index.entries.format.bytes);
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
        const Tensors& tensors = layers_[l];
        const LayerCache& views = cache.layers[l];
        auto is = [](const auto& array, int64_t a, int64_t b, int64_t width) {
            return array.ndim() == 3 && static_cast<int64_t>(array.shape(0)) == a &&
                   static_cast<int64_t>(array.shape(1)) == b && static_cast<int64_t>(array.shape(2)) == width;
        };
        auto part = [&](size_t i, const Compressor& w, const StoredRows& rows) {
            const MutableBytes& entries = tensors.rows[i];
            int64_t tokens = w.kind.state_tokens();
            return is(tensors.states[2 * i - 2], slots(), tokens, w.total) &&
                   is(tensors.states[2 * i - 1], slots(), tokens, w.total) &&
                   row_fits(rows.format, w.width, c.qk_rope_head_dim) &&
                   static_cast<int64_t>(entries.shape(1)) == rows.format.bytes &&
                   static_cast<int64_t>(entries.shape(0)) >= num_pages_ * (PAGE_TOKENS / w.kind.ratio);
        };
        size_t compressors = (layer.kind.ratio ? 1 : 0) + (layer.kind.has_indexer ? 1 : 0);
        bool fits = tensors.rows.size() == 1 + compressors &&
                    row_fits(views.window.format, c.head_dim, c.qk_rope_head_dim) &&
                    is(tensors.rows[0], slots(), WINDOW, views.window.format.bytes) &&
                    (compressors < 1 || part(1, layer.main, views.main.entries)) &&
                    (compressors < 2 || part(2, layer.index, views.index.entries));
        if (!fits) wrong("layer " + std::to_string(l) + ": the cache was made for another model");
    }

   private:
    // Tensors of a layer: window, then the entries of each compressor; kv and score of each.
    struct Tensors {
        std::vector<MutableBytes> rows;
        std::vector<MutableFloats> states;
    };

    static MutableBytes bytes_of(const nb::object& tensor, size_t dimensions, const std::string& name) {
        MutableBytes rows;
        if (!nb::try_cast(tensor, rows, false) || rows.ndim() != dimensions)
            wrong(name + ": contiguous bytes in " + std::to_string(dimensions) + " dimensions are allowed");
        return rows;
    }

    static MutableFloats floats_of(const nb::object& tensor) {
        MutableFloats values;
        if (!nb::try_cast(tensor, values, false)) wrong("kv and score: contiguous float32 is allowed");
        return values;
    }

    // True if rows of the format have `width` channels, and the bytes for them.
    static bool row_fits(const RowFormat& format, int64_t width, int64_t rotary) {
        if (format.width != width) return false;
        if (format.kind == RowKind::fp8)
            return format.rotary == rotary && rotary <= width &&
                   format.bytes >= width + rotary + (width - rotary + 63) / 64;
        return format.kind != RowKind::fp4 || format.bytes == (width + 1) / 2 + (width + 31) / 32;
    }

    std::vector<Tensors> layers_;
    Longs block_table_, stored_;
    int64_t num_pages_;
    std::vector<std::unique_ptr<IndexKeyCache>> index_keys_;
};

}  // namespace dsv4
