#include "dispatch/isas.h"

#include <stdexcept>
#include <utility>

#if DSV4_HAS_X86
#include <cpuid.h>
#endif
#if DSV4_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsv4 {
namespace {

const Ops* selected = nullptr;

#if DSV4_HAS_X86
// True if the processor converts 16-bit floats. Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if DSV4_HAS_AMX
// True if the processor has BF16 tiles and AVX-512 VBMI and Linux permits this process to use the tiles. Threads
// created later inherit the permission.
bool has_amx() {
    constexpr unsigned TILES = 1u << 24, BF16_TILES = 1u << 22, AVX512_VBMI = 1u << 1;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (TILES | BF16_TILES)) != (TILES | BF16_TILES)) return false;
    if (!(c & AVX512_VBMI)) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
#endif

}  // namespace

const std::vector<Isa>& isas() {
    static const std::vector<Isa> found = [] {
        std::vector<Isa> list{{"portable", &portable_ops()}};
#if DSV4_HAS_X86
        const bool vectors = __builtin_cpu_supports("fma") && has_f16c();
        if (vectors && __builtin_cpu_supports("avx2")) list.push_back({"avx2", &avx2_ops()});
        if (vectors && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            list.push_back({"avx512", &avx512_ops()});
        const bool vnni = list.back().name == "avx512" && __builtin_cpu_supports("avx512vnni");
        if (vnni) list.push_back({"avx512_vnni", &avx512_vnni_ops()});
        const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
        if (bf16) {
            list.push_back({"avx512_bf16", &avx512_bf16_ops()});
            if (!bf16_pairs_are_faster()) std::swap(list.end()[-1], list.end()[-2]);
        }
#if DSV4_HAS_AMX
        if (bf16 && has_amx()) list.push_back({"amx", &amx_ops()});
#endif
#endif
        return list;
    }();
    return found;
}

const Ops& ops() { return selected ? *selected : *isas().back().ops; }

void use_isa(const std::string& name) {
    for (const Isa& isa : isas())
        if (isa.name == name) {
            selected = isa.ops;
            return;
        }
    throw std::invalid_argument("instruction set " + name + " does not run on this machine");
}

}  // namespace dsv4
