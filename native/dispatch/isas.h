// The instruction sets that this machine runs, and the selected one.
#pragma once

#include <string>
#include <vector>

#include "dispatch/ops.h"

namespace dsv4 {

struct Isa {
    std::string name;
    const Ops* ops;
};

// The instruction sets of this machine, the fastest last.
const std::vector<Isa>& isas();

// Kernels of the selected instruction set, by default the fastest.
const Ops& ops();

// Selects one; std::invalid_argument if the machine does not run it.
void use_isa(const std::string& name);

}  // namespace dsv4
