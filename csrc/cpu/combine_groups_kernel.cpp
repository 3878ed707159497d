#include "combine_groups_kernel.h"

#include <algorithm>

#include "combine_tile.h"
#include "random_bits.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kTile = 1024;     // forward
constexpr int kProducts = 128;  // per lane and run of the backward, which is folded in double
constexpr int kRun = kProducts * kSumLanes;

// Groups whose sums are in registers together.
#if defined(__AVX512F__)
template <class C>
constexpr int kTogether = 32 / int(sizeof(C));
#else
template <class C>
constexpr int kTogether = 2;
#endif

inline void groups_of(const RandomStream& stream, int num_groups, int64_t first, int count, int32_t* groups) {
  static_assert(sizeof(int32_t) == sizeof(uint32_t));
  uint32_t* const words = reinterpret_cast<uint32_t*>(groups);
  words_of(stream, first, count, words);
  for (int i = 0; i < count; ++i) words[i] = uint32_t(uint64_t(words[i]) * uint64_t(num_groups) >> 32);
}

// table[places[i]], for a vector's lanes.
template <class C>
inline Vec<C> look_up(const C* table, const int32_t* places) {
  Vec<C> x;
  for (int i = 0; i < Vec<C>::N; ++i) x.v[i] = table[places[i]];
  return x;
}
#if defined(__AVX512F__)
// A table of at most 32 numbers stays in two registers.
struct Table {
  __m512 low, high;

  explicit Table(const float* table) : low(_mm512_loadu_ps(table)), high(_mm512_loadu_ps(table + 16)) {}
  Vec<float> at(const int32_t* places) const { return {_mm512_permutex2var_ps(low, _mm512_loadu_si512(places), high)}; }
};
constexpr int kTableSize = 32;
#endif

// sums[i] += x[i] * table[groups[i]]
template <class C>
void add_products(const C* x, const C* table, const int32_t* groups, [[maybe_unused]] int num_groups, int n, C* sums) {
  using V = Vec<C>;
  int i = 0;
  const auto whole = [&](const auto& at) {
    for (; i + V::N <= n; i += V::N) store(load(sums + i) + load(x + i) * at(groups + i), sums + i);
  };
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    if (num_groups <= kTableSize) {
      float padded[kTableSize] = {};
      std::copy_n(table, num_groups, padded);
      const Table in_registers(padded);
      whole([&](const int32_t* places) { return in_registers.at(places); });
    }
  }
#endif
  whole([&](const int32_t* places) { return look_up(table, places); });
  for (; i < n; ++i) sums[i] = sums[i] + x[i] * table[groups[i]];
}

template <class S>
void forward(const GroupsArgs<typename Compute<S>::Key>& args, void* out) {
  using C = typename Compute<S>::type;
  C sums[kTile], room[kTile];
  int32_t groups[kTile + kWords];
  for (int64_t at = 0; at < args.n; at += kTile) {
    const int count = int(std::min<int64_t>(kTile, args.n - at));
    groups_of(args.stream, args.num_groups, args.first + at, count, groups);
    std::fill_n(sums, count, C(0));
    for (int t = 0; t < args.num_tasks; ++t) {
      const C* const x = widened(static_cast<const S*>(args.task_vectors[t]) + at, count, room);
      add_products(x, args.coefficients + t * args.num_groups, groups, args.num_groups, count, sums);
    }
    const C* const base = widened(static_cast<const S*>(args.base) + at, count, room);
    for (int i = 0; i < count; ++i) sums[i] = base[i] + sums[i];
    store_narrowed(sums, count, static_cast<S*>(out) + at);
  }
}

// Adds the products of the groups from `first` on to their sums: kGroups of them, or as many as are left.
template <class C, int kGroups = kTogether<C>>
void add_groups(const C* products, const C* groups, int n, int first, int num_groups, double* sums) {
  using V = Vec<C>;
  constexpr int kVectors = kSumLanes / V::N;
  for (; first + kGroups <= num_groups; first += kGroups) {
    V lanes[kGroups][kVectors];
    for (auto& of_group : lanes)
      for (V& sum : of_group) sum = V::set(0);
    for (int i = 0; i < n; i += kSumLanes)
      for (int v = 0; v < kVectors; ++v) {
        const V x = load(products + i + v * V::N), group = load(groups + i + v * V::N);
        for (int k = 0; k < kGroups; ++k)
          lanes[k][v] = add_where<C>(equal(group, V::set(C(first + k))), lanes[k][v], x);
      }
    for (int k = 0; k < kGroups; ++k) {
      C narrow[kSumLanes];
      double wide[kSumLanes];
      for (int v = 0; v < kVectors; ++v) store(lanes[k][v], narrow + v * V::N);
      for (int l = 0; l < kSumLanes; ++l) wide[l] = double(narrow[l]);
      sums[first + k] += fold_halves(wide, kSumLanes);
    }
  }
  if constexpr (kGroups > 1) add_groups<C, kGroups / 2>(products, groups, n, first, num_groups, sums);
}

template <class S>
void backward(const GroupsArgs<typename Compute<S>::Key>& args, double* sums) {
  using C = typename Compute<S>::type;
  C products[kRun], numbers[kRun], room[kRun], other_room[kRun];
  int32_t groups[kRun + kWords];
  std::fill_n(sums, args.num_tasks * args.num_groups, 0.0);
  for (int64_t at = 0; at < args.n; at += kRun) {
    const int count = int(std::min<int64_t>(kRun, args.n - at));
    const int padded = (count + kSumLanes - 1) / kSumLanes * kSumLanes;  // by products of 0 of no group
    groups_of(args.stream, args.num_groups, args.first + at, count, groups);
    for (int i = 0; i < count; ++i) numbers[i] = C(groups[i]);
    std::fill(numbers + count, numbers + padded, C(-1));
    std::fill(products + count, products + padded, C(0));
    const C* const gradient = widened(static_cast<const S*>(args.base) + at, count, room);
    for (int t = 0; t < args.num_tasks; ++t) {
      const C* const x = widened(static_cast<const S*>(args.task_vectors[t]) + at, count, other_room);
      for (int i = 0; i < count; ++i) products[i] = gradient[i] * x[i];
      add_groups<C>(products, numbers, padded, 0, args.num_groups, sums + t * args.num_groups);
    }
  }
}

}  // namespace

const CombineGroupsKernels combine_groups_kernels = {
    {forward<float>, forward<Half>, forward<BFloat16>, forward<double>},
    {backward<float>, backward<Half>, backward<BFloat16>, backward<double>},
};

}  // namespace SK_ISA
}  // namespace sk
