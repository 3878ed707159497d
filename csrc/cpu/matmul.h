// Products of panels that stay in the second-level cache, for kernel files only. A panel is row-major and padded to
// whole vectors; only the columns of a result are ever padded, so that padding never takes part in a sum.
#pragma once
#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// A matrix read element by element: any strides, transposed or not.
template <class C>
struct Scalars {
  const C* at;
  int64_t row, column;  // strides

  Scalars below(int64_t rows) const { return {at + rows * row, row, column}; }
};

// A matrix read or written by whole vectors along its rows.
template <class C>
struct Panel {
  C* at;
  int64_t row;  // stride

  Panel right(int64_t columns) const { return {at + columns, row}; }
  Panel below(int64_t rows) const { return {at + rows * row, row}; }
};

// Rows x (Vectors * N) sums live in registers: per step Rows broadcasts and Vectors loads feed their product of FMAs.
template <int Rows, int Vectors, class C>
inline void multiply_tile(Scalars<C> a, Panel<C> b, Panel<C> out, int64_t depth, bool add) {
  using V = Vec<C>;
  V sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) sum[i][j] = add ? load(out.at + i * out.row + j * V::N) : V::set(0);
  for (int64_t k = 0; k < depth; ++k) {
    V columns[Vectors];
    for (int j = 0; j < Vectors; ++j) columns[j] = load(b.at + k * b.row + j * V::N);
    for (int i = 0; i < Rows; ++i) {
      const V x = V::set(a.at[i * a.row + k * a.column]);
      for (int j = 0; j < Vectors; ++j) sum[i][j] = multiply_add(x, columns[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) store(sum[i][j], out.at + i * out.row + j * V::N);
}

// As many sums as the registers hold, in tiles as square as that allows.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
template <int Vectors>
constexpr int kTileRows = Vectors == kVectors ? 6 : 12;

template <int Vectors, class C>
inline void multiply_columns(Scalars<C> a, Panel<C> b, Panel<C> out, int64_t rows, int64_t depth, bool add) {
  constexpr int kRows = kTileRows<Vectors>;
  for (; rows >= kRows; rows -= kRows, a = a.below(kRows), out = out.below(kRows))
    multiply_tile<kRows, Vectors>(a, b, out, depth, add);
  for (; rows >= 4; rows -= 4, a = a.below(4), out = out.below(4)) multiply_tile<4, Vectors>(a, b, out, depth, add);
  for (; rows > 0; --rows, a = a.below(1), out = out.below(1)) multiply_tile<1, Vectors>(a, b, out, depth, add);
}

// out [rows, columns] = a [rows, depth] b [depth, columns], added to what is there or not. `columns` is rounded up to
// whole vectors.
template <class C>
inline void multiply(Scalars<C> a, Panel<C> b, Panel<C> out, int64_t rows, int64_t columns, int64_t depth, bool add) {
  constexpr int N = Vec<C>::N;
  int64_t j = 0;
  for (; columns - j > (kVectors - 1) * N; j += kVectors * N)
    multiply_columns<kVectors>(a, b.right(j), out.right(j), rows, depth, add);
  if constexpr (kVectors > 2)
    for (; columns - j > N; j += 2 * N) multiply_columns<2>(a, b.right(j), out.right(j), rows, depth, add);
  for (; j < columns; j += N) multiply_columns<1>(a, b.right(j), out.right(j), rows, depth, add);
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
