// X^T W X and X^T W Y of strips of columns over raw pointers: rows are read once, into strips that stay in the
// second-level cache. Bound: kStrip^2 multiply-adds a row for each pair of strips. Products use fused multiply-adds
// where the instruction set has them: the results of two instruction sets differ by rounding.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

constexpr int64_t kStrip = 64;       // columns
constexpr int64_t kStripRows = 512;  // whose products are added up before they meet those of other rows

// Columns of some rows as the products read them: [rows, kStrip] of C, 0 behind `width` and in rows of weight 0, which
// are not read.
template <class C>
struct Strip {
  const void* from;     // [rows, width] of the storage dtype
  int64_t stride;       // elements from row to row
  int64_t rows, width;  // at most kStripRows, kStrip
  const C* weights;     // null, or [rows]
  C* plain;             // null, or [rows, kStrip]
  C* weighted;          // null, or [rows, kStrip]: times the weights; plain itself where there are none
  C* sums;              // null, or [width]: of the weighted rows
  bool add;             // to what is in sums
};
template <class C>
using PackStrip = void (*)(const Strip<C>& strip);

template <class C>
struct StripProduct {
  const C *a, *b;                  // [rows, kStrip] each
  int64_t rows, a_width, b_width;  // of the result [a_width, b_width]
  bool upper;                      // of a strip with itself: what is below the diagonal is not used
  C* scratch;                      // kStrip * kStrip
  C* out;
  int64_t stride;  // elements from row to row of out
  bool add;        // to what is there
};
template <class C>
using MultiplyStrips = void (*)(const StripProduct<C>& product);

struct GramCrossKernels {
  PackStrip<float> f32, f16, bf16;
  PackStrip<double> f64, wide_f32, wide_f16, wide_bf16;
  MultiplyStrips<float> multiply;
  MultiplyStrips<double> multiply_wide;

  PackStrip<float> pack(Dtype dtype, float) const {
    return dtype == Dtype::f32 ? f32 : dtype == Dtype::f16 ? f16 : bf16;
  }
  PackStrip<double> pack(Dtype dtype, double) const {
    return dtype == Dtype::f64 ? f64 : dtype == Dtype::f32 ? wide_f32 : dtype == Dtype::f16 ? wide_f16 : wide_bf16;
  }
  MultiplyStrips<float> products(float) const { return multiply; }
  MultiplyStrips<double> products(double) const { return multiply_wide; }
};

SK_DECLARE_KERNELS(GramCrossKernels, gram_cross_kernels);

}  // namespace sk
