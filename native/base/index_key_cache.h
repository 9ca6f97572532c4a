// A layer's index keys, quantized for the indexer's filter and kept beside the entries, in panels of 16 rows.
//
// The entries are authoritative. Panels are re-quantized lazily after a write; whoever writes to the entries calls
// `invalidate`.
#pragma once

#include <vector>

#include "base/aligned.h"

namespace dsv4 {

class IndexKeyCache {
   public:
    static constexpr int64_t ROWS = 16;  // of a panel
    struct Bounds {
        float square = 0.0f, step = 0.0f;  // the largest squared norm and step of a panel's keys
    };

    explicit IndexKeyCache(int64_t rows) : panels_((rows + ROWS - 1) / ROWS), valid_(static_cast<size_t>(panels_)) {}

    // To be called after row `row` of the entries was written, or after any may have been.
    void invalidate(int64_t row) {
        uint8_t& valid = valid_[static_cast<size_t>(row / ROWS)];
        valid = std::min(valid, static_cast<uint8_t>(row % ROWS));
    }
    void invalidate() { std::fill(valid_.begin(), valid_.end(), uint8_t{0}); }

    // Memory for panels of `words` 16-bit values.
    void reserve(int64_t words) {
        if (words == words_) return;
        memory_.reserve(panels_ * words);
        steps_.reserve(panels_ * ROWS);
        bounds_.resize(static_cast<size_t>(panels_));
        words_ = words;
        invalidate();
    }

    // Number of up-to-date rows of a panel, the first ones.
    uint8_t& valid_rows(int64_t panel) { return valid_[static_cast<size_t>(panel)]; }
    Bounds& bounds(int64_t panel) { return bounds_[static_cast<size_t>(panel)]; }
    uint16_t* panel(int64_t panel) { return memory_.data() + panel * words_; }
    // Steps of a panel's keys: a key is about its step times its quantized values.
    float* steps(int64_t panel) { return steps_.data() + panel * ROWS; }

   private:
    int64_t panels_, words_ = 0;
    std::vector<uint8_t> valid_;
    std::vector<Bounds> bounds_;
    Aligned<uint16_t> memory_;
    Aligned<float> steps_;
};

}  // namespace dsv4
