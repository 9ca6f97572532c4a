// A layer's index keys, rounded as the indexer's filter reads them: kept beside the entries, panel by panel of 16 rows.
//
// The entries are the truth. A panel is rounded when it is read and was not since one of its rows was written; whoever writes
// to the entries says so with `forget`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace dsv4 {

class KeptKeys {
   public:
    static constexpr int64_t ROWS = 16;  // of a panel
    struct Bounds {
        float square = 0.0f, step = 0.0f;  // the largest of a panel's keys
    };

    explicit KeptKeys(int64_t rows) : panels_((rows + ROWS - 1) / ROWS), known_(static_cast<size_t>(panels_)) {}

    // Row `row` has changed.
    void forget(int64_t row) {
        uint8_t& known = known_[static_cast<size_t>(row / ROWS)];
        known = std::min(known, static_cast<uint8_t>(row % ROWS));
    }
    void forget() { std::fill(known_.begin(), known_.end(), uint8_t{0}); }

    // Memory for panels of so many 16-bit words, each from the beginning of a cache line on. The system hands it out when it is
    // first written.
    void open(int64_t words) {
        if (words == words_) return;
        const size_t bytes = static_cast<size_t>(panels_ * words) * sizeof(uint16_t) + 64;
        memory_.reset(std::calloc(bytes, 1));
        steps_.reset(static_cast<float*>(std::calloc(static_cast<size_t>(panels_ * ROWS), sizeof(float))));
        if (!memory_ || !steps_) throw std::bad_alloc();
        bounds_.resize(static_cast<size_t>(panels_));
        first_ = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
        words_ = words;
        forget();
    }

    uint8_t& known(int64_t panel) { return known_[static_cast<size_t>(panel)]; }  // so many rows of it are rounded as they are
    Bounds& bounds(int64_t panel) { return bounds_[static_cast<size_t>(panel)]; }
    uint16_t* words(int64_t panel) { return first_ + panel * words_; }
    float* steps(int64_t panel) { return steps_.get() + panel * ROWS; }  // a key is its step times the rounded one

   private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    int64_t panels_, words_ = 0;
    std::vector<uint8_t> known_;
    std::vector<Bounds> bounds_;
    std::unique_ptr<void, Free> memory_;
    std::unique_ptr<float, Free> steps_;
    uint16_t* first_ = nullptr;
};

}  // namespace dsv4
