#include "rank.h"

#include <algorithm>
#include <array>

namespace sk {

template <class Key>
const typename RowOrder<Key>::Entry* RowOrder<Key>::sort(const Key* keys, int64_t size) {
  constexpr int kDigits = sizeof(Key), kBits = 8;
  constexpr int64_t kShort = 96;  // from here on counting is faster than comparing
  const auto digit = [](Key key, int d) { return size_t(key >> (d * kBits) & 0xFF); };
  entries_.resize(size_t(size));
  sorted_.resize(size_t(size));
  for (int64_t i = 0; i < size; ++i) entries_[size_t(i)] = {keys[i], uint32_t(i)};
  if (size < kShort) {
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; });
  } else {
    std::array<std::array<uint32_t, 1 << kBits>, kDigits> places{};
    for (int64_t i = 0; i < size; ++i)
      for (int d = 0; d < kDigits; ++d) ++places[size_t(d)][digit(keys[i], d)];
    for (int d = 0; d < kDigits; ++d) {
      auto& place = places[size_t(d)];
      if (place[digit(keys[0], d)] == uint32_t(size)) continue;  // the same digit everywhere
      uint32_t before = 0;
      for (uint32_t& p : place) {
        const uint32_t count = p;
        p = before;
        before += count;
      }
      for (const Entry& entry : entries_) sorted_[place[digit(entry.key, d)]++] = entry;
      entries_.swap(sorted_);
    }
  }
  return entries_.data();
}

template class RowOrder<int32_t>;
template class RowOrder<int64_t>;

}  // namespace sk
