// From which size on a TIES merge reads its inputs once: what is less is read a second time faster than a better guess
// is made and corrected. Inputs of 16 bits do not count: there arithmetic takes the time, not reading.
#pragma once
#include <cstdint>

namespace sk {

int64_t one_read_from();  // bytes of inputs
// Test only: returns what it was.
int64_t set_one_read_from(int64_t nbytes);

}  // namespace sk
