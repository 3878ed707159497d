// The steps of an adapter on a block of rows, in panels of the compute type; for kernel files only.
#pragma once
#include "matmul.h"
#include "surgery_adapter_kernel.h"

namespace sk {
namespace SK_ISA {
namespace {

// to [columns, padded(rows)] = sign * from^T; from [rows, columns]
template <class C>
inline void transpose(Panel<const C> from, int64_t rows, int64_t columns, C sign, C* to) {
  const int64_t width = padded(rows);
  for (int64_t first = 0; first < width; first += kPadding) {
    const int64_t count = first + kPadding < rows ? kPadding : rows - first;
    for (int64_t j = 0; j < columns; ++j) {
      C line[kPadding] = {};
      for (int64_t i = 0; i < count; ++i) line[i] = sign * from.at[(first + i) * from.row + j];
      memcpy(to + j * width + first, line, sizeof line);
    }
  }
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
  transpose<C>({down, packed.dim}, packed.rank, packed.dim, 1, packed.in);
  transpose<C>({up, packed.rank}, packed.dim, packed.rank, -1, packed.out);
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
  constexpr int N = Vec<C>::N;
  int64_t i = 0;
  for (; i + N <= dim; i += N) store(load(from + i), row + i);
  if (i < dim) {
    S last[N];
    store(load(from + i), last);
    memcpy(row + i, last, size_t(dim - i) * sizeof(S));
  }
}

// hidden = relu(features in), NaN kept
template <class C>
inline void forward_hidden(PackedAdapter<C> adapter, Panel<C> features, Panel<C> hidden, int64_t rows) {
  using V = Vec<C>;
  multiply(scalars(features), {adapter.in, padded(adapter.rank)}, hidden, rows, adapter.rank, adapter.dim, false);
  for (int64_t i = 0; i < rows * hidden.row; i += V::N) {
    const V x = load(hidden.at + i);
    store(select<C>(greater(V::set(0), x), V::set(0), x), hidden.at + i);
  }
}

// d_hidden = grad in, where hidden is positive
template <class C>
inline void backward_hidden(PackedAdapter<C> adapter, Panel<C> grad, Panel<C> hidden, Panel<C> d_hidden, int64_t rows) {
  using V = Vec<C>;
  multiply(scalars(grad), {adapter.in, padded(adapter.rank)}, d_hidden, rows, adapter.rank, adapter.dim, false);
  for (int64_t i = 0; i < rows * hidden.row; i += V::N) {
    const V x = load(d_hidden.at + i);
    store(zero_unless<C>(greater(load(hidden.at + i), V::set(0)), x), d_hidden.at + i);
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
