#include "trim_histogram.h"

#include <algorithm>
#include <mutex>

#include "select.h"
#include "trim_keys.h"

namespace sk {

template <class Key>
std::vector<Key> histogram_thresholds(const Scope& scope, const std::vector<int64_t>& tasks, std::vector<int64_t> rank,
                                      bool drop) {
  const size_t slots = tasks.size();
  std::vector<Radix<Key>> range(slots, Radix<Key>(0, kMaxKey<Key>));
  const auto open = [](const Radix<Key>& r) { return r.lo != r.hi; };
  while (std::any_of(range.begin(), range.end(), open)) {
    std::vector<std::vector<int64_t>> histogram(slots, std::vector<int64_t>(size_t(1) << kRadixBits));
    std::mutex mutex;
    scope.parallel([&](int64_t first, int64_t last) {
      std::vector<std::vector<int64_t>> mine(slots, std::vector<int64_t>(size_t(1) << kRadixBits));
      std::vector<Key> keys(kChunk + kSlack);
      KeyReader<Key> reader(scope);
      for (int64_t c = first; c < last; ++c) {
        const Chunk chunk = scope.chunk(c);
        reader.move_to(chunk.part, chunk.begin, chunk.count);
        for (size_t s = 0; s < slots; ++s) {
          reader.kernel().keys(reader.base(), reader.expert(tasks[s]), chunk.count, drop, keys.data());
          for (int64_t i = 0; i < chunk.count; ++i)
            if (range[s].holds(keys[i])) ++mine[s][range[s].bin(keys[i])];
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t s = 0; s < slots; ++s)
        for (size_t b = 0; b < mine[s].size(); ++b) histogram[s][b] += mine[s][b];
    });
    for (size_t s = 0; s < slots; ++s)
      if (open(range[s])) range[s] = range[s].descend(histogram[s].data(), rank[s]);
  }
  std::vector<Key> thresholds;
  for (const auto& r : range) thresholds.push_back(r.lo);
  return thresholds;
}

#define SK_INSTANTIATE(Key) \
  template std::vector<Key> histogram_thresholds(const Scope&, const std::vector<int64_t>&, std::vector<int64_t>, bool);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
