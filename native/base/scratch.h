// Memory of a thread, reused from call to call.
#pragma once

#include "base/aligned.h"

namespace dsv4::DSV4_ISA {

// One buffer per name and thread.
enum class Scratch { packed, panel, scores, index_dots, index_scores, staging, lanes, rows, count };

inline std::byte* scratch_bytes(Scratch buffer, int64_t bytes) {
    thread_local Aligned<std::byte> buffers[static_cast<int>(Scratch::count)];
    return buffers[static_cast<int>(buffer)].reserve(bytes);
}

// `size` values in this thread's buffer of that name, from the beginning of a cache line on, until the thread asks for
// it again.
template <class T = float>
inline T* scratch(Scratch buffer, int64_t size) {
    return reinterpret_cast<T*>(scratch_bytes(buffer, size * static_cast<int64_t>(sizeof(T))));
}

}  // namespace dsv4::DSV4_ISA
