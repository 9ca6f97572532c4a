// Memory that begins on a cache line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dsv4 {

template <class T>
class Aligned {
   public:
    // Returns memory for at least `count` values. When it grows, it is zeroed and the old values are lost; the system
    // maps its pages on first write.
    T* reserve(int64_t count) {
        if (count > capacity_) {
            const int64_t capacity = std::max(count, capacity_ + capacity_ / 4);
            memory_.reset(std::calloc(static_cast<size_t>(capacity) * sizeof(T) + LINE, 1));
            if (!memory_) throw std::bad_alloc();
            begin_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + LINE - 1) / LINE * LINE);
            capacity_ = capacity;
        }
        return begin_;
    }
    T* data() const { return begin_; }

   private:
    static constexpr size_t LINE = 64;
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    T* begin_ = nullptr;
    int64_t capacity_ = 0;
};

}  // namespace dsv4
