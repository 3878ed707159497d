// Memory maps of files that calls read: pages they went past need not stay with the process.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace sk {

constexpr int64_t kGiveBackBytes = 64 << 20;  // read between two times that pages are given back

using Range = std::pair<uintptr_t, int64_t>;  // address and bytes

// Read-only, shared maps of files, whose pages come back from the page cache when they are read again; never memory of
// any other kind, which would lose what is in it. They must stay mapped until others, or none, are set.
void set_mapped(const std::vector<Range>& ranges);

// Takes the pages of those maps out of the process; any thread, any time.
void give_back_mapped();

}  // namespace sk
