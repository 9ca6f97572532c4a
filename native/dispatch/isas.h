// Instruction sets that this machine supports, and the selected one.
#pragma once

#include <string>
#include <vector>

#include "dispatch/ops.h"

namespace dsv4 {

struct Isa {
    std::string name;
    const Ops* ops;
};

// Instruction sets of this machine, fastest last.
const std::vector<Isa>& isas();

// Kernels of the selected instruction set, by default the fastest.
const Ops& ops();

// Selects an instruction set; std::invalid_argument if the machine does not support it.
void use_isa(const std::string& name);

}  // namespace dsv4
