// What would corrupt memory is checked here; what a user gets wrong is checked in Python first, with the same words.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <string>

#include "dtype.h"

namespace sk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const std::string& argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      STD_TORCH_CHECK(false, argument, " must be float64, float32, float16 or bfloat16, got another dtype");
  }
}

// The place of `value` among the choices of an option.
inline int one_of(const char* argument, const std::string& value, std::initializer_list<const char*> choices) {
  std::string list;
  int i = 0;
  for (const char* choice : choices) {
    if (value == choice) return i;
    list += (i++ ? ", '" : "'") + std::string(choice) + "'";
  }
  STD_TORCH_CHECK(false, argument, " must be one of ", list, ", got '", value, "'");
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const std::string& argument) {
  STD_TORCH_CHECK(t.is_cpu() && like.is_cpu(), argument, " must be on the CPU like every other tensor, got another device");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), argument, " must have the dtype of experts[0], got another");
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  STD_TORCH_CHECK(same, argument, " must have the shape of experts[0], got another");
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto last = [](const Tensor& t) {
    int64_t i = 0;
    for (int64_t d = 0; d < t.dim(); ++d) i += (t.size(d) - 1) * t.stride(d);
    return static_cast<const char*>(t.data_ptr()) + (i + 1) * int64_t(t.element_size());
  };
  return a.data_ptr() < last(b) && b.data_ptr() < last(a);
}

}  // namespace sk
