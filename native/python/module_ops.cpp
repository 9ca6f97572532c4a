// Bindings of single operations: products with their gradients, and others that tests compare with the reference.
#include <nanobind/stl/optional.h>

#include <optional>

#include "python/arguments.h"

namespace dsv4 {
namespace {

using Logits = nb::ndarray<const float, nb::device::cpu, nb::c_contig>;
using MutableBf16 = nb::ndarray<int16_t, nb::device::cpu, nb::c_contig>;
using Words = nb::ndarray<const uint32_t, nb::device::cpu, nb::c_contig>;

void linear(const Floats& x, const nb::object& weight, MutableFloats y) {
    Stored held = stored_weight(weight, "weight");
    const Weight& w = held.view;
    expect_dimensions(x, 2, "x");
    int64_t n = static_cast<int64_t>(x.shape(0));
    expect(x, {n, w.in}, "x");
    expect(y, {n, w.out}, "y");
    if (n > 0 && w.in > 1 && x.stride(1) != 1) wrong("x: rows must be contiguous");
    Computing now;
    ops().linear({const_cast<float*>(x.data()), x.stride(0)}, n, w, {y.data(), w.out});
}

// Splits the rows of x and y into consecutive groups of `sizes` rows.
std::vector<Group> groups_of(const Floats& x, const Floats& y, const std::vector<int64_t>& sizes) {
    auto rows = [](const Floats& array, const char* name) {
        expect_dimensions(array, 2, name);
        expect_rows(array, static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1)), name);
        return Rows{const_cast<float*>(array.data()), array.stride(0)};
    };
    Rows from = rows(x, "x"), to = rows(y, "y");
    std::vector<Group> groups;
    int64_t total = 0;
    for (int64_t size : sizes) {
        if (size < 0) wrong("sizes: " + std::to_string(size));
        Group group{from, size, {}, to};
        group.x.data += total * from.stride;
        group.y.data += total * to.stride;
        group.w.in = static_cast<int64_t>(x.shape(1));
        group.w.out = static_cast<int64_t>(y.shape(1));
        groups.push_back(group);
        total += size;
    }
    if (total != static_cast<int64_t>(x.shape(0)) || total != static_cast<int64_t>(y.shape(0)))
        wrong("sizes add up to " + std::to_string(total) + " rows, x has " + std::to_string(x.shape(0)) + ", y " +
              std::to_string(y.shape(0)));
    return groups;
}

// Sets every group's weight; the return value keeps the weights alive.
std::vector<Stored> set_weights(std::vector<Group>& groups, const nb::list& weights) {
    if (weights.size() != groups.size())
        wrong(std::to_string(weights.size()) + " weights for " + std::to_string(groups.size()) + " groups");
    std::vector<Stored> held;
    for (size_t g = 0; g < groups.size(); ++g) {
        held.push_back(stored_weight(weights[g], "weight"));
        Weight& w = groups[g].w;
        const Weight& view = held.back().view;
        if (view.out != w.out || view.in != w.in)
            wrong("weight: shape " + shape_of({view.out, view.in}) + ", expected " + shape_of({w.out, w.in}));
        w = view;
    }
    return held;
}

void grouped_linear(const Floats& x, const std::vector<int64_t>& sizes, const nb::list& weights, MutableFloats y) {
    std::vector<Group> groups = groups_of(x, Floats(y), sizes);
    std::vector<Stored> held = set_weights(groups, weights);
    Computing now;
    ops().grouped_linear(groups.data(), static_cast<int64_t>(groups.size()));
}

void input_gradients(const Floats& dy, const std::vector<int64_t>& sizes, const nb::list& weights, MutableFloats dx,
                     bool bf16) {
    std::vector<Group> groups = groups_of(Floats(dx), dy, sizes);
    std::vector<Stored> held = set_weights(groups, weights);
    Computing now;
    ops().input_gradients(groups.data(), static_cast<int64_t>(groups.size()), bf16);
}

// Groups whose entry of `gradients` is None are skipped.
void weight_gradients(const Floats& dy, const Floats& x, const std::vector<int64_t>& sizes, const nb::list& gradients,
                      bool bf16) {
    std::vector<Group> groups = groups_of(x, dy, sizes);
    if (gradients.size() != groups.size())
        wrong(std::to_string(gradients.size()) + " gradients for " + std::to_string(groups.size()) + " groups");
    std::vector<float*> places;
    for (size_t g = 0; g < groups.size(); ++g) {
        float* place = nullptr;
        if (!gradients[g].is_none()) {
            auto array = nb::cast<MutableFloats>(gradients[g], false);
            expect(array, {groups[g].w.out, groups[g].w.in}, "gradient");
            place = array.data();
        }
        places.push_back(place);
    }
    Computing now;
    ops().weight_gradients(groups.data(), static_cast<int64_t>(groups.size()), places.data(), bf16);
}

// Rows and columns of a two-dimensional array.
std::pair<int64_t, int64_t> rows_of(const MutableFloats& array, const char* name) {
    expect_dimensions(array, 2, name);
    return {static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1))};
}

void rms_norm(MutableFloats x, nb::object weight, double eps, MutableFloats y) {
    auto [n, width] = rows_of(x, "x");
    expect(y, {n, width}, "y");
    Floats held;
    if (!weight.is_none()) {
        held = nb::cast<Floats>(weight);
        expect(held, {width}, "weight");
        if (width > 1 && held.stride(0) != 1) wrong("weight must be contiguous");
    }
    Computing now;
    ops().rms_norm(x.data(), weight.is_none() ? nullptr : held.data(), n, width, static_cast<float>(eps), y.data());
}

void sinkhorn(MutableFloats c, int64_t iters, double eps) {
    constexpr int64_t MOST = 64;
    expect_dimensions(c, 3, "c");
    int64_t n = static_cast<int64_t>(c.shape(0)), s = static_cast<int64_t>(c.shape(1));
    expect(c, {n, s, s}, "c");
    if (s > MOST) wrong("c: " + std::to_string(s) + " streams; allowed are at most " + std::to_string(MOST));
    Computing now;
    ops().sinkhorn(c.data(), n, s, iters, static_cast<float>(eps));
}

void exp_all(MutableFloats x, MutableFloats y) {
    expect(y, {static_cast<int64_t>(x.size())}, "y");
    Computing now;
    ops().exp(x.data(), static_cast<int64_t>(x.size()), y.data());
}

void fake_quant(MutableFloats x, int64_t block, bool fp4, float floor) {
    auto [n, width] = rows_of(x, "x");
    if (block < 1) wrong("block " + std::to_string(block) + ": allowed are 1 or more");
    Computing now;
    ops().fake_quant(x.data(), n, width, block, fp4, floor);
}

// Rows of an array of floats, which may have a stride, for an array of the same shape.
template <class Array>
Rows rows_for(const Floats& x, const Array& y) {
    expect_dimensions(x, 2, "x");
    const int64_t n = static_cast<int64_t>(x.shape(0)), width = static_cast<int64_t>(x.shape(1));
    expect_rows(x, n, width, "x");
    expect(y, {n, width}, "y");
    return {const_cast<float*>(x.data()), x.stride(0)};
}

void round_factors(const Floats& x, MutableFloats y) {
    const Rows rows = rows_for(x, y);
    Computing now;
    ops().round_factors(rows, static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), y.data());
}

void pack_factors(const Floats& x, MutableBf16 y) {
    const Rows rows = rows_for(x, y);
    Computing now;
    ops().pack_factors(rows, static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)),
                       reinterpret_cast<uint16_t*>(y.data()));
}

void hadamard(MutableFloats x) {
    auto [n, width] = rows_of(x, "x");
    if (width < 1 || (width & (width - 1)))
        wrong("x: " + std::to_string(width) + " channels; allowed are powers of two");
    Computing now;
    ops().hadamard(x.data(), n, width);
}

void top_k(MutableFloats scores, int64_t k, MutableLongs index) {
    auto [n, width] = rows_of(scores, "scores");
    if (k < 1 || k > width) wrong("k " + std::to_string(k) + ": allowed are 1 to " + std::to_string(width));
    expect(index, {n, k}, "index");
    Computing now;
    ops().top_k(scores.data(), n, width, k, index.data());
}

void index_top_k(MutableFloats q, MutableFloats weights, MutableFloats keys, int64_t start, int64_t k,
                 MutableLongs index) {
    if (q.ndim() != 3) wrong("q: " + std::to_string(q.ndim()) + " dimensions; allowed are 3");
    auto [entries, width] = rows_of(keys, "keys");
    const auto tokens = static_cast<int64_t>(q.shape(0)), heads = static_cast<int64_t>(q.shape(1));
    if (heads < 1 || width < 1)
        wrong("q: " + std::to_string(heads) + " heads of " + std::to_string(width) +
              " channels; allowed are 1 or more");
    expect(q, {tokens, heads, width}, "q");
    expect(weights, {tokens, heads}, "weights");
    if (k < 1) wrong("k " + std::to_string(k) + ": allowed are 1 or more");
    if (start < 0 || start > CSA.ratio * (entries + 1) - 1 - tokens)
        wrong("start " + std::to_string(start) + ": the keys end before the last token");
    expect(index, {tokens, k}, "index");
    Computing now;
    ops().index_top_k(q.data(), weights.data(), tokens, heads, width, keys.data(), start, k, index.data());
}

int64_t sample(const Logits& logits, const std::optional<Words>& allowed, double temperature, int64_t top_k,
               double top_p, double min_p, uint64_t key) {
    const auto vocab = static_cast<int64_t>(logits.size());
    expect(logits, {vocab}, "logits");
    if (vocab < 1) wrong("logits: none");
    if (allowed) expect(*allowed, {(vocab + 31) / 32}, "allowed");
    if (!(temperature >= 0.0)) wrong("temperature " + std::to_string(temperature) + ": allowed are 0 or more");
    if (top_k < 0) wrong("top_k " + std::to_string(top_k) + ": allowed are 0 or more");
    Computing now;
    const int64_t id = ops().sample(logits.data(), vocab, allowed ? allowed->data() : nullptr,
                                    {temperature, top_k, top_p, min_p}, key);
    if (id < 0) wrong("the mask allows no token; allowed: a mask with at least 1 token");
    return id;
}

}  // namespace

void define_ops(nb::module_& m) {
    m.def("linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("y").noconvert());
    m.def("grouped_linear", &grouped_linear, nb::arg("x"), nb::arg("sizes"), nb::arg("weights"),
          nb::arg("y").noconvert());
    m.def("input_gradients", &input_gradients, nb::arg("dy"), nb::arg("sizes"), nb::arg("weights"),
          nb::arg("dx").noconvert(), nb::arg("bf16") = false);
    m.def("weight_gradients", &weight_gradients, nb::arg("dy"), nb::arg("x"), nb::arg("sizes"), nb::arg("gradients"),
          nb::arg("bf16") = false);
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight").none(), nb::arg("eps"), nb::arg("y").noconvert());
    m.def("sinkhorn", &sinkhorn, nb::arg("c").noconvert(), nb::arg("iters"), nb::arg("eps"));
    m.def("exp", &exp_all, nb::arg("x"), nb::arg("y").noconvert());
    m.def("fake_quant", &fake_quant, nb::arg("x").noconvert(), nb::arg("block"), nb::arg("fp4"),
          nb::arg("floor") = 1e-4f);
    m.def("round_factors", &round_factors, nb::arg("x"), nb::arg("y").noconvert());
    m.def("pack_factors", &pack_factors, nb::arg("x"), nb::arg("y").noconvert());
    m.def("hadamard", &hadamard, nb::arg("x").noconvert());
    m.def("top_k", &top_k, nb::arg("scores"), nb::arg("k"), nb::arg("index").noconvert());
    m.def("sample", &sample, nb::arg("logits"), nb::arg("allowed").none(), nb::arg("temperature"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("min_p"), nb::arg("key"));
    m.def("index_top_k", &index_top_k, nb::arg("q"), nb::arg("weights"), nb::arg("keys"), nb::arg("start"),
          nb::arg("k"), nb::arg("index").noconvert());
}

}  // namespace dsv4
