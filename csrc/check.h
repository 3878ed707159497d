// What would corrupt memory is checked here; what a user gets wrong is checked in Python first, with the same words.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

namespace sk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own check would put the source file's path in front of the sentence.
template <class... Message>
void require(bool condition, const Message&... message) {
  if (condition) return;
  std::ostringstream sentence;
  (sentence << ... << message);
  throw std::runtime_error(sentence.str());
}

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
      throw std::runtime_error(argument + " must be float64, float32, float16 or bfloat16, got another dtype");
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
  throw std::runtime_error(std::string(argument) + " must be one of " + list + ", got '" + value + "'");
}

inline bool has_shape(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return t.sizes().equals(sizes);
}

inline void check_same_kind(const Tensor& t, const Tensor& like, const std::string& argument,
                            const char* name_of_like = "experts[0]") {
  require(t.scalar_type() == like.scalar_type(), argument, " must have the dtype of ", name_of_like, ", got another");
  require(has_shape(t, like.sizes()), argument, " must have the shape of ", name_of_like, ", got another");
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const std::string& argument,
                             const char* name_of_like = "experts[0]") {
  require(t.is_cpu() && like.is_cpu(), argument, " must be on the CPU like every other tensor, got another device");
  check_same_kind(t, like, argument, name_of_like);
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Tensors of any device.
inline void check_alike(const Tensor& t, const Tensor& first, const Tensor& first_of_all, const std::string& argument) {
  require(on_same_device(t, first_of_all), argument, " must be on the device of experts[0], got another");
  check_same_kind(t, first, argument);
}

// An op on one tensor takes its experts and nothing else.
inline void check_one_tensor(const std::vector<Tensor>& experts, const std::vector<double>& density) {
  require(!experts.empty(), "experts must be at least one tensor, got none");
  require(experts.size() == density.size(), "density must be one number per expert (", experts.size(), "), got ",
          density.size());
}

inline std::vector<Tensor> as_list(const std::optional<Tensor>& base) {
  return base ? std::vector<Tensor>{*base} : std::vector<Tensor>{};
}

// The bytes from the first to the last element, holes included.
struct Extent {
  const char *begin, *end;
};
inline Extent extent(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.data_ptr());
  if (t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {begin, begin + (last + 1) * int64_t(t.element_size())};
}

// Whether the elements of two tensors of one shape and dtype lie in the same places.
inline bool same_memory(const Tensor& a, const Tensor& b) {
  if (a.data_ptr() != b.data_ptr()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Every out tensor is apart from the inputs and from the other out tensors; in place it may also be an input of its own
// merged tensor. Of each merged tensor there are equally many in every list, those of the first before the second's.
inline void check_apart(const std::vector<Tensor>& out, std::initializer_list<const std::vector<Tensor>*> inputs,
                        bool in_place = false, size_t parts = 1) {
  struct Taken {
    Extent extent;
    size_t index;
  };
  std::vector<Taken> taken;
  for (size_t i = 0; i < out.size(); ++i) {
    for (int64_t d = 0; d < out[i].dim(); ++d)
      require(out[i].size(d) < 2 || out[i].stride(d) != 0,
              "out must have memory for every element, got an expanded tensor");
    if (out[i].numel() > 0) taken.push_back({extent(out[i]), i});
  }
  std::sort(taken.begin(), taken.end(), [](const Taken& a, const Taken& b) { return a.extent.begin < b.extent.begin; });
  for (size_t i = 1; i < taken.size(); ++i)
    require(taken[i - 1].extent.end <= taken[i].extent.begin,
            "out must be apart from every other out, got memory that overlaps one");
  for (const auto* list : inputs)
    for (size_t i = 0; i < list->size(); ++i) {
      const Tensor& input = (*list)[i];
      const Extent read = extent(input);
      const auto after = std::upper_bound(taken.begin(), taken.end(), read.begin,
                                          [](const char* p, const Taken& t) { return p < t.extent.end; });
      if (read.begin == read.end || after == taken.end() || after->extent.begin >= read.end) continue;
      const bool own_part = i * parts / list->size() == after->index * parts / out.size();
      require(in_place && own_part && same_memory(out[after->index], input),
              "out must be apart from every input, got memory that overlaps one");
    }
}

}  // namespace sk
