// The options of a trim, parsed, and how many entries it keeps.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "check.h"

namespace sk {

enum class Semantics { paper, mergekit, peft, exact };
enum class NonFinite { error, propagate, drop };

inline Semantics parse_semantics(const std::string& name) {
  return Semantics(one_of("semantics", name, {"paper", "mergekit", "peft", "exact"}));
}
inline NonFinite parse_nonfinite(const std::string& name) {
  return NonFinite(one_of("nonfinite", name, {"error", "propagate", "drop"}));
}

inline int64_t keep_count(double density, int64_t numel, Semantics semantics) {
  if (density >= 1) return numel;
  const int64_t floor = int64_t(density * double(numel));
  if (semantics == Semantics::paper) return std::min(floor + 1, numel);
  return semantics == Semantics::peft ? floor : std::max<int64_t>(1, floor);
}

}  // namespace sk
