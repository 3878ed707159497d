// One read of a scope: the keys of every expert counted on each side of its bracket, and those inside it stored.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "rounding.h"
#include "scope.h"
#include "trim_kernel.h"

namespace sk {

// Keys appended chunk by chunk, never initialised.
template <class Key>
struct KeyBuffer {
  std::unique_ptr<Key[]> data;
  int64_t size = 0, capacity = 0;

  Key* room(int64_t count) {
    if (size + count > capacity) {
      capacity = std::max(capacity + capacity / 2, size + count);
      std::unique_ptr<Key[]> larger(new Key[capacity]);
      std::copy_n(data.get(), size, larger.get());
      data = std::move(larger);
    }
    return data.get() + size;
  }
};

struct ChunkTies {
  uint16_t at_hi, inside, at_lo;
};

// What one read says of some experts; slot s of everything belongs to tasks[s].
template <class Key>
struct Tally {
  struct Range {
    int64_t first, last;                 // chunks
    std::vector<KeyBuffer<Key>> inside;  // [slots]
    std::vector<KeyBuffer<Key>> at;      // [slots] their indices within their chunks, where wanted
    std::vector<char> overflowed;        // [slots]
  };
  std::vector<int64_t> tasks;
  std::vector<Bracket<Key>> brackets;
  std::vector<Counts<Key>> totals;
  std::vector<Range> ranges;    // in chunk order
  std::vector<ChunkTies> ties;  // [num_chunks, slots], empty unless wanted
};

// What a read is to find besides the counts.
enum class Wanted {
  nothing,
  ties,   // how many keys every chunk has at each boundary, for a cut among them
  places  // the same, and where the keys inside are
};

// Makes, for every thread, what else is done with each chunk (by its number) while it is in the caches.
using Beside = std::function<std::function<void(int64_t)>()>;

// brackets[s] belongs to tasks[s].
template <class Key>
Tally<Key> count(const Scope& scope, std::vector<int64_t> tasks, std::vector<Bracket<Key>> brackets, bool drop,
                 Wanted wanted, const Beside& beside = nullptr);

// In one dtype the pass reads unrounded keys; boundaries then fall between stored values.
template <class Key>
Interval<Key> ties_of(const Scope& scope, Key key) {
  return scope.mixed ? Interval<Key>{key, key} : same_when_rounded(key, scope.parts[0].dtype);
}
template <class Key>
Key stored_key(const Scope& scope, Key key) {
  return scope.mixed ? key : round_key(key, scope.parts[0].dtype);
}

// No NaN and no infinity was met.
template <class Key>
bool is_finite(const Scope& scope, const Tally<Key>& tally) {
  return std::all_of(tally.totals.begin(), tally.totals.end(),
                     [&](const Counts<Key>& n) { return stored_key(scope, n.largest) < kInfinityKey<Key>; });
}

}  // namespace sk
