// Storage dtypes as the kernels see them: no torch type crosses into a kernel file.
#pragma once
#include <cstdint>
#include <type_traits>

namespace sk {

enum class Dtype { f32, f16, bf16, f64 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Arithmetic runs in the compute type; a key is the magnitude of a compute value as a signed integer, which orders
// like the magnitude and puts infinity and then NaN on top.
template <class Storage>
struct Compute {
  using type = float;
  using Key = int32_t;
};
template <>
struct Compute<double> {
  using type = double;
  using Key = int64_t;
};

template <class Key>
using ComputeOf = std::conditional_t<sizeof(Key) == 8, double, float>;

template <class Key>
constexpr Key kInfinityKey = Key(0x7F800000);
template <>
inline constexpr int64_t kInfinityKey<int64_t> = 0x7FF0000000000000;

template <class Key>
constexpr Key kMaxKey = Key((uint64_t(1) << (8 * sizeof(Key) - 1)) - 1);

// The kernels of an op, one for each storage dtype.
template <template <class Key> class Kernel>
struct PerDtype {
  Kernel<int32_t> f32, f16, bf16;
  Kernel<int64_t> f64;

  template <class Key>
  const Kernel<Key>& get(Dtype dtype) const {
    if constexpr (sizeof(Key) == 8) {
      return f64;
    } else {
      return dtype == Dtype::f32 ? f32 : dtype == Dtype::f16 ? f16 : bf16;
    }
  }
};

}  // namespace sk
