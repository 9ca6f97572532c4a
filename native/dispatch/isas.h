// The instruction sets that this machine runs, and the one that is chosen.
#pragma once

#include <string>
#include <vector>

#include "dispatch/ops.h"

namespace dsv4 {

struct Isa {
    std::string name;
    const Ops* ops;
};

// Those that this machine runs, the best last.
const std::vector<Isa>& isas();

// The chosen one's kernels; before a choice the best one's.
const Ops& ops();

// std::invalid_argument when the machine does not run it.
void use_isa(const std::string& name);

}  // namespace dsv4
