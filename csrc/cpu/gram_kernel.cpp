#include "gram_kernel.h"

#include <algorithm>

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
typedef double Doubles __attribute__((vector_size(kDoubles * 8)));

// A tile of pairs is as large as the registers bear: its sums and a vector of each of its experts.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 4;
#else
constexpr int kTile = 3;
#endif

// Steps that memory is asked ahead: rows of a tensor lie in pages of their own, where no prefetcher of the processor
// follows its columns.
constexpr int kAhead = 8;

constexpr int kVector = kGramSteps * kSumLanes;  // from one expert to the next

inline Doubles load_doubles(const double* p) {
  Doubles x;
  memcpy(&x, p, sizeof x);
  return x;
}

// A step of all vectors in float64, 0 in the lanes behind `count`.
template <class S, class... Count>
inline void read_lanes(const GramArgs<typename Compute<S>::Key>& args, int64_t at, double* vectors, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const auto load_at = [&](const void* p) {
    const S* const from = static_cast<const S*>(p) + at;
    __builtin_prefetch(from + kAhead * args.stride);
    return load(from, count...);
  };
  const V base = args.base ? load_at(args.base) : V::set(0);
  for (int t = 0; t < args.num_tasks; ++t) {
    V x = load_at(args.experts[t]);
    if (args.base) x = x - base;
    if (args.rounded) x = round_to(x, S());
    if (args.drop) x = zero_unless_finite(x);
    C lanes[V::N];
    store(x, lanes);
    for (int l = 0; l < V::N; ++l) vectors[t * kVector + l] = double(lanes[l]);
  }
}

template <class S>
void read_step(const GramArgs<typename Compute<S>::Key>& args, int64_t at, int count, double* vectors) {
  constexpr int N = Vec<typename Compute<S>::type>::N;
  int l = 0;
  for (; l + N <= count; l += N) read_lanes<S>(args, at + l, vectors + l);
  for (; l < kSumLanes; l += N) read_lanes<S>(args, at + l, vectors + l, std::max(0, count - l));
}

// Adds the products of kRows vectors with kColumns others, or with themselves.
template <int kRows, int kColumns, bool kDiagonal>
void add_tile(const double* rows, const double* columns, int steps, double* const* sums) {
  for (int l = 0; l < kSumLanes; l += kDoubles) {
    Doubles sum[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
      for (int c = kDiagonal ? r : 0; c < kColumns; ++c) sum[r][c] = load_doubles(sums[r] + c * kSumLanes + l);
    for (int s = 0; s < steps; ++s) {
      Doubles x[kColumns];
      for (int c = 0; c < kColumns; ++c) x[c] = load_doubles(columns + c * kVector + s * kSumLanes + l);
      for (int r = 0; r < kRows; ++r) {
        const Doubles y = kDiagonal ? x[r] : load_doubles(rows + r * kVector + s * kSumLanes + l);
        for (int c = kDiagonal ? r : 0; c < kColumns; ++c) sum[r][c] = sum[r][c] + y * x[c];
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = kDiagonal ? r : 0; c < kColumns; ++c)
        memcpy(sums[r] + c * kSumLanes + l, &sum[r][c], sizeof(Doubles));
  }
}

// Rows are always kTile where the columns are others.
template <bool kDiagonal, int kColumns = kTile>
void add_tile(int count, const double* rows, const double* columns, int steps, double* const* sums) {
  if (count == kColumns)
    add_tile<kDiagonal ? kColumns : kTile, kColumns, kDiagonal>(rows, columns, steps, sums);
  else if constexpr (kColumns > 1)
    add_tile<kDiagonal, kColumns - 1>(count, rows, columns, steps, sums);
}

void add_pairs(const double* vectors, int num_tasks, int steps, double* sums) {
  for (int i = 0; i < num_tasks; i += kTile)
    for (int j = i; j < num_tasks; j += kTile) {
      double* of_rows[kTile];  // at column j
      for (int r = 0; r < kTile && i + r < num_tasks; ++r) of_rows[r] = sums + pair_of(i + r, j, num_tasks) * kSumLanes;
      const int count = std::min(kTile, num_tasks - j);
      const double *rows = vectors + i * kVector, *columns = vectors + j * kVector;
      if (i == j)
        add_tile<true>(count, rows, columns, steps, of_rows);
      else
        add_tile<false>(count, rows, columns, steps, of_rows);
    }
}

template <class S>
void add(const GramArgs<typename Compute<S>::Key>& args, double* vectors, double* sums) {
  const int strips = (args.width + kSumLanes - 1) / kSumLanes;
  const int64_t of_strip = num_pairs(args.num_tasks) * kSumLanes;
  std::fill_n(sums, strips * of_strip, 0.0);
  const int together = kGramSteps / strips;
  for (int64_t first = 0; first < args.steps; first += together) {
    const int steps = int(std::min<int64_t>(together, args.steps - first));
    for (int s = 0; s < steps; ++s) {
      const int64_t step = first + s;
      const int count = step + 1 < args.steps ? args.width : args.last;
      for (int strip = 0; strip < strips; ++strip)
        read_step<S>(args, step * args.stride + strip * kSumLanes, std::min(kSumLanes, count - strip * kSumLanes),
                     vectors + (strip * together + s) * kSumLanes);
    }
    for (int strip = 0; strip < strips; ++strip)
      add_pairs(vectors + strip * together * kSumLanes, args.num_tasks, steps, sums + strip * of_strip);
  }
}

void fold(double* sums, int64_t num_pairs, double* folded) {
  for (int64_t p = 0; p < num_pairs; ++p) folded[p] = fold_halves(sums + p * kSumLanes, kSumLanes);
}

}  // namespace

const GramKernels gram_kernels = {{add<float>, add<Half>, add<BFloat16>, add<double>}, fold};

}  // namespace SK_ISA
}  // namespace sk
