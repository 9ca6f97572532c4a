// The Python module dsv4._native: checks arguments, keeps the tensors alive, calls the kernels without the GIL.
#include <algorithm>
#include <map>
#include <memory>
#include <tuple>
#include <utility>

#include <nanobind/stl/tuple.h>

#include "python/arguments.h"
#include "python/bus_error.h"

using namespace dsv4;

namespace {

// A model's weights, looked up by checkpoint name; each shape is checked against the configuration.
class NativeModel {
   public:
    Model model;

    NativeModel(const nb::dict& config, const nb::dict& tensors, const std::vector<int64_t>& ratios,
                const std::vector<float>& window_freq, const std::vector<float>& compressed_freq) {
        Config& c = model.config;
        auto whole = [&](const char* key) { return nb::cast<int64_t>(config[key]); };
        auto real = [&](const char* key) { return nb::cast<double>(config[key]); };
        c.hidden_size = whole("hidden_size");
        c.vocab_size = whole("vocab_size");
        c.num_hidden_layers = whole("num_hidden_layers");
        c.hc_mult = whole("hc_mult");
        c.hc_sinkhorn_iters = whole("hc_sinkhorn_iters");
        c.num_attention_heads = whole("num_attention_heads");
        c.head_dim = whole("head_dim");
        c.qk_rope_head_dim = whole("qk_rope_head_dim");
        c.q_lora_rank = whole("q_lora_rank");
        c.o_groups = whole("o_groups");
        c.o_lora_rank = whole("o_lora_rank");
        c.index_n_heads = whole("index_n_heads");
        c.index_head_dim = whole("index_head_dim");
        c.index_topk = whole("index_topk");
        c.n_routed_experts = whole("n_routed_experts");
        c.num_experts_per_tok = whole("num_experts_per_tok");
        c.moe_intermediate_size = whole("moe_intermediate_size");
        c.n_shared_experts = whole("n_shared_experts");
        c.rms_norm_eps = real("rms_norm_eps");
        c.hc_eps = real("hc_eps");
        c.routed_scaling_factor = real("routed_scaling_factor");
        c.swiglu_limit = real("swiglu_limit");
        c.quantize = nb::cast<bool>(config["quantize"]);
        if (c.hc_mult > 16) wrong("hc_mult " + std::to_string(c.hc_mult) + ": the native kernels take at most 16");
        for (const auto& [key, value] : tensors) {
            std::string name = nb::cast<std::string>(key);
            if (name.ends_with("tid2eid"))
                tables_[name] = nb::cast<Longs>(value);
            else if (nb::isinstance<nb::tuple>(value))
                stored_.emplace(name, stored_weight(value, name));
            else
                floats_[name] = nb::cast<Floats>(value);
        }
        model.embed = weight("embed.weight", c.vocab_size, c.hidden_size);
        model.inv_freq[0] = window_freq;
        model.inv_freq[1] = compressed_freq;
        for (size_t l = 0; l < ratios.size(); ++l) {
            int64_t depth = static_cast<int64_t>(l) - c.num_hidden_layers;
            model.layers.push_back(layer(
                depth < 0 ? "layers." + std::to_string(l) + "." : "mtp." + std::to_string(depth) + ".", ratios[l]));
            if (depth >= 0) add_readout("mtp." + std::to_string(depth) + ".");
        }
        add_readout("");
        model.head = weight("head.weight", c.vocab_size, c.hidden_size);
    }

    const Floats& tensor(const std::string& name) const {
        auto found = floats_.find(name);
        if (found == floats_.end()) wrong("tensor " + name + " is missing");
        return found->second;
    }

    const float* contiguous(const std::string& name, const std::vector<int64_t>& shape) const {
        const Floats& array = tensor(name);
        expect(array, shape, name);
        int64_t step = 1;
        for (size_t i = array.ndim(); i-- > 0; step *= static_cast<int64_t>(array.shape(i)))
            if (array.shape(i) > 1 && array.stride(i) != step) wrong(name + ": not contiguous");
        return array.data();
    }

    Weight weight(const std::string& name, int64_t out, int64_t in) const {
        auto found = stored_.find(name);
        Weight w = found != stored_.end() ? found->second.view : stored_floats(tensor(name), name).view;
        if (w.out != out || w.in != in)
            wrong(name + ": shape " + shape_of({w.out, w.in}) + ", expected " + shape_of({out, in}));
        return w;
    }

    // prefix: "" for the main model, e.g. "mtp.0." for an MTP block.
    const Readout& readout(const std::string& prefix) const {
        auto found = readouts_.find(prefix);
        if (found == readouts_.end()) wrong("no read-out " + prefix + "hc_head");
        return found->second;
    }

   private:
    void add_readout(const std::string& prefix) {
        const Config& c = model.config;
        readouts_[prefix] = {site(prefix + "hc_head", c.hc_mult, 1),
                             contiguous(prefix + "norm.weight", {c.hidden_size})};
    }

    HyperConnection site(const std::string& prefix, int64_t mixes, int64_t scales) const {
        const Config& c = model.config;
        return {contiguous(prefix + "_fn", {mixes, c.hc_mult * c.hidden_size}), contiguous(prefix + "_base", {mixes}),
                contiguous(prefix + "_scale", {scales})};
    }

    Compressor compressor(const std::string& prefix, const CompressionKind& kind, int64_t width) const {
        Compressor w;
        w.kind = kind;
        w.width = width;
        w.total = kind.channels(width);
        w.wkv = weight(prefix + "wkv.weight", w.total, model.config.hidden_size);
        w.wgate = weight(prefix + "wgate.weight", w.total, model.config.hidden_size);
        w.ape = contiguous(prefix + "ape", {kind.ratio, w.total});
        w.norm = contiguous(prefix + "norm.weight", {width});
        return w;
    }

    Expert expert(const std::string& prefix, int64_t width) const {
        int64_t d = model.config.hidden_size;
        return {weight(prefix + "w1.weight", width, d), weight(prefix + "w2.weight", d, width),
                weight(prefix + "w3.weight", width, d)};
    }

    Layer layer(const std::string& prefix, int64_t ratio) const {
        const Config& c = model.config;
        int64_t d = c.hidden_size, s = c.hc_mult, H = c.num_attention_heads, D = c.head_dim;
        const CompressionKind* kind = compression_kind(ratio);
        if (!kind) wrong(prefix + ": ratio " + std::to_string(ratio) + "; allowed are 0, 4 and 128");
        Layer w;
        w.kind = *kind;
        w.hc_attn = site(prefix + "hc_attn", s * (2 + s), 3);
        w.hc_ffn = site(prefix + "hc_ffn", s * (2 + s), 3);
        w.attn_norm = contiguous(prefix + "attn_norm.weight", {d});
        w.ffn_norm = contiguous(prefix + "ffn_norm.weight", {d});
        std::string attn = prefix + "attn.", ffn = prefix + "ffn.";
        w.attn_sink = contiguous(attn + "attn_sink", {H});
        w.q_norm = contiguous(attn + "q_norm.weight", {c.q_lora_rank});
        w.kv_norm = contiguous(attn + "kv_norm.weight", {D});
        w.wq_a = weight(attn + "wq_a.weight", c.q_lora_rank, d);
        w.wq_b = weight(attn + "wq_b.weight", H * D, c.q_lora_rank);
        w.wkv = weight(attn + "wkv.weight", D, d);
        w.wo_a = weight(attn + "wo_a.weight", c.o_groups * c.o_lora_rank, H * D / c.o_groups);
        w.wo_b = weight(attn + "wo_b.weight", d, c.o_groups * c.o_lora_rank);
        if (w.kind.ratio) w.main = compressor(attn + "compressor.", w.kind, D);
        if (w.kind.has_indexer) {
            w.index = compressor(attn + "indexer.compressor.", w.kind, c.index_head_dim);
            w.index_wq_b = weight(attn + "indexer.wq_b.weight", c.index_n_heads * c.index_head_dim, c.q_lora_rank);
            w.index_weights_proj = weight(attn + "indexer.weights_proj.weight", c.index_n_heads, d);
        }
        w.gate = weight(ffn + "gate.weight", c.n_routed_experts, d);
        auto table = tables_.find(ffn + "gate.tid2eid");
        if (table != tables_.end()) {
            expect(table->second, {c.vocab_size, c.num_experts_per_tok}, table->first);
            w.tid2eid = table->second.data();
        } else {
            w.bias = contiguous(ffn + "gate.bias", {c.n_routed_experts});
        }
        for (int64_t e = 0; e < c.n_routed_experts; ++e)
            w.experts.push_back(expert(ffn + "experts." + std::to_string(e) + ".", c.moe_intermediate_size));
        const std::string shared = ffn + "shared_experts.";
        w.shared = expert(shared, c.moe_intermediate_size * c.n_shared_experts);
        return w;
    }

    std::map<std::string, Floats> floats_;
    std::map<std::string, Stored> stored_;
    std::map<std::string, Longs> tables_;
    std::map<std::string, Readout> readouts_;
};

// A cache's tensors: per layer the window, then kv, score and entries of each compressor.
class NativeCache {
   public:
    Cache cache;

    // num_pages: pages of the entry pool; the block table [slots, pages per slot] lists each slot's pages.
    NativeCache(const std::vector<std::vector<MutableFloats>>& layers, Longs block_table, int64_t num_pages,
                bool checked)
        : layers_(layers), block_table_(std::move(block_table)), num_pages_(num_pages) {
        if (block_table_.ndim() != 2) wrong("block_table has 2 dimensions");
        cache.block_table = block_table_.data();
        cache.pages_per_slot = static_cast<int64_t>(block_table_.shape(1));
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

    // (layer, page) of the first quantized index key that is not of its entry any more, (-1, -1) if there is none or
    // the cache was not made to be checked.
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
    Longs block_table_;
    int64_t num_pages_;
    std::vector<std::unique_ptr<IndexKeyCache>> index_keys_;
};

// Builds a batch; ValueError unless layers [first, last) of the model can run it and the cache has room for it.
Batch checked(const NativeModel& model, const NativeCache& cache, const Longs& token_ids, const Longs& lengths,
              const Longs& starts, const Longs& slots, int64_t first, int64_t last) {
    const Config& c = model.model.config;
    int64_t tokens = 0, n = static_cast<int64_t>(lengths.size());
    expect(starts, {n}, "starts");
    expect(slots, {n}, "slots");
    for (int64_t i = 0; i < n; ++i) {
        int64_t length = lengths.data()[i], start = starts.data()[i], slot = slots.data()[i];
        int64_t room = cache.cache.pages_per_slot * PAGE_TOKENS;
        if (length < 1 || start < 0 || length > room - start || slot < 0 || slot >= cache.slots())
            wrong("cache row " + std::to_string(slot) + " cannot take " + std::to_string(length) + " tokens from " +
                  std::to_string(start) + " on");
        tokens += length;
    }
    expect(token_ids, {tokens}, "token_ids");
    int64_t layers = static_cast<int64_t>(std::min(model.model.layers.size(), cache.cache.layers.size()));
    if (first < 0 || last > layers) wrong("layers " + std::to_string(first) + " to " + std::to_string(last));
    for (int64_t i = 0; i < tokens; ++i)
        if (token_ids.data()[i] < 0 || token_ids.data()[i] >= c.vocab_size)
            wrong("token id " + std::to_string(token_ids.data()[i]) + ": allowed are 0 to " +
                  std::to_string(c.vocab_size - 1));
    bool has_entries = false;
    for (int64_t l = first; l < last; ++l) {
        const Layer& layer = model.model.layers[static_cast<size_t>(l)];
        cache.expect_fits(c, layer, static_cast<size_t>(l));
        has_entries = has_entries || layer.kind.ratio;
        for (int64_t i = 0; layer.tid2eid && i < tokens * c.num_experts_per_tok; ++i) {
            int64_t k = c.num_experts_per_tok, expert = layer.tid2eid[token_ids.data()[i / k] * k + i % k];
            if (expert < 0 || expert >= c.n_routed_experts)
                wrong("layer " + std::to_string(l) + ": tid2eid names expert " + std::to_string(expert) + " of " +
                      std::to_string(c.n_routed_experts));
        }
    }
    for (int64_t i = 0; has_entries && i < n; ++i)
        cache.expect_pages(slots.data()[i], starts.data()[i] + lengths.data()[i]);
    return {token_ids.data(), lengths.data(), starts.data(), slots.data(), n};
}

void forward(const NativeModel& model, const NativeCache& cache, const Longs& token_ids, const Longs& lengths,
             const Longs& starts, const Longs& slots, int64_t first, int64_t last, bool embed, MutableFloats streams) {
    const Config& c = model.model.config;
    Batch batch = checked(model, cache, token_ids, lengths, starts, slots, first, last);
    expect(streams, {static_cast<int64_t>(token_ids.size()), c.hc_mult, c.hidden_size}, "streams");
    Computing now;
    ops().forward(model.model, cache.cache, batch, first, last, embed, streams.data());
}

void head(const NativeModel& model, const std::string& prefix, MutableFloats streams, MutableFloats logits) {
    const Config& c = model.model.config;
    expect_dimensions(streams, 3, "streams");
    int64_t n = static_cast<int64_t>(streams.shape(0));
    expect(streams, {n, c.hc_mult, c.hidden_size}, "streams");
    expect(logits, {n, c.vocab_size}, "logits");
    const Readout& readout = model.readout(prefix);
    Computing now;
    ops().head(model.model, readout, streams.data(), n, logits.data());
}

// Runs the embedding and the main layers, then the head on some rows of the batch.
void forward_to_logits(const NativeModel& model, const NativeCache& cache, const Longs& token_ids, const Longs& lengths,
                       const Longs& starts, const Longs& slots, const Longs& rows, MutableFloats logits) {
    const Config& c = model.model.config;
    Batch batch = checked(model, cache, token_ids, lengths, starts, slots, 0, c.num_hidden_layers);
    int64_t tokens = static_cast<int64_t>(token_ids.size()), n = static_cast<int64_t>(rows.size());
    expect(rows, {n}, "rows");
    for (int64_t i = 0; i < n; ++i)
        if (rows.data()[i] < (i ? rows.data()[i - 1] + 1 : 0) || rows.data()[i] >= tokens)
            wrong("rows[" + std::to_string(i) + "] is " + std::to_string(rows.data()[i]) + ": allowed are 0 to " +
                  std::to_string(tokens - 1) + ", each more than the one before");
    expect(logits, {n, c.vocab_size}, "logits");
    const Readout& readout = model.readout("");
    Computing now;
    int64_t wide = c.hc_mult * c.hidden_size;
    auto streams = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(tokens * wide));
    ops().forward(model.model, cache.cache, batch, 0, c.num_hidden_layers, true, streams.get());
    for (int64_t i = 0; i < n; ++i)
        if (rows.data()[i] > i) std::copy_n(streams.get() + rows.data()[i] * wide, wide, streams.get() + i * wide);
    ops().head(model.model, readout, streams.get(), n, logits.data());
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels of dsv4; see native/ in the sources.";
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Isa& isa : isas()) names.push_back(isa.name);
        return names;
    });
    m.def("select", &use_isa, nb::arg("isa"));
    m.def("selected", [] {
        for (const Isa& isa : isas())
            if (isa.ops == &ops()) return isa.name;
        return std::string();
    });
    m.def(
        "set_threads",
        [](int count) {
            if (count < 1 || count > 1024) wrong("threads " + std::to_string(count) + ": allowed are 1 to 1024");
            set_thread_count(count);
        },
        nb::arg("count"));
    m.def("threads", &thread_count);
    m.def(
        "watch_bus_errors",
        [](const std::vector<std::tuple<uintptr_t, uintptr_t, std::string>>& ranges) {
            std::vector<MappedRange> mapped;
            for (const auto& [first, last, line] : ranges) mapped.push_back({first, last, line});
            watch_bus_errors(std::move(mapped));
        },
        nb::arg("ranges"));
    nb::class_<NativeModel>(m, "Model")
        .def(nb::init<const nb::dict&, const nb::dict&, const std::vector<int64_t>&, const std::vector<float>&,
                      const std::vector<float>&>(),
             nb::arg("config"), nb::arg("tensors"), nb::arg("ratios"), nb::arg("window_freq"),
             nb::arg("compressed_freq"));
    // noconvert on every output: nanobind would pass a converted copy of an array of another dtype.
    nb::class_<NativeCache>(m, "Cache")
        .def(nb::init<const std::vector<std::vector<MutableFloats>>&, Longs, int64_t, bool>(),
             nb::arg("layers").noconvert(), nb::arg("block_table").noconvert(), nb::arg("num_pages"),
             nb::arg("checked"))
        .def("forget", &NativeCache::forget, nb::arg("page"))
        .def("quantized_rows", &NativeCache::quantized_rows)
        .def("stale", &NativeCache::stale)
        // A copy of a Python cache creates its own native cache on first use.
        .def("__reduce__", [](nb::handle) {
            return nb::make_tuple(nb::handle(reinterpret_cast<PyObject*>(Py_TYPE(Py_None))), nb::make_tuple());
        });
    m.def("forward", &forward, nb::arg("model"), nb::arg("cache"), nb::arg("token_ids"), nb::arg("lengths"),
          nb::arg("starts"), nb::arg("slots"), nb::arg("first"), nb::arg("last"), nb::arg("embed"),
          nb::arg("streams").noconvert());
    m.def("head", &head, nb::arg("model"), nb::arg("prefix"), nb::arg("streams"), nb::arg("logits").noconvert());
    m.def("forward_to_logits", &forward_to_logits, nb::arg("model"), nb::arg("cache"), nb::arg("token_ids"),
          nb::arg("lengths"), nb::arg("starts"), nb::arg("slots"), nb::arg("rows"), nb::arg("logits").noconvert());
    define_ops(m);
    define_single(m);
}
