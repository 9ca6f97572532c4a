// Views of a model's tensors from Python.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/expert_residency.h"
#include "python/arguments.h"

namespace dsv4 {

// An ExpertResidency of experts given by rows of `pages` [n, 6]: layer, expert, address, bytes, index of the file among
// `files` (descriptors), place in the file. `owner` keeps the files mapped.
class NativeResidency {
   public:
    NativeResidency(int64_t budget, int64_t layers, int64_t experts, const Longs& pages, const std::vector<int>& files,
                    nb::object owner)
        : layers_(layers), experts_(experts), owner_(std::move(owner)) {
        expect(pages, {static_cast<int64_t>(pages.shape(0)), 6}, "pages");
        std::vector<std::vector<Pages>> of(static_cast<size_t>(layers * experts));
        for (size_t i = 0; i < pages.shape(0); ++i) {
            const int64_t* row = pages.data() + 6 * i;
            if (row[0] < 0 || row[0] >= layers || row[1] < 0 || row[1] >= experts || row[4] < 0 ||
                row[4] >= static_cast<int64_t>(files.size()))
                wrong("pages[" + std::to_string(i) + "] names a layer, an expert or a file that there is not");
            of[static_cast<size_t>(row[0] * experts + row[1])].push_back(
                {static_cast<uintptr_t>(row[2]), row[3], static_cast<int>(row[4]), row[5]});
        }
        residency_ = std::make_unique<ExpertResidency>(budget, experts, std::move(of), files);
    }

    ExpertResidency* of(const Model& model) const {
        if (static_cast<int64_t>(model.layers.size()) != layers_ || model.config.n_routed_experts != experts_)
            wrong("an expert residency of another model");
        return residency_.get();
    }

    nb::dict counts() const {
        const ResidencyCounts now = residency_->counts();
        nb::dict counts;
        counts["hits"] = now.hits;
        counts["misses"] = now.misses;
        counts["read_ahead_hits"] = now.read_ahead_hits;
        counts["bytes_read"] = now.bytes_read;
        counts["evictions"] = now.evictions;
        counts["resident_bytes"] = now.resident_bytes;
        counts["peak_bytes"] = now.peak_bytes;
        return counts;
    }

   private:
    int64_t layers_, experts_;
    nb::object owner_;                            // outlives the residency
    std::unique_ptr<ExpertResidency> residency_;  // declared last, ends first
};

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
        c.bf16 = nb::cast<bool>(config["bf16"]);
        if (c.hc_mult > MOST_STREAMS)
            wrong("hc_mult " + std::to_string(c.hc_mult) + ": the native kernels take at most " +
                  std::to_string(MOST_STREAMS));
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
            if (depth < 0) continue;
            const std::string mtp = "mtp." + std::to_string(depth) + ".";
            add_readout(mtp);
            model.mtp.push_back({contiguous(mtp + "enorm.weight", {c.hidden_size}),
                                 contiguous(mtp + "hnorm.weight", {c.hidden_size}),
                                 weight(mtp + "e_proj.weight", c.hidden_size, c.hidden_size),
                                 weight(mtp + "h_proj.weight", c.hidden_size, c.hidden_size)});
        }
        add_readout("");
        model.head = weight("head.weight", c.vocab_size, c.hidden_size);
    }

    // Limits the memory of the routed experts; keeps the residency alive.
    void limit_experts(nb::object residency) {
        model.residency = nb::cast<const NativeResidency&>(residency).of(model);
        residency_ = std::move(residency);
    }

    // Counts the tokens of each expert into an array [experts] per layer.
    void count_experts(std::vector<MutableLongs> load) {
        if (load.size() != model.layers.size())
            wrong(std::to_string(load.size()) + " counts of experts, the model has " +
                  std::to_string(model.layers.size()) + " layers");
        for (size_t l = 0; l < load.size(); ++l) {
            expect(load[l], {model.config.n_routed_experts}, "load[" + std::to_string(l) + "]");
            model.layers[l].load = load[l].data();
        }
        load_ = std::move(load);
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

    nb::object residency_;
    std::vector<MutableLongs> load_;
    std::map<std::string, Floats> floats_;
    std::map<std::string, Stored> stored_;
    std::map<std::string, Longs> tables_;
    std::map<std::string, Readout> readouts_;
};

}  // namespace dsv4
