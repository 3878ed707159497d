// What the kernels of csrc/cuda use of CUDA, on the CPU: see machine.h. Conversions are those of torch's own types.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time
#define __align__(n) alignas(n)

#define threadIdx (::sk::emu::place().thread)
#define blockIdx (::sk::emu::place().block)
#define blockDim (::sk::emu::place().block_size)
#define gridDim (::sk::emu::place().grid_size)

#define SK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), ::sk::emu::run(kernel, grid, block, shared_bytes, __VA_ARGS__))
#define SK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::sk::emu::dynamic_shared())

using dim3 = sk::emu::Dim;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) memcpy(to, from, bytes);
  return cudaSuccess;
}

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;

inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline uint16_t __half_as_ushort(__half x) { return x.x; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
inline __half __ushort_as_half(uint16_t bits) { return __half(bits, __half::from_bits()); }

namespace sk {
namespace emu {

template <class To, class From>
To cast_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Kernel, class... Values>
void run(const Kernel& kernel, Dim grid, Dim block, size_t shared_bytes, const Values&... values) {
  launch(grid, block, shared_bytes, [&] { kernel(values...); });
}

// What a warp does with the values of its lanes: f(values, lane).
template <class T, class F>
auto with_lanes(unsigned mask, T value, const F& f) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  const uint64_t* const words = gather(mask, word);
  T values[32];
  for (int l = 0; l < 32; ++l) memcpy(&values[l], &words[l], sizeof(T));
  return f(values, lane());
}

}  // namespace emu
}  // namespace sk

inline int __float_as_int(float x) { return sk::emu::cast_bits<int>(x); }
inline float __int_as_float(int x) { return sk::emu::cast_bits<float>(x); }
inline int64_t __double_as_longlong(double x) { return sk::emu::cast_bits<int64_t>(x); }
inline double __longlong_as_double(int64_t x) { return sk::emu::cast_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline void __syncthreads() { sk::emu::barrier(false); }
inline int __syncthreads_or(int any) { return sk::emu::barrier(any); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { sk::emu::gather(mask, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return sk::emu::with_lanes(mask, value, [&](T* values, int lane) { return values[lane / width * width + from]; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return sk::emu::with_lanes(mask, value, [&](T* values, int lane) { return values[lane < by ? lane : lane - by]; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return sk::emu::with_lanes(mask, value, [&](T* values, int lane) {
    unsigned same = 0;
    for (int l = 0; l < 32; ++l) same |= unsigned((mask >> l & 1) && values[l] == values[lane]) << l;
    return same;
  });
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  return sk::emu::with_lanes(mask, value, [&](bool* values, int) {
    unsigned set = 0;
    for (int l = 0; l < 32; ++l) set |= unsigned((mask >> l & 1) && values[l]) << l;
    return set;
  });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return sk::emu::with_lanes(mask, value, [&](unsigned* values, int) {
    unsigned sum = 0;
    for (int l = 0; l < 32; ++l) sum += (mask >> l & 1) ? values[l] : 0;
    return sum;
  });
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = T(before + value);
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

template <class T>
T __ldca(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
