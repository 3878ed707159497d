// From which size on a TIES merge reads its inputs once: what is less stays in the caches for the second read, which
// takes less time than a better guess and what is left to correct.
#pragma once
#include <cstdint>

namespace sk {

int64_t one_read_from();  // bytes of inputs
// Test only: returns what it was.
int64_t set_one_read_from(int64_t nbytes);

}  // namespace sk
