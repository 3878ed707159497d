#include "trim_tally.h"

#include <mutex>

#include "trim_keys.h"

namespace sk {
namespace {

constexpr int64_t kMaxInside = 1 << 20;    // candidates one thread stores, beyond a share of its elements
constexpr int64_t kMostInside = 48 << 20;  // candidates of a call: a scope may be larger than the memory

}  // namespace

template <class Key>
Tally<Key> count(const Scope& scope, std::vector<int64_t> tasks, std::vector<Bracket<Key>> brackets, bool drop,
                 Wanted wanted, const Beside& beside) {
  const size_t slots = tasks.size();
  Tally<Key> tally{std::move(tasks), std::move(brackets), std::vector<Counts<Key>>(slots), {}, {}};
  if (wanted != Wanted::nothing) tally.ties.resize(size_t(scope.num_chunks) * slots);
  std::mutex mutex;
  scope.parallel([&](int64_t first, int64_t last) {
    typename Tally<Key>::Range range{first, last, std::vector<KeyBuffer<Key>>(slots),
                                     std::vector<KeyBuffer<Key>>(slots), std::vector<char>(slots)};
    std::vector<Counts<Key>> totals(slots);
    KeyReader<Key> reader(scope);
    const auto also = beside ? beside() : nullptr;
    const int64_t most = std::min(
        kMaxInside / int64_t(slots) + (last - first) * (kChunk / 16),
        kChunk + int64_t(double(kMostInside) / double(slots) * double(last - first) / double(scope.num_chunks)));
    for (int64_t c = first; c < last; ++c) {
      const Chunk chunk = scope.chunk(c);
      reader.move_to(chunk.part, chunk.begin, chunk.count);
      const TrimKernel<Key>& kernel = reader.kernel();
      for (size_t s = 0; s < slots; ++s) {
        KeyBuffer<Key>&inside = range.inside[s], &at = range.at[s];
        Key* const keys = inside.room(chunk.count + kSlack);
        const void* const expert = reader.expert(tally.tasks[s]);
        const Bracket<Key>& bracket = tally.brackets[s];
        const Counts<Key> n = wanted == Wanted::places
                                  ? kernel.locate(reader.base(), expert, chunk.count, bracket, scope.mixed, drop, keys,
                                                  at.room(chunk.count + kSlack))
                                  : kernel.count(reader.base(), expert, chunk.count, bracket, scope.mixed, drop, keys);
        inside.size += n.inside;
        at.size = inside.size;
        if (inside.size > most) {
          range.overflowed[s] = true;
          inside.size = at.size = 0;
        }
        totals[s] += n;
        if (wanted != Wanted::nothing)
          tally.ties[c * slots + s] = {uint16_t(n.at_hi), uint16_t(n.inside), uint16_t(n.at_lo)};
      }
      if (also) also(c);
      scope.report(chunk);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t s = 0; s < slots; ++s) tally.totals[s] += totals[s];
    tally.ranges.push_back(std::move(range));
  });
  std::sort(tally.ranges.begin(), tally.ranges.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return tally;
}

#define SK_INSTANTIATE(Key) \
  template Tally<Key> count(const Scope&, std::vector<int64_t>, std::vector<Bracket<Key>>, bool, Wanted, const Beside&);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
