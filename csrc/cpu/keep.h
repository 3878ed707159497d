// What is kept besides the limits of a trim: masks that are given, drawn, or of entries below an upper limit, as the
// bits of one run of elements at a time.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "ids.h"
#include "keep_kernel.h"
#include "masks_kernel.h"
#include "scope.h"
#include "trim.h"

namespace sk {

struct KeepOptions {
  std::optional<std::vector<Tensor>> keep;  // one per tensor: bits [num_tasks, bytes], or [1, bytes] for all experts
  std::optional<Tensor> upper;              // drops what is above, and ties below upper_cuts
  std::optional<std::vector<int64_t>> upper_cuts;
  std::optional<std::vector<double>> keep_density;
  int64_t seed = 0;
  std::optional<std::vector<int64_t>> tensor_ids, task_ids;
};

// Thresholds that are given, as keys. may_be_nan: a rank may have found NaN, where it propagates.
template <class Key>
std::vector<Key> given_keys(const Tensor& thresholds, int64_t num_tasks, const std::string& argument, bool may_be_nan) {
  using C = ComputeOf<Key>;
  const Tensor given = torch::stable::contiguous(thresholds);
  require(given.is_cpu() && given.numel() == num_tasks, argument, " must be one value per expert on the CPU, got ",
          given.numel());
  const Dtype dtype = dtype_of(given, argument);
  require(dtype == Dtype::f32 || dtype == Dtype::f64, argument, " must be float32 or float64, got another dtype");
  std::vector<Key> keys;
  for (int64_t t = 0; t < num_tasks; ++t) {
    const C value = dtype == Dtype::f32 ? C(static_cast<const float*>(given.data_ptr())[t])
                                        : C(static_cast<const double*>(given.data_ptr())[t]);
    require(value >= 0 || (may_be_nan && std::isnan(value)), argument, " must be 0 or greater, got ", value);
    Key key;
    memcpy(&key, &value, sizeof value);
    keys.push_back(key & kMaxKey<Key>);  // -0 has the sign bit
  }
  return keys;
}

// The key that those of kept entries exceed: 0 adds nothing; NaN is never trimmed away.
template <class Key>
Key kept_above(Key threshold) {
  return std::clamp<Key>(threshold, 0, kInfinityKey<Key>);
}

template <class Key>
class Keep {
 public:
  static constexpr int64_t kRoom = 8;  // bytes that may be read past the bits

  Keep(const Scope& scope, const KeepOptions& options, bool drop) : scope_(scope), drop_(drop) {
    const size_t parts = scope.parts.size(), tasks = size_t(scope.num_tasks);
    if (options.keep) set_given(*options.keep);
    if (options.upper) {
      require(!options.upper_cuts || options.upper_cuts->size() == tasks, "upper_cuts must be one per expert, got ",
              options.upper_cuts ? options.upper_cuts->size() : 0);
      const auto keys = given_keys<Key>(*options.upper, scope.num_tasks, "upper", options.upper_cuts.has_value());
      for (size_t t = 0; t < tasks; ++t) upper_.push_back({keys[t], options.upper_cuts ? (*options.upper_cuts)[t] : 0});
    }
    require(options.upper || !options.upper_cuts, "upper must be given where upper_cuts are, got none");
    if (options.keep_density) {
      require(options.keep_density->size() == tasks, "keep_density must be one number per expert (", tasks, "), got ",
              options.keep_density->size());
      for (const double density : *options.keep_density) {
        require(density >= 0, "keep_density must be 0 or greater, got ", density);
        words_below_.push_back(keep_below(density));
      }
      seed_ = uint64_t(options.seed);
      tensor_ids_ = ids(options.tensor_ids, parts, "tensor_ids", "merged tensor");
      task_ids_ = ids(options.task_ids, tasks, "task_ids", "expert");
    }
  }

  bool any() const { return !upper_.empty() || by_mask(); }
  bool by_mask() const { return !given_.empty() || !words_below_.empty(); }

  // Of `count` elements of a tensor from `begin`, a multiple of 8: their bits.
  void fill(size_t part, int64_t begin, int64_t count, int64_t task, uint8_t* bits) const {
    const int64_t bytes = (count + 7) / 8;
    if (words_below_.empty())
      memset(bits, 0xFF, size_t(bytes));
    else
      SK_KERNELS(masks_kernels)
          .bits({seed_, tensor_ids_[part], task_ids_[size_t(task)]}, words_below_[size_t(task)], begin, count, bits);
    if (!given_.empty()) {
      const uint8_t* const given = given_[part].at(task) + begin / 8;
      for (int64_t i = 0; i < bytes; ++i) bits[i] &= given[i];
    }
    if (upper_.empty()) return;
    const Part& of = scope_.parts[part];
    const Limit<Key>& upper = upper_[size_t(task)];
    SK_KERNELS(keep_kernels)
        .get<Key>(of.dtype)
        .drop_above(of.base_at(begin), of.expert_at(task, begin), count,
                    {upper.threshold - 1, upper.threshold, upper.cut - of.offset - begin}, drop_, bits);
  }

  // The same less what a limit trims away.
  void fill_within(const Limit<Key>& limit, size_t part, int64_t begin, int64_t count, int64_t task,
                   uint8_t* bits) const {
    fill(part, begin, count, task, bits);
    if (limit.threshold == 0) return;  // which trims zeros alone
    const Part& of = scope_.parts[part];
    SK_KERNELS(keep_kernels)
        .get<Key>(of.dtype)
        .keep_above(
            of.base_at(begin), of.expert_at(task, begin), count,
            {kept_above<Key>(limit.threshold - 1), kept_above<Key>(limit.threshold), limit.cut - of.offset - begin},
            drop_, bits);
  }

 private:
  struct Given {
    const uint8_t* bits;
    int64_t stride;  // bytes from an expert to the next; 0 where they share a mask

    const uint8_t* at(int64_t task) const { return bits + task * stride; }
  };

  void set_given(const std::vector<Tensor>& keep) {
    require(keep.size() == scope_.parts.size(), "keep must be one tensor for every merged tensor, got ", keep.size(),
            " for ", scope_.parts.size());
    for (size_t p = 0; p < keep.size(); ++p) {
      const Tensor& t = keep[p];
      const int64_t bytes = (scope_.parts[p].numel + 7) / 8;
      require(t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.dim() == 2 && t.size(1) == bytes &&
                  (t.size(0) == 1 || t.size(0) == scope_.num_tasks),
              "keep must be uint8 [num_tasks or 1, ", bytes, "] on the CPU, got another tensor");
      alive_.push_back(torch::stable::contiguous(t));
      given_.push_back({static_cast<const uint8_t*>(alive_.back().data_ptr()), t.size(0) == 1 ? 0 : bytes});
    }
  }

  const Scope& scope_;
  bool drop_;
  std::vector<Tensor> alive_;
  std::vector<Given> given_;           // of every tensor, or none
  std::vector<Limit<Key>> upper_;      // of every expert, or none
  std::vector<uint64_t> words_below_;  // of every expert, or none
  uint64_t seed_ = 0;
  std::vector<uint32_t> tensor_ids_, task_ids_;
};

}  // namespace sk
