// Measures on this processor if BF16 pairs are faster than fp32.
#pragma once

#include <algorithm>
#include <chrono>

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512_BF16)

// clang-format off
#define DSV4_CHAIN(instruction, to) instruction " %%zmm12, %%zmm12, %%zmm" #to "\n\t"
#define DSV4_CHAINS(instruction) \
    DSV4_CHAIN(instruction, 0) DSV4_CHAIN(instruction, 1) DSV4_CHAIN(instruction, 2) DSV4_CHAIN(instruction, 3) \
    DSV4_CHAIN(instruction, 4) DSV4_CHAIN(instruction, 5) DSV4_CHAIN(instruction, 6) DSV4_CHAIN(instruction, 7) \
    DSV4_CHAIN(instruction, 8) DSV4_CHAIN(instruction, 9) DSV4_CHAIN(instruction, 10) DSV4_CHAIN(instruction, 11)

// Runs twelve independent chains of zeros, more than the latency of either instruction needs to keep its units busy.
#define DSV4_RUN(instruction, times) \
    do { \
        int64_t left = times; \
        asm volatile("vpxord %%zmm12, %%zmm12, %%zmm12\n\t" DSV4_CHAINS("vpxord") "1:\n\t" DSV4_CHAINS(instruction) \
                     "dec %0\n\tjnz 1b\n\tvzeroupper" \
                     : "+r"(left) \
                     : \
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                       "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"); \
    } while (false)
// clang-format on

// VDPBF16PS does twice the products of an fp32 multiply-add, but on one Intel server processor took four times as long.
// So both are timed, for some hundreds of microseconds. Only speed depends on the answer.
inline bool pairs_are_faster() {
    constexpr int64_t TIMES = 1000;
    constexpr int ROUNDS = 20;
    using Clock = std::chrono::steady_clock;
    Clock::duration numbers = Clock::duration::max(), pairs = numbers;
    for (int round = 0; round < ROUNDS; ++round) {
        const auto begin = Clock::now();
        DSV4_RUN("vfmadd231ps", TIMES);
        const auto middle = Clock::now();
        DSV4_RUN("vdpbf16ps", TIMES);
        numbers = std::min(numbers, middle - begin);
        pairs = std::min(pairs, Clock::now() - middle);
    }
    return 5 * pairs < 8 * numbers;  // true if pairs give at least a quarter more products per second
}

#undef DSV4_RUN
#undef DSV4_CHAINS
#undef DSV4_CHAIN

#endif

}  // namespace dsv4::DSV4_ISA
