#include "mix_kernel.h"

#include <algorithm>

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// Outputs summed side by side, as many as the registers bear; the experts are read again, from the caches, for more.
#if defined(__AVX512F__)
constexpr int kTogether = 8;
#else
constexpr int kTogether = 4;
#endif

// What is read a kibibyte further on: of many tensors side by side the hardware loses track, above all where they begin
// at the same place of a page, as large ones do. Past the end it does nothing.
template <class S>
inline void prefetch_block(const S* p) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(p) + 1024;
  for (size_t line = 0; line < sizeof(S) * Block<typename Compute<S>::type>::N; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
}

// The magnitude from which on a value becomes infinity where it is stored.
template <class S>
constexpr typename Compute<S>::Key kInfinityStored = kInfinityKey<typename Compute<S>::Key>;
template <>
inline constexpr int32_t kInfinityStored<Half> = 0x477FF000;  // half a step beyond 65504
template <>
inline constexpr int32_t kInfinityStored<BFloat16> = 0x7F7F8000;

// Coefficients of columns are in the order of the elements, so that bfloat16 is not parted into even and odd here.
template <class S, bool kByColumn>
inline Block<typename Compute<S>::type> load_elements(const S* p) {
  if constexpr (kByColumn)
    return {load(p), load(p + Vec<typename Compute<S>::type>::N)};
  else
    return load_block(p);
}
template <class S, bool kByColumn>
inline Block<typename Compute<S>::type> load_elements(const S* p, int count) {
  S full[Block<typename Compute<S>::type>::N] = {};
  memcpy(full, p, size_t(count) * sizeof(S));
  return load_elements<S, kByColumn>(full);
}
template <class S, bool kByColumn>
inline void store_elements(Block<typename Compute<S>::type> x, S* p, bool stream) {
  if constexpr (kByColumn) {
    store(x.v[0], p);
    store(x.v[1], p + Vec<typename Compute<S>::type>::N);
  } else if (stream) {
    stream_block(x, p);
  } else {
    store_block(x, p);
  }
}
template <class S, bool kByColumn>
inline void store_elements(Block<typename Compute<S>::type> x, S* p, bool, int count) {
  S full[Block<typename Compute<S>::type>::N];
  store_elements<S, kByColumn>(x, full, false);
  memcpy(p, full, size_t(count) * sizeof(S));
}

template <class C>
using Largest = typename Vec<C>::Key;

// The outputs from `first` on: kOutputs of them, or where fewer are left a power of two, and the next ones before these
// are stored. `largest`: magnitudes of what `look` looks at.
template <class S, bool kByColumn, int kOutputs = kTogether, class... Count>
void mix_block(const MixArgs<typename Compute<S>::Key>& args, int first, int64_t i, void* const* out, bool stream,
               Largest<typename Compute<S>::type>& largest, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const int left = args.num_outputs - first;
  if constexpr (kOutputs > 1)
    if (left < kOutputs) return mix_block<S, kByColumn, kOutputs / 2>(args, first, i, out, stream, largest, count...);
  const auto load = [&](const void* p) {
    const S* const elements = static_cast<const S*>(p) + i;
    if (first == 0) prefetch_block(elements);
    return load_elements<S, kByColumn>(elements, count...);
  };
  const auto coefficient = [&](const C* table, int64_t place) -> Block<C> {
    if constexpr (kByColumn) return load_elements<C, kByColumn>(table + place * args.stride + i, count...);
    return {V::set(table[place]), V::set(table[place])};
  };
  const V zero = V::set(0);
  Block<C> base = {zero, zero}, sums[kOutputs];
  for (Block<C>& sum : sums) sum = {zero, zero};
  if (args.base) base = load(args.base);
  const bool subtract = args.base && args.subtract, look = args.look && first == 0;
  const auto see = [&](const Block<C>& x) {
    for (const V v : x.v) largest = max_key<C>(largest, magnitude(v));
  };
  if (look && !subtract) see(base);
  for (int t = 0; t < args.num_tasks; ++t) {
    Block<C> x = load(args.experts[t]);
    for (int h = 0; h < 2; ++h) {
      if (subtract) x.v[h] = x.v[h] - base.v[h];
      if (args.drop) x.v[h] = zero_unless_finite(x.v[h]);
    }
    if (look) see(x);
    for (int j = 0; j < kOutputs; ++j) {
      const Block<C> c = coefficient(args.coefficients, int64_t(first + j) * args.num_tasks + t);
      for (int h = 0; h < 2; ++h)
        sums[j].v[h] = args.fused ? fused_multiply_add(x.v[h], c.v[h], sums[j].v[h]) : sums[j].v[h] + x.v[h] * c.v[h];
    }
  }
  for (int j = 0; j < kOutputs; ++j) {
    if (args.divisor != 1)
      for (int h = 0; h < 2; ++h) sums[j].v[h] = sums[j].v[h] / V::set(args.divisor);
    if (args.base && args.base_coefficients) {
      const Block<C> b = coefficient(args.base_coefficients, first + j);
      for (int h = 0; h < 2; ++h)
        sums[j].v[h] =
            args.fused ? fused_multiply_add(base.v[h], b.v[h], sums[j].v[h]) : base.v[h] * b.v[h] + sums[j].v[h];
    } else if (args.base) {
      for (int h = 0; h < 2; ++h) sums[j].v[h] = base.v[h] + sums[j].v[h];
    }
  }
  if (left > kOutputs) mix_block<S, kByColumn>(args, first + kOutputs, i, out, stream, largest, count...);
  for (int j = 0; j < kOutputs; ++j)
    store_elements<S, kByColumn>(sums[j], static_cast<S*>(out[first + j]) + i, stream, count...);
}

template <class S, bool kByColumn>
bool mix(const MixArgs<typename Compute<S>::Key>& args, void* const* out) {
  using C = typename Compute<S>::type;
  constexpr int N = Block<C>::N;
  // Streams begin at a line, that of every output at the same element: what comes before it goes through the caches.
  const auto before_line = [&](int j) { return -reinterpret_cast<uintptr_t>(out[j]) % 64; };
  const int64_t head = int64_t(before_line(0) / sizeof(S));
  bool streamed = args.stream && !kByColumn && head + N <= args.n;
  for (int j = 0; j < args.num_outputs; ++j) streamed = streamed && before_line(j) == head * sizeof(S);
  Largest<C> largest = Vec<C>::keys(0);
  int64_t i = 0;
  while (streamed && i < head) {
    const int count = int(std::min<int64_t>(N, head - i));
    mix_block<S, kByColumn>(args, 0, i, out, false, largest, count);
    i += count;
  }
  for (; i + N <= args.n; i += N) mix_block<S, kByColumn>(args, 0, i, out, streamed, largest);
  if (i < args.n) mix_block<S, kByColumn>(args, 0, i, out, false, largest, int(args.n - i));
  if (streamed) fence();
  return max_lane<C>(largest) >= kInfinityStored<S>;
}

}  // namespace

const MixKernels mix_kernels = {{mix<float, false>, mix<Half, false>, mix<BFloat16, false>, mix<double, false>},
                                {mix<float, true>, mix<Half, true>, mix<BFloat16, true>, mix<double, true>}};

}  // namespace SK_ISA
}  // namespace sk
