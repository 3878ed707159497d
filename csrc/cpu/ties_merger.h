// What one TIES merge goes by: its limits, weights and scales, and how a chunk is merged with them.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../ties_options.h"
#include "block_sums.h"
#include "finite.h"
#include "inputs.h"
#include "keep.h"
#include "masks_kernel.h"
#include "ties_draws.h"
#include "ties_merge_kernel.h"
#include "trim.h"
#include "trim_kernel.h"

namespace sk {

template <class Key>
class Merger {
  using C = typename TiesArgs<Key>::C;

 public:
  Merger(const Scope& scope, const TiesOptions& options, const KeepOptions& keep)
      : scope_(scope), options_(options), keep_(scope, keep, options.nonfinite == NonFinite::drop) {
    require(std::isfinite(C(options.lam)), "lam must be finite in the compute type, got ", options.lam);
    for (const Part& part : scope.parts) {
      for (const C weight : weights_of<C>(options, part.dtype)) weights_.push_back(weight);
      if (options.rule == Rule::mergekit_all) divisors_.push_back(divisor_of<C>(options, part.dtype));
    }
    if (options.scales) rescales_ = given_factors(*options.scales, "scales");
    if (options.unique_scales) unique_scales_ = given_factors(*options.unique_scales, "unique_scales");
  }

  // Finds the limits, unless they are given, and what they rescale by.
  void find_limits() {
    limits_ = options_.thresholds ? given_limits() : trimmed_limits();
    if (options_.rescale) keep_.any() ? set_masked_rescales() : set_rescales();
  }

  const std::vector<Limit<Key>>& limits() const { return limits_; }
  void set_limits(std::vector<Limit<Key>> limits) { limits_ = std::move(limits); }

  // merge(args, part, begin) merges one run of elements of one tensor and records up to max_draws draws of a chunk;
  // patch(part, begin, draws, count) overwrites some elements.
  template <class Merge, class Patch>
  void run(int max_draws, const Merge& merge, const Patch& patch) const {
    Draws draws = new_draws();
    scope_.parallel([&](int64_t first, int64_t last) {
      Scratch scratch = new_scratch();
      Draws::List& list = draws.new_list();
      for (int64_t c = first; c < last; ++c) {
        merge_under_guess(c, draws.guess(), scratch, max_draws, merge, draws, list);
        scope_.report(scope_.chunk(c));
      }
    });
    settle(draws, max_draws, merge, patch);
  }

  // The steps of run().
  struct Scratch {
    std::vector<const void*> experts;
    std::vector<Key> limits;
    std::vector<int64_t> ends;
    std::array<Draw, kMaxDraws> draws;
    std::vector<uint8_t> bits;
    std::vector<const uint8_t*> masks;  // [num_tasks] or none

    Scratch(int64_t num_tasks, bool masked) : experts(num_tasks), limits(num_tasks) {
      if (!masked) return;
      bits.resize(size_t(num_tasks * kMaskBytes));
      for (int64_t t = 0; t < num_tasks; ++t) masks.push_back(mask(t));
    }
    uint8_t* mask(int64_t t) { return bits.data() + t * kMaskBytes; }
  };
  Scratch new_scratch() const { return Scratch(scope_.num_tasks, keep_.any()); }
  Draws new_draws() const { return Draws(rule_is_paper() ? scope_.num_chunks : 0); }

  template <class Merge>
  void merge_under_guess(int64_t chunk, int8_t sign, Scratch& scratch, int max_draws, const Merge& merge, Draws& draws,
                         Draws::List& list) const {
    const TiesResult result = merge_chunk(chunk, sign, scratch, max_draws, merge);
    draws.set(chunk, sign, result, scratch.draws.data(), max_draws, list);
  }

  template <class Merge, class Patch>
  void settle(Draws& draws, int max_draws, const Merge& merge, const Patch& patch) const {
    if (!draws.any()) return;
    const int8_t sign = draws.sign();
    scope_.parallel([&](int64_t first, int64_t last) {
      Scratch scratch = new_scratch();
      for (int64_t c = first; c < last; ++c) {
        const Draws::Guess& guess = draws[c];
        if (guess.sign == 0 || guess.sign == sign) continue;
        if (sign == 0 || guess.num_draws > max_draws) {
          merge_chunk(c, sign, scratch, max_draws, merge);
        } else {
          const Chunk chunk = scope_.chunk(c);
          patch(chunk.part_index, chunk.begin, guess.begin(), guess.num_draws);
        }
      }
    });
  }

  // What a merge of n elements of a tensor takes besides them: their places in memory and the limits.
  TiesArgs<Key> args_of(size_t part_index, int64_t n, int8_t zero_sign) const {
    const size_t first = part_index * size_t(scope_.num_tasks);
    TiesArgs<Key> args;
    args.weights = weights_.empty() ? nullptr : weights_.data() + first;
    args.rescales = rescales_.empty() ? nullptr : rescales_.data() + first;
    args.unique_scales = unique_scales_.empty() ? nullptr : unique_scales_.data() + first;
    args.masks = nullptr;
    args.first_bit = 0;
    args.min_count = int(options_.min_count);
    args.num_tasks = int(scope_.num_tasks);
    args.n = n;
    args.lam = C(options_.lam);
    args.divisor = divisors_.empty() ? C(1) : divisors_[part_index];
    args.elect_count = options_.elect_count;
    args.divide = options_.divide;
    args.finite = options_.nonfinite == NonFinite::error;
    args.drop = options_.nonfinite == NonFinite::drop;
    args.stream = false;
    args.zero_sign = zero_sign;
    args.draws = nullptr;
    args.max_draws = 0;
    return args;
  }

  bool rule_is_paper() const { return options_.rule == Rule::paper || options_.rule == Rule::paper_max; }

 private:
  static constexpr int64_t kMaskBytes = kChunk / 8 + Keep<Key>::kRoom;

  std::vector<Limit<Key>> given_limits() const {
    if (options_.nonfinite == NonFinite::error) check_finite<Key>(scope_, options_.names);
    std::vector<Limit<Key>> limits;
    for (const Key key :
         given_keys<Key>(*options_.thresholds, scope_.num_tasks, "thresholds", options_.cuts.has_value()))
      limits.push_back({key, options_.cuts ? (*options_.cuts)[limits.size()] : scope_.numel});
    return limits;
  }

  // [parts, num_tasks]
  std::vector<C> given_factors(const Tensor& given, const std::string& argument) const {
    const int64_t parts = int64_t(scope_.parts.size());
    require(given.is_cpu() && given.scalar_type() == ScalarType::Double && given.dim() == 2 && given.size(0) == parts &&
                given.size(1) == scope_.num_tasks,
            argument, " must be float64 [", parts, ", ", scope_.num_tasks, "] on the CPU, got another tensor");
    const Tensor values = torch::stable::contiguous(given);
    const double* const data = static_cast<const double*>(values.data_ptr());
    return std::vector<C>(data, data + values.numel());
  }

  std::vector<Limit<Key>> trimmed_limits() const {
    return trim<Key>(scope_, options_.density, options_.semantics, options_.nonfinite, options_.names);
  }

  // Runs of a chunk within which every expert keeps or drops all its ties. body(begin, count); scratch.limits is set.
  template <class Body>
  void for_runs(const Chunk& chunk, Scratch& scratch, const Body& body) const {
    const int64_t flat = chunk.part.offset + chunk.begin, flat_end = flat + chunk.count;
    scratch.ends.clear();
    for (const auto& limit : limits_)
      if (limit.cut > flat && limit.cut < flat_end) scratch.ends.push_back(limit.cut);
    std::sort(scratch.ends.begin(), scratch.ends.end());
    scratch.ends.push_back(flat_end);
    int64_t at = flat;
    for (const int64_t end : scratch.ends) {
      if (end == at) continue;
      for (size_t t = 0; t < limits_.size(); ++t) {
        scratch.limits[t] = kept_above<Key>(at < limits_[t].cut ? limits_[t].threshold - 1 : limits_[t].threshold);
      }
      body(at - chunk.part.offset, end - at);
      at = end;
    }
  }

  template <class Merge>
  TiesResult merge_chunk(int64_t index, int8_t zero_sign, Scratch& scratch, int max_draws, const Merge& merge) const {
    const Chunk chunk = scope_.chunk(index);
    const Part& part = chunk.part;
    TiesResult total = {0, 0};
    for (size_t t = 0; t < scratch.masks.size(); ++t)
      keep_.fill(chunk.part_index, chunk.begin, chunk.count, int64_t(t), scratch.mask(int64_t(t)));
    for_runs(chunk, scratch, [&](int64_t begin, int64_t count) {
      for (int64_t t = 0; t < scope_.num_tasks; ++t) scratch.experts[t] = part.expert_at(t, begin);
      TiesArgs<Key> args = args_of(chunk.part_index, count, zero_sign);
      args.base = part.base_at(begin);
      args.experts = scratch.experts.data();
      args.limits = scratch.limits.data();
      args.masks = scratch.masks.empty() ? nullptr : scratch.masks.data();
      args.first_bit = begin - chunk.begin;
      args.stream = scope_.numel * size_of(part.dtype) > kStreamBytes;
      const int recorded = int(std::min<int64_t>(total.num_draws, max_draws));
      args.draws = scratch.draws.data() + recorded;
      args.max_draws = max_draws - recorded;
      const TiesResult result = merge(args, chunk.part_index, begin);
      for (int d = recorded; d < std::min<int64_t>(recorded + result.num_draws, max_draws); ++d)
        scratch.draws[d].index += begin - chunk.begin;  // from the run to the chunk
      total.sign_sum += result.sign_sum;
      total.num_draws += result.num_draws;
    });
    return total;
  }

  // mergekit's `rescale`: every trimmed task vector is scaled back to its L1 norm, tensor by tensor.
  void set_rescales() {
    const size_t tasks = size_t(scope_.num_tasks);
    std::vector<L1Norms> chunk_norms(size_t(scope_.num_chunks) * tasks, L1Norms{0, 0});
    const bool drop = options_.nonfinite == NonFinite::drop;
    scope_.parallel([&](int64_t first, int64_t last) {
      Scratch scratch = new_scratch();
      for (int64_t c = first; c < last; ++c) {
        const Chunk chunk = scope_.chunk(c);
        for_runs(chunk, scratch, [&](int64_t begin, int64_t count) {
          for (size_t t = 0; t < tasks; ++t) {
            chunk_norms[size_t(c) * tasks + t] +=
                SK_KERNELS(trim_kernels)
                    .get<Key>(chunk.part.dtype)
                    .l1_norms(chunk.part.base_at(begin), chunk.part.expert_at(int64_t(t), begin), count,
                              scratch.limits[t], drop);
          }
        });
      }
    });
    std::vector<L1Norms> norms(scope_.parts.size() * tasks, L1Norms{0, 0});
    for (int64_t c = 0; c < scope_.num_chunks; ++c) {
      const size_t part = scope_.chunk(c).part_index;
      for (size_t t = 0; t < tasks; ++t) norms[part * tasks + t] += chunk_norms[size_t(c) * tasks + t];
    }
    for (size_t i = 0; i < norms.size(); ++i) rescales_.push_back(rescale(norms[i], scope_.parts[i / tasks].dtype));
  }

  // The same where masks trim too; norms add up in the order of the op `masks`.
  void set_masked_rescales() {
    struct Item {
      size_t part;
      int64_t begin, count;
    };
    std::vector<Item> items;
    for (size_t p = 0; p < scope_.parts.size(); ++p)
      for (int64_t begin = 0; begin < scope_.parts[p].numel; begin += kSumBlock)
        items.push_back({p, begin, std::min(kSumBlock, scope_.parts[p].numel - begin)});
    const int64_t tasks = scope_.num_tasks, num_items = int64_t(items.size());
    std::vector<double> all(size_t(num_items * tasks)), kept = all;  // [num_tasks, items]
    torch::stable::parallel_for(0, num_items, 1, [&](int64_t first, int64_t last) {
      std::vector<uint8_t> bits(kSumBlock / 8);
      for (int64_t i = first; i < last; ++i) {
        const auto [p, begin, count] = items[size_t(i)];
        const Part& part = scope_.parts[p];
        for (int64_t t = 0; t < tasks; ++t) {
          keep_.fill_within(limits_[size_t(t)], p, begin, count, t, bits.data());
          const MaskSums sums = SK_KERNELS(masks_kernels)
                                    .sums.get<Key>(part.dtype)(part.base_at(begin), part.expert_at(t, begin), count,
                                                               options_.nonfinite == NonFinite::drop, bits.data());
          all[size_t(t * num_items + i)] = sums.all;
          kept[size_t(t * num_items + i)] = sums.kept_norm;
        }
      }
    });
    int64_t first = 0;
    for (const Part& part : scope_.parts) {
      const int64_t count = (part.numel + kSumBlock - 1) / kSumBlock;
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t at = t * num_items + first;
        rescales_.push_back(
            rescale({fold_halves(&all[size_t(at)], count), fold_halves(&kept[size_t(at)], count)}, part.dtype));
      }
      first += count;
    }
  }

  // mergekit rounds norms and ratio to the dtype, but its random methods take float32 for float16.
  C rescale(L1Norms norms, Dtype dtype) const {
    if (options_.semantics == Semantics::exact || (keep_.by_mask() && dtype == Dtype::f16))
      dtype = sizeof(C) == 8 ? Dtype::f64 : Dtype::f32;
    const C all = stored<C>(norms.all, dtype), kept = stored<C>(norms.kept, dtype);
    if (all < C(1e-7) || kept < C(1e-7)) return 1;
    // A norm past the dtype's range would make mergekit's ratio NaN; the norms themselves are fine.
    if (std::isinf(all) || std::isinf(kept)) return stored<C>(norms.all / norms.kept, dtype);
    return stored<C>(double(all / kept), dtype);
  }

  const Scope& scope_;
  const TiesOptions& options_;
  const Keep<Key> keep_;
  std::vector<Limit<Key>> limits_;
  std::vector<C> weights_, rescales_, unique_scales_;  // [parts, num_tasks], or empty
  std::vector<C> divisors_;                            // [parts], or empty
};

}  // namespace sk
