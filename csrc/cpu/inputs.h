// The tensors of a call, checked, contiguous and alive, and the scope that points into them; the tensors it fills.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "scope.h"

namespace sk {

constexpr int64_t kStreamBytes = 8 << 20;  // larger outputs are written past the caches

// base: one tensor per merged tensor, or none. experts: all experts of the first tensor, then of the second, ...
struct Inputs {
  std::vector<Tensor> alive;
  Scope scope;
  bool wide = false;  // float64

  Inputs(const std::vector<Tensor>& base, const std::vector<Tensor>& experts, size_t num_tasks) {
    require(num_tasks > 0 && experts.size() % num_tasks == 0,
            "experts must be one tensor for every expert and merged tensor, got ", experts.size(), " for ", num_tasks,
            " experts");
    const size_t parts = experts.size() / num_tasks;
    require(parts > 0, "experts must be at least one tensor, got none");
    require(base.empty() || base.size() == parts, "base must be one tensor for every merged tensor, got ", base.size(),
            " for ", parts);
    alive.reserve(experts.size() + base.size());
    scope.num_tasks = int64_t(num_tasks);
    for (size_t p = 0; p < parts; ++p) {
      const Tensor& first = experts[p * num_tasks];
      const Dtype dtype = dtype_of(first, "experts");
      wide = p == 0 ? dtype == Dtype::f64 : wide;
      require(wide == (dtype == Dtype::f64), "experts must be all float64 or none within one scope, got both");
      std::vector<const char*> pointers;
      for (size_t t = 0; t < num_tasks; ++t) {
        const Tensor& expert = experts[p * num_tasks + t];
        check_same_shape(expert, first, "experts[" + std::to_string(t) + "]");
        pointers.push_back(pointer(expert));
      }
      const char* base_pointer = nullptr;
      if (!base.empty()) {
        check_same_shape(base[p], first, "base");
        base_pointer = pointer(base[p]);
      }
      scope.add(dtype, first.numel(), base_pointer, std::move(pointers));
    }
  }

 private:
  const char* pointer(const Tensor& t) {
    alive.push_back(torch::stable::contiguous(t));
    return static_cast<const char*>(alive.back().data_ptr());
  }
};

// Memory not yet touched is mapped on first touch, 4 KiB at a time: for a large output that takes as long as the merge.
inline void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const Extent memory = extent(t);
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory.begin) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = reinterpret_cast<uintptr_t>(memory.end) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

// One tensor per merged tensor, or num_outputs of them, apart from the inputs unless in place; what is not contiguous
// is filled through a copy.
struct Outputs {
  std::vector<Tensor> wanted, filled;
  size_t num_outputs;

  Outputs(const std::vector<Tensor>& out, const std::vector<Tensor>& base, const std::vector<Tensor>& experts,
          size_t num_tasks, size_t num_outputs = 1, bool in_place = false)
      : wanted(out), num_outputs(num_outputs) {
    const size_t parts = experts.size() / num_tasks;
    if (num_outputs == 1)
      require(out.size() == parts, "out must be one tensor for every merged tensor, got ", out.size());
    else
      require(out.size() == parts * num_outputs, "out must be ", num_outputs, " tensors for every merged tensor, got ",
              out.size(), " for ", parts);
    for (size_t i = 0; i < out.size(); ++i) check_same_shape(out[i], experts[i / num_outputs * num_tasks], "out");
    check_apart(out, {&base, &experts}, in_place, parts);
    for (const Tensor& t : out) {
      filled.push_back(t.is_contiguous() ? t : torch::stable::new_empty(t, t.sizes()));
      ask_for_huge_pages(filled.back());
    }
  }

  char* at(const Scope& scope, size_t part, int64_t i, size_t output = 0) const {
    return static_cast<char*>(filled[part * num_outputs + output].data_ptr()) + i * size_of(scope.parts[part].dtype);
  }

  // Whether one of them is an input.
  bool any_of(const Scope& scope) const {
    std::vector<const void*> written;
    for (const Tensor& t : filled)
      if (t.numel() > 0) written.push_back(t.data_ptr());
    std::sort(written.begin(), written.end());
    const auto is_written = [&](const void* p) { return std::binary_search(written.begin(), written.end(), p); };
    return std::any_of(scope.parts.begin(), scope.parts.end(), [&](const Part& part) {
      return is_written(part.base) || std::any_of(part.experts.begin(), part.experts.end(), is_written);
    });
  }

  void deliver() {
    for (size_t p = 0; p < wanted.size(); ++p)
      if (!wanted[p].is_contiguous()) torch::stable::copy_(wanted[p], filled[p]);
  }
};

}  // namespace sk
