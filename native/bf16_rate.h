// Whether BF16 pairs pay on this processor.
#pragma once

#include <algorithm>
#include <chrono>

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512_BF16)

// Twelve chains, more than the latency of either instruction takes to fill its units; all numbers are zero.
#define DSV4_CHAIN(instruction, to) instruction " %%zmm12, %%zmm12, %%zmm" #to "\n\t"
#define DSV4_CHAINS(instruction)                                                                        \
    DSV4_CHAIN(instruction, 0) DSV4_CHAIN(instruction, 1) DSV4_CHAIN(instruction, 2) DSV4_CHAIN(instruction, 3) \
    DSV4_CHAIN(instruction, 4) DSV4_CHAIN(instruction, 5) DSV4_CHAIN(instruction, 6) DSV4_CHAIN(instruction, 7) \
    DSV4_CHAIN(instruction, 8) DSV4_CHAIN(instruction, 9) DSV4_CHAIN(instruction, 10) DSV4_CHAIN(instruction, 11)
#define DSV4_CLOBBERED \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12"

// An instruction for pairs does two products, and takes as long as one in fp32 (AMD) to four times as long (Intel): timed, for some
// tens of microseconds. Nothing but the speed depends on what this says.
inline bool pairs_are_quicker() {
    constexpr int TIMES = 200, ROUNDS = 20;
    auto best = [](auto run) {
        auto least = std::chrono::steady_clock::duration::max();
        for (int round = 0; round < ROUNDS; ++round) {
            const auto begin = std::chrono::steady_clock::now();
            for (int i = 0; i < TIMES; ++i) run();
            least = std::min(least, std::chrono::steady_clock::now() - begin);
        }
        return least;
    };
    asm volatile("vpxord %%zmm12, %%zmm12, %%zmm12\n\t" DSV4_CHAINS("vpxord")::: DSV4_CLOBBERED);
    const auto numbers = best([] { asm volatile(DSV4_CHAINS("vfmadd231ps")::: DSV4_CLOBBERED); });
    const auto pairs = best([] { asm volatile(DSV4_CHAINS("vdpbf16ps")::: DSV4_CLOBBERED); });
    return 5 * pairs < 8 * numbers;  // from a quarter more products a second on
}

#undef DSV4_CLOBBERED
#undef DSV4_CHAINS
#undef DSV4_CHAIN

#endif

}  // namespace dsv4::DSV4_ISA
