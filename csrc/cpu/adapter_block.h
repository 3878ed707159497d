// The steps of an adapter on a block of rows, in panels of the compute type; for kernel files only.
#pragma once
#include <type_traits>

#include "matmul.h"
#include "surgery_adapter_kernel.h"

namespace sk {
namespace SK_ISA {
namespace {

// Four rows of four columns.
template <class C>
inline void transpose_tile(const C* from, int64_t from_row, C sign, C* to, int64_t to_row) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  Four a[4];
  for (int i = 0; i < 4; ++i) memcpy(&a[i], from + i * from_row, sizeof(Four));
  const Four low01 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5),
             low23 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5),
             high01 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7),
             high23 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  const Four columns[4] = {sign * __builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                           sign * __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                           sign * __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                           sign * __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) memcpy(to + j * to_row, &columns[j], sizeof(Four));
}

// to [columns, rows] = sign * from^T, its rows filled up with zeros; from [rows, columns]. A strip of rows at a time:
// at power-of-two widths more of them would share too few cache lines.
template <class C>
inline void transpose(Panel<const C> from, int64_t rows, int64_t columns, C sign, Panel<C> to) {
  for (int64_t strip = 0; strip < rows; strip += kPadding) {
    const int64_t end = strip + kPadding < rows ? strip + kPadding : rows;
    for (int64_t j = 0; j < columns; j += 4)
      for (int64_t i = strip; i < end; i += 4) {
        if (i + 4 <= end && j + 4 <= columns) {
          transpose_tile(from.at + i * from.row + j, from.row, sign, to.at + j * to.row + i, to.row);
          continue;
        }
        for (int64_t c = j; c < j + 4 && c < columns; ++c)
          for (int64_t r = i; r < i + 4 && r < end; ++r) to.at[c * to.row + r] = sign * from.at[r * from.row + c];
      }
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = rows; i < to.row; ++i) to.at[j * to.row + i] = 0;
}

// to [rows, padded(columns)] = sign * from [rows, columns]
template <class C>
inline void pad(const C* from, int64_t rows, int64_t columns, C sign, C* to) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * width + j] = sign * from[i * columns + j];
    for (int64_t j = columns; j < width; ++j) to[i * width + j] = 0;
  }
}

template <class C>
void pack_forward(const C* down, const C* up, PackedAdapter<C> packed) {
  transpose<C>({down, packed.dim}, packed.rank, packed.dim, 1, {packed.in, padded(packed.rank)});
  transpose<C>({up, packed.rank}, packed.dim, packed.rank, -1, {packed.out, padded(packed.dim)});
}
template <class C>
void pack_backward(const C* down, const C* up, PackedAdapter<C> packed) {
  pad<C>(up, packed.dim, packed.rank, -1, packed.in);
  pad<C>(down, packed.rank, packed.dim, 1, packed.out);
}

// The panels of one block.
template <class C>
struct BlockScratch {
  int64_t dim, rank;
  C* at;

  Panel<C> features() const { return {at, padded(dim)}; }
  Panel<C> grad() const { return features().below(kBlockRows); }
  Panel<C> hidden() const { return {grad().below(kBlockRows).at, padded(rank)}; }
  Panel<C> d_hidden() const { return hidden().below(kBlockRows); }
};

template <class C>
inline Scalars<C> scalars(Panel<C> panel) {
  return {panel.at, panel.row, 1};
}
template <class C>
inline Scalars<C> transposed(Panel<C> panel) {
  return {panel.at, 1, panel.row};
}

// The last vector of a row is filled up with zeros.
template <class S, class C>
inline void load_row(const S* row, int64_t dim, C* to) {
  constexpr int N = Vec<C>::N;
  int64_t i = 0;
  for (; i + N <= dim; i += N) store(load(row + i), to + i);
  if (i < dim) store(load(row + i, int(dim - i)), to + i);
}
template <class S, class C>
inline void store_row(const C* from, int64_t dim, S* row) {
  using V = Vec<C>;
  const auto rounded = [&](int64_t i) {
    const V x = load(from + i);
    if constexpr (!std::is_same_v<S, BFloat16>) return x;
    // A float32 adapter may bring a NaN whose low bits would carry it away as it is rounded.
    return select<C>(equal(x, x), x, V::set(__builtin_nanf("")));
  };
  int64_t i = 0;
  for (; i + V::N <= dim; i += V::N) store(rounded(i), row + i);
  if (i < dim) {
    S last[V::N];
    store(rounded(i), last);
    memcpy(row + i, last, size_t(dim - i) * sizeof(S));
  }
}

// hidden = relu(features in), NaN kept, or features in
template <class C>
inline void forward_hidden(PackedAdapter<C> adapter, Panel<C> features, Panel<C> hidden, int64_t rows,
                           bool relu = true) {
  using V = Vec<C>;
  multiply(scalars(features), {adapter.in, padded(adapter.rank)}, hidden, rows, adapter.rank, adapter.dim, false);
  if (!relu) return;
  for (int64_t i = 0; i < rows * hidden.row; i += V::N) {
    const V x = load(hidden.at + i);
    store(select<C>(greater(V::set(0), x), V::set(0), x), hidden.at + i);
  }
}

// d_hidden = grad in; with relu where hidden is not 0: where it is NaN too, as in torch
template <class C>
inline void backward_hidden(PackedAdapter<C> adapter, Panel<C> grad, Panel<C> hidden, Panel<C> d_hidden, int64_t rows,
                            bool relu = true) {
  using V = Vec<C>;
  multiply(scalars(grad), {adapter.in, padded(adapter.rank)}, d_hidden, rows, adapter.rank, adapter.dim, false);
  if (!relu) return;
  for (int64_t i = 0; i < rows * hidden.row; i += V::N) {
    const V x = load(d_hidden.at + i);
    store(select<C>(equal(load(hidden.at + i), V::set(0)), V::set(0), x), d_hidden.at + i);
  }
}

// wide += hidden out: features to corrected features, or grad to d_features
template <class C>
inline void add_out(PackedAdapter<C> adapter, Panel<C> hidden, Panel<C> wide, int64_t rows) {
  multiply(scalars(hidden), {adapter.out, padded(adapter.dim)}, wide, rows, adapter.dim, adapter.rank, true);
}

// d_down += d_hidden^T features; minus_d_up_t += hidden^T grad; both [rank, padded(dim)]
template <class C>
inline void add_gradients(Panel<C> features, Panel<C> grad, Panel<C> hidden, Panel<C> d_hidden, Panel<C> d_down,
                          Panel<C> minus_d_up_t, int64_t rows, int64_t dim, int64_t rank) {
  multiply(transposed(d_hidden), features, d_down, rank, dim, rows, true);
  multiply(transposed(hidden), grad, minus_d_up_t, rank, dim, rows, true);
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
