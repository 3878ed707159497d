// Which keys round to the same stored value. Rounding keeps the order of magnitudes, so the keep-th largest rounded
// magnitude is the rounded keep-th largest, and the pass over the experts need not round.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "../dtype.h"

namespace sk {

inline float round_to(float x, Dtype dtype) {
  if (dtype == Dtype::f16) return float(torch::headeronly::Half(x));
  return dtype == Dtype::bf16 ? float(torch::headeronly::BFloat16(x)) : x;
}

// NaN stays as it is.
inline int64_t round_key(int64_t key, Dtype) { return key; }
inline int32_t round_key(int32_t key, Dtype dtype) {
  if (key >= kInfinityKey<int32_t>) return key;
  float magnitude;
  memcpy(&magnitude, &key, sizeof key);
  magnitude = round_to(magnitude, dtype);
  memcpy(&key, &magnitude, sizeof key);
  return key;
}

template <class Key>
struct Interval {
  Key first, last;
  bool holds(Key key) const { return key >= first && key <= last; }
};

// The keys that round to what `key` rounds to.
template <class Key>
Interval<Key> same_when_rounded(Key key, Dtype dtype) {
  const Key rounded = round_key(key, dtype);
  const auto first_key_from = [&](Key lo, Key hi, Key value) {  // the first key that rounds to `value` or more
    while (lo < hi) {
      const Key middle = lo + (hi - lo) / 2;
      if (round_key(middle, dtype) < value)
        lo = middle + 1;
      else
        hi = middle;
    }
    return lo;
  };
  if (key > kInfinityKey<Key>) return {key, key};  // NaN
  if (rounded == kInfinityKey<Key>) return {first_key_from(0, key, rounded), kInfinityKey<Key>};
  return {first_key_from(0, key, rounded), Key(first_key_from(key, kInfinityKey<Key>, rounded + 1) - 1)};
}

}  // namespace sk
