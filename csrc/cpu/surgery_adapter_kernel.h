// features - relu(features down^T) up^T - bias on a block of rows of one task, forward and backward: each row is read
// once and written once; panels of the block and the packed adapter stay in the second-level cache. Bound: 4 rank dim
// FLOPs a row forward, 8 backward. Products use fused multiply-adds where the instruction set has them: unlike merges,
// the results of two instruction sets differ by rounding.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kPadding = 16;  // elements: the widest vector

inline int64_t padded(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }

// One task's adapter as one direction of it reads it, by vectors: forward, hidden = relu(features in) and corrected =
// features + hidden out; backward, d_hidden = grad in where hidden is positive and d_features = grad + d_hidden out.
template <class C>
struct PackedAdapter {
  int64_t dim, rank;
  C* in;   // [dim, padded(rank)]: down^T, or -up
  C* out;  // [rank, padded(dim)]: -up^T, or down

  static int64_t size(int64_t dim, int64_t rank) { return dim * padded(rank) + rank * padded(dim); }
};

// down [rank, dim], up [dim, rank]
template <class Key>
using AdapterPackKernel = void (*)(const ComputeOf<Key>* down, const ComputeOf<Key>* up,
                                   PackedAdapter<ComputeOf<Key>> packed);

template <class Key>
struct AdapterForward {
  using C = ComputeOf<Key>;

  PackedAdapter<C> adapter;
  const C* bias;                // null, or [dim]: taken off too
  bool relu;                    // else hidden = features in
  int64_t rows;                 // at most kBlockRows
  const void* const* features;  // [rows], each [dim]
  void* const* corrected;       // [rows], each [dim]
  void* const* sums;            // null, or [rows], each [dim] of C: the corrected row is added
  C* hidden;                    // null, or [rows, rank]
  C* scratch;                   // block_scratch(dim, rank) elements
};
template <class Key>
using AdapterForwardKernel = void (*)(const AdapterForward<Key>& args);

template <class Key>
struct AdapterBackward {
  using C = ComputeOf<Key>;

  PackedAdapter<C> adapter;
  bool relu;
  int64_t rows;                   // at most kBlockRows
  const void* const* grad;        // null, or [rows], each [dim]
  const void* const* grad_means;  // null, or [rows], each [dim] of C: of the mean over `tokens` rows
  C tokens;
  const void* const* features;  // null unless gradients of the adapter are asked for
  const C* hidden;              // [rows, rank]
  void* const* d_features;      // null, or [rows], each [dim]
  C *d_down, *minus_d_up_t;     // null, or [rank, padded(dim)]: added to
  C* minus_d_bias;              // null, or [dim]: added to
  C* scratch;                   // block_scratch(dim, rank) elements
};
template <class Key>
using AdapterBackwardKernel = void (*)(const AdapterBackward<Key>& args);

inline int64_t block_scratch(int64_t dim, int64_t rank) { return 2 * kBlockRows * (padded(dim) + padded(rank)); }

struct AdapterKernels {
  PerDtype<AdapterPackKernel> pack_forward, pack_backward;
  PerDtype<AdapterForwardKernel> forward;
  PerDtype<AdapterBackwardKernel> backward;
};

SK_DECLARE_KERNELS(AdapterKernels, adapter_kernels);

}  // namespace sk
