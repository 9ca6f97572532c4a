// Per-thread scratch memory, reused from call to call.
#pragma once

#include "base/aligned.h"

namespace dsv4::DSV4_ISA {

// One buffer per name and thread.
enum class Scratch {
    packed,
    panel,
    scores,
    index_dots,
    index_scores,
    index_panels,
    staging,
    lanes,
    rows,
    window_keys,
    entries,
    index_keys,
    sinkhorn_steps,
    stream_read,
    probabilities,
    score_gradients,
    key_channels,
    query_channels,
    output_channels,
    key_gradients,
    count
};

inline std::byte* scratch_bytes(Scratch buffer, int64_t bytes) {
    thread_local Aligned<std::byte> buffers[static_cast<int>(Scratch::count)];
    return buffers[static_cast<int>(buffer)].reserve(bytes);
}

// Returns `size` values of this thread's buffer of that name, aligned to a cache line; valid until the thread's next
// call with the same name.
template <class T = float>
inline T* scratch(Scratch buffer, int64_t size) {
    return reinterpret_cast<T*>(scratch_bytes(buffer, size * static_cast<int64_t>(sizeof(T))));
}

}  // namespace dsv4::DSV4_ISA
