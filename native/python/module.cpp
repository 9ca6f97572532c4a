// The Python module dsv4._native: checks arguments, keeps the tensors alive, calls the kernels without the GIL.
#include <algorithm>
#include <optional>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "python/arguments.h"
#include "python/bus_error.h"
#include "python/native_cache.h"
#include "python/native_model.h"

using namespace dsv4;

namespace {

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
    ops().forward(model.model, cache.cache, batch, first, last, embed, streams.data(), {});
}

// Runs an MTP block: streams [T, s, d] are those of the main model, with the ids that follow, then the block's own.
void mtp_forward(const NativeModel& model, const NativeCache& cache, const Longs& next_token_ids, const Longs& lengths,
                 const Longs& starts, const Longs& slots, int64_t depth, MutableFloats streams) {
    const Config& c = model.model.config;
    if (depth < 0 || depth >= static_cast<int64_t>(model.model.mtp.size()))
        wrong("MTP block " + std::to_string(depth) + ": the model has " + std::to_string(model.model.mtp.size()));
    const int64_t layer = c.num_hidden_layers + depth, tokens = static_cast<int64_t>(next_token_ids.size());
    Batch batch = checked(model, cache, next_token_ids, lengths, starts, slots, layer, layer + 1);
    expect(streams, {tokens, c.hc_mult, c.hidden_size}, "streams");
    Computing now;
    ops().fuse_mtp_input(model.model, depth, batch.token_ids, tokens, streams.data());
    ops().forward(model.model, cache.cache, batch, layer, layer + 1, false, streams.data(), {});
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

// Notes in arrays of a batch's choices, as ChoiceNotes has them; each may be none.
ChoiceNotes checked_notes(const Model& model, int64_t tokens, std::optional<MutableShorts>& experts,
                          std::optional<MutableInts>& entries) {
    const Config& c = model.config;
    int64_t routed = 0, indexed = 0;
    for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
        routed += !model.layers[static_cast<size_t>(l)].tid2eid;
        indexed += model.layers[static_cast<size_t>(l)].kind.has_indexer;
    }
    ChoiceNotes notes{nullptr, nullptr, routed * c.num_experts_per_tok, indexed * c.index_topk};
    if (experts) {
        expect(*experts, {tokens, routed, c.num_experts_per_tok}, "experts");
        notes.experts = experts->data();
    }
    if (entries) {
        expect(*entries, {tokens, indexed, c.index_topk}, "entries");
        notes.entries = entries->data();
    }
    return notes;
}

// Runs the embedding and the main layers, then the head on some rows of the batch. kept [T, s, d]: gets the streams;
// experts, entries: get the choices.
void forward_to_logits(const NativeModel& model, const NativeCache& cache, const Longs& token_ids, const Longs& lengths,
                       const Longs& starts, const Longs& slots, const Longs& rows, MutableFloats logits,
                       std::optional<MutableFloats> kept, std::optional<MutableShorts> experts,
                       std::optional<MutableInts> entries) {
    const Config& c = model.model.config;
    Batch batch = checked(model, cache, token_ids, lengths, starts, slots, 0, c.num_hidden_layers);
    int64_t tokens = static_cast<int64_t>(token_ids.size()), n = static_cast<int64_t>(rows.size());
    expect(rows, {n}, "rows");
    for (int64_t i = 0; i < n; ++i)
        if (rows.data()[i] < (i ? rows.data()[i - 1] + 1 : 0) || rows.data()[i] >= tokens)
            wrong("rows[" + std::to_string(i) + "] is " + std::to_string(rows.data()[i]) + ": allowed are 0 to " +
                  std::to_string(tokens - 1) + ", each more than the one before");
    expect(logits, {n, c.vocab_size}, "logits");
    if (kept) expect(*kept, {tokens, c.hc_mult, c.hidden_size}, "streams");
    const ChoiceNotes notes = checked_notes(model.model, tokens, experts, entries);
    const Readout& readout = model.readout("");
    Computing now;
    const int64_t wide = c.hc_mult * c.hidden_size;
    std::unique_ptr<float[]> own, picked;
    if (!kept) own = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(tokens * wide));
    float *streams = kept ? kept->data() : own.get(), *read = streams;
    ops().forward(model.model, cache.cache, batch, 0, c.num_hidden_layers, true, streams, notes);
    if (n < tokens) {  // in place, unless the streams are kept
        if (kept) picked = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(n * wide));
        if (kept) read = picked.get();
        for (int64_t i = 0; i < n; ++i)
            if (kept || rows.data()[i] > i) std::copy_n(streams + rows.data()[i] * wide, wide, read + i * wide);
    }
    ops().head(model.model, readout, read, n, logits.data());
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
             nb::arg("compressed_freq"))
        .def("limit_experts", &NativeModel::limit_experts, nb::arg("residency"))
        .def("count_experts", &NativeModel::count_experts, nb::arg("load"));
    nb::class_<NativeResidency>(m, "ExpertResidency")
        .def(nb::init<int64_t, int64_t, int64_t, const Longs&, const std::vector<int>&, nb::object>(),
             nb::arg("budget"), nb::arg("layers"), nb::arg("experts"), nb::arg("pages"), nb::arg("files"),
             nb::arg("owner"))
        .def("counts", &NativeResidency::counts);
    // noconvert on every output: nanobind would pass a converted copy of an array of another dtype.
    nb::class_<NativeCache>(m, "Cache")
        .def(nb::init<const std::vector<std::vector<nb::object>>&, const NativeCache::Format&,
                      const NativeCache::Format&, Longs, Longs, int64_t, bool>(),
             nb::arg("layers"), nb::arg("keys"), nb::arg("index_keys"), nb::arg("block_table").noconvert(),
             nb::arg("stored").noconvert(), nb::arg("num_pages"), nb::arg("checked"))
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
          nb::arg("lengths"), nb::arg("starts"), nb::arg("slots"), nb::arg("rows"), nb::arg("logits").noconvert(),
          nb::arg("streams").noconvert().none() = nb::none(), nb::arg("experts").noconvert().none() = nb::none(),
          nb::arg("entries").noconvert().none() = nb::none());
    m.def("mtp_forward", &mtp_forward, nb::arg("model"), nb::arg("cache"), nb::arg("next_token_ids"),
          nb::arg("lengths"), nb::arg("starts"), nb::arg("slots"), nb::arg("depth"), nb::arg("streams").noconvert());
    define_ops(m);
    define_single(m);
    define_training(m);
}
