// SIGBUS handler: explains on stderr that a memory-mapped file was truncated, before the process dies.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsv4 {

// Addresses [first, last) of a mapped file, and the line to write when reading one of them fails.
struct MappedRange {
    uintptr_t first, last;
    std::string line;
};

// Watches these ranges instead of those of the previous call. After the line the previous SIGBUS handler runs; the
// default one ends the process.
void watch_bus_errors(std::vector<MappedRange> ranges);

}  // namespace dsv4
