// All kernels of one instruction set; compiled once per instruction set, DSV4_ISA being its name.
#include "dispatch/bf16_rate.h"
#include "dispatch/ops.h"
#include "dispatch/single_ops.h"
#include "dispatch/training.h"
#include "gemm/gemm_backward.h"
#include "model/forward.h"
#include "model/sampling.h"

namespace dsv4 {
namespace DSV4_ISA {
namespace {

void head(const Model& model, const Readout& readout, const float* streams, int64_t n, float* logits) {
    const Config& c = model.config;
    int64_t s = c.hc_mult, d = c.hidden_size;
    std::vector<float> x(static_cast<size_t>(n * d));
    for_each_row(n, [&](int64_t row) {
        float* to = x.data() + row * d;
        read_out_token(c, readout.site, streams + row * s * d, to);
        rms_norm(to, readout.norm, d, static_cast<float>(c.rms_norm_eps), to);
    });
    Product product{{x.data(), d}, &model.head, {logits, model.head.out}};
    products(&product, 1, n);
}

void linear(const Rows& x, int64_t n, const Weight& w, const Rows& y) {
    Product product{x, &w, y};
    products(&product, 1, n);
}

void rms_norm_rows(const float* x, const float* weight, int64_t n, int64_t width, float eps, float* y) {
    for_each_row(n, [&](int64_t row) { rms_norm(x + row * width, weight, width, eps, y + row * width); });
}

void sinkhorn_rows(float* c, int64_t n, int64_t s, int64_t iters, float eps) {
    for_each_row(n, [&](int64_t row) {
        s == 4 ? sinkhorn4(c + row * 16, iters, eps) : sinkhorn(c + row * s * s, s, iters, eps);
    });
}

void exp_all(const float* x, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
        store_n(y + i, exp(load_n(x + i, left)), left);
    }
}

void fake_quant_rows(float* x, int64_t n, int64_t width, int64_t block, bool fp4, float floor) {
    for_each_row(n, [&](int64_t row) {
        fp4 ? fake_quant_fp4(x + row * width, width, block) : fake_quant_fp8(x + row * width, width, block, floor);
    });
}

void round_factor_rows(const Rows& x, int64_t n, int64_t width, float* y) {
    for_each_row(n, [&](int64_t row) { round_factors(x.data + row * x.stride, width, y + row * width); });
}

void pack_factor_rows(const Rows& x, int64_t n, int64_t width, uint16_t* y) {
    for_each_row(n, [&](int64_t row) { pack_factors(x.data + row * x.stride, width, y + row * width); });
}

void hadamard_rows(float* x, int64_t n, int64_t width) {
    for_each_row(n, [&](int64_t row) { hadamard(x + row * width, width); });
}

void top_k_rows(const float* scores, int64_t n, int64_t width, int64_t k, int64_t* index) {
    for_each_row(n, [&](int64_t row) {
        thread_local std::vector<int32_t> best;
        best.resize(static_cast<size_t>(k));
        top_k(scores + row * width, width, k, best.data());
        std::copy(best.begin(), best.end(), index + row * k);
    });
}

void index_top_k(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width,
                 const float* index_keys, int64_t start, int64_t k, int64_t* index) {
    std::vector<int64_t> pages(static_cast<size_t>((start + tokens) / PAGE_TOKENS + 1));
    std::iota(pages.begin(), pages.end(), 0);
    Cache cache;
    cache.block_table = pages.data();
    cache.pages_per_slot = static_cast<int64_t>(pages.size());
    std::vector<int32_t> selected(static_cast<size_t>(tokens * k), -1);
    Buffers buffers;
    IndexKeyCache index_key_cache(cache.pages_per_slot * (PAGE_TOKENS / CSA.ratio), false);
    const EntrySelection selection{
        q, weights, heads, width, k, Entries(float_rows(index_keys, width), cache, 0, CSA.ratio), &index_key_cache};
    select_entries({{{0, tokens, start, 0}, selection, selected.data()}}, buffers);
    std::copy(selected.begin(), selected.end(), index);
}

}  // namespace
}  // namespace DSV4_ISA

#define DSV4_JOIN2(a, b) a##b
#define DSV4_JOIN(a, b) DSV4_JOIN2(a, b)

const Ops& DSV4_JOIN(DSV4_ISA, _ops)() {
    using namespace DSV4_ISA;
    static const Ops ops{forward,          fuse_mtp_input,   head,
                         linear,           grouped_products, input_gradients,
                         weight_gradients, rms_norm_rows,    sinkhorn_rows,
                         exp_all,          fake_quant_rows,  round_factor_rows,
                         pack_factor_rows, hadamard_rows,    top_k_rows,
                         index_top_k,      sample_row,       single_hc_pre,
                         single_hc_post,   single_route,     single_compress,
                         single_attend,    single_swiglu,    single_rotation,
                         single_rotate,    training_ops()};
    return ops;
}

#if defined(DSV4_ISA_AVX512_BF16)
bool bf16_pairs_are_faster() { return avx512_bf16::pairs_are_faster(); }
#endif

}  // namespace dsv4
