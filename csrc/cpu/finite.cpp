#include "finite.h"

#include <algorithm>
#include <numeric>

#include "../check.h"
#include "trim_tally.h"

namespace sk {
namespace {

std::string where(const std::vector<std::string>& names, size_t part) {
  return part < names.size() ? " in tensor '" + names[part] + "'" : "";
}

}  // namespace

template <class Key>
void check_finite(const Scope& scope, const std::vector<std::string>& names) {
  std::vector<int64_t> tasks(scope.num_tasks);
  std::iota(tasks.begin(), tasks.end(), 0);
  const Key most = kMaxKey<Key>;
  const std::vector<Bracket<Key>> nothing(tasks.size(), {most, most, most, most});
  const Tally<Key> tally = count(scope, tasks, nothing, /*drop=*/false, Wanted::nothing);
  if (is_finite(scope, tally)) return;

  const auto nonfinite = [&](const Part& part, const char* base, const char* tensor) {
    int64_t found = 0;
    std::vector<Key> keys(kChunk + kSlack);
    for (int64_t i = 0; i < part.numel; i += kChunk) {
      const int64_t n = std::min(kChunk, part.numel - i), at = i * size_of(part.dtype);
      SK_KERNELS(trim_kernels)
          .get<Key>(part.dtype)
          .keys(base ? base + at : nullptr, tensor + at, n, false, keys.data());
      found += std::count_if(keys.begin(), keys.begin() + n, [](Key key) { return key >= kInfinityKey<Key>; });
    }
    return found;
  };
  for (size_t p = 0; p < scope.parts.size(); ++p) {
    const Part& part = scope.parts[p];
    if (part.base) {
      const int64_t n = nonfinite(part, nullptr, part.base);
      require(n == 0, "base must be finite, got ", n, " NaN or infinite values", where(names, p));
    }
    for (int64_t t = 0; t < scope.num_tasks; ++t) {
      int64_t n = nonfinite(part, nullptr, part.experts[t]);
      require(n == 0, "experts[", t, "] must be finite, got ", n, " NaN or infinite values", where(names, p));
      n = nonfinite(part, part.base, part.experts[t]);
      require(n == 0, "experts[", t, "] - base must be finite, got ", n, " overflows", where(names, p));
    }
  }
}

#define SK_INSTANTIATE(Key) template void check_finite<Key>(const Scope&, const std::vector<std::string>&);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
