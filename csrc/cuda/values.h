// Stored values as the kernels see them: loads of 16 bytes, arithmetic in the compute type, keys of magnitudes.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"
#include "toolkit.h"

namespace sk {
namespace cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;

template <class C>
using KeyOf = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

__device__ inline float to_compute(float x) { return x; }
__device__ inline float to_compute(half x) { return __half2float(x); }
__device__ inline float to_compute(bfloat16 x) { return __bfloat162float(x); }
__device__ inline double to_compute(double x) { return x; }

template <class S>
__device__ S to_stored(ComputeOf<S> x) {
  if constexpr (std::is_same_v<S, half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<S, bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <class S>
__device__ ComputeOf<S> round_to(ComputeOf<S> x) {
  return to_compute(to_stored<S>(x));
}

__device__ inline int32_t bits(float x) { return __float_as_int(x); }
__device__ inline int64_t bits(double x) { return __double_as_longlong(x); }
__device__ inline float from_bits(int32_t x) { return __int_as_float(x); }
__device__ inline double from_bits(int64_t x) { return __longlong_as_double(x); }

template <class S>
__device__ S task_vector(S expert, S base, bool has_base) {
  return has_base ? to_stored<S>(to_compute(expert) - to_compute(base)) : expert;
}

template <class S>
constexpr int kPack = 16 / int(sizeof(S));  // elements of one load

template <class S, int N>
struct alignas(sizeof(S) * N) Pack {
  S v[N];
};

// nvcc keeps 16 bytes in one instruction only where it is asked to.
template <class S, int N>
__device__ Pack<S, N> load(const void* p, int64_t i) {
  const S* const at = static_cast<const S*>(p) + i;
  Pack<S, N> pack;
  if constexpr (sizeof pack == 16) {
    const uint4 raw = __ldca(reinterpret_cast<const uint4*>(at));
    memcpy(&pack, &raw, sizeof pack);
  } else {
    for (int j = 0; j < N; ++j) pack.v[j] = at[j];
  }
  return pack;
}

// Past the caches: nobody reads it again.
template <class S, int N>
__device__ Pack<S, N> load_last(const void* p, int64_t i) {
  if constexpr (sizeof(S) * N == 16) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(static_cast<const S*>(p) + i));
    Pack<S, N> pack;
    memcpy(&pack, &raw, sizeof pack);
    return pack;
  } else {
    return load<S, N>(p, i);
  }
}

template <class S, int N>
__device__ void store(void* p, int64_t i, const Pack<S, N>& pack) {
  S* const at = static_cast<S*>(p) + i;
  if constexpr (sizeof pack == 16) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof pack);
    *reinterpret_cast<uint4*>(at) = raw;
  } else {
    for (int j = 0; j < N; ++j) at[j] = pack.v[j];
  }
}

// The keys among which thresholds are searched. Rounded task vectors of one 16-bit dtype have 15 bits; others take the
// bits of the compute type, so that tensors of several dtypes compare.
struct Narrow {
  using Key = int32_t;
  using Limit = int32_t;  // the bits of the same magnitude in the compute type
  static constexpr int kBits = 15;
};
struct Single {
  using Key = int32_t;
  using Limit = int32_t;
  static constexpr int kBits = 31;
};
struct Double {
  using Key = int64_t;
  using Limit = int64_t;
  static constexpr int kBits = 63;
};

template <class Space, class S>
__device__ typename Space::Key key_of(S x) {
  using Key = typename Space::Key;
  if constexpr (Space::kBits != 15)
    return bits(to_compute(x)) & kMaxKey<Key>;
  else if constexpr (std::is_same_v<S, half>)
    return __half_as_ushort(x) & 0x7FFF;
  else
    return __bfloat16_as_ushort(x) & 0x7FFF;
}

template <class Space, class S>
__device__ constexpr typename Space::Key infinity_of() {
  if constexpr (Space::kBits != 15)
    return kInfinityKey<typename Space::Key>;
  else
    return std::is_same_v<S, half> ? 0x7C00 : 0x7F80;
}

template <class Space>
__device__ typename Space::Limit limit_of(typename Space::Key key, Dtype dtype) {
  if constexpr (Space::kBits != 15)
    return key;
  else
    return dtype == Dtype::bf16 ? key << 16 : bits(__half2float(__ushort_as_half(uint16_t(key))));
}

// Runs body(S()) for the storage types of the space.
template <class Space, class Body>
__device__ void with_stored(Dtype dtype, const Body& body) {
  if constexpr (Space::kBits == 63) {
    body(double());
  } else {
    if (Space::kBits == 31 && dtype == Dtype::f32)
      body(float());
    else if (dtype == Dtype::f16)
      body(half());
    else
      body(bfloat16());
  }
}

}  // namespace cuda
}  // namespace sk
