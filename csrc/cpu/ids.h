// Which random words a tensor and an expert take: their numbers in the counter of philox.h.
#pragma once
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "../check.h"

namespace sk {

// 0, 1, ... where none are given.
inline std::vector<uint32_t> ids(const std::optional<std::vector<int64_t>>& given, size_t count, const char* argument,
                                 const char* of) {
  std::vector<uint32_t> found(count);
  std::iota(found.begin(), found.end(), 0);
  if (!given) return found;
  require(given->size() == count, argument, " must be one number for every ", of, " (", count, "), got ",
          given->size());
  for (size_t i = 0; i < count; ++i) {
    const int64_t id = (*given)[i];
    require(id >= 0 && id <= int64_t(UINT32_MAX), argument, " must be in [0, 2**32), got ", id);
    found[i] = uint32_t(id);
  }
  return found;
}

}  // namespace sk
