#include <torch/csrc/stable/library.h>

#include <cstring>

#include "buffer.h"
#include "inputs.h"
#include "trim.h"
#include "trim_keys.h"
#include "weighted_merge_kernel.h"

namespace sk {
namespace {

// Three numbers of every expert, in the compute type.
template <class Numbers, class C>
std::vector<Numbers> numbers_of(const Tensor& table) {
  static_assert(sizeof(Numbers) == 3 * sizeof(C));
  const Tensor contiguous = torch::stable::contiguous(table);
  const double* const first = static_cast<const double*>(contiguous.data_ptr());
  const std::vector<C> narrow(first, first + contiguous.numel());
  std::vector<Numbers> numbers(narrow.size() / 3);
  memcpy(numbers.data(), narrow.data(), narrow.size() * sizeof(C));
  return numbers;
}

void check_numbers(const char* argument, const Tensor& table) {
  require(table.is_cpu() && table.scalar_type() == ScalarType::Double && table.dim() == 2 && table.size(1) == 3,
          argument, " must be float64 [num_tasks, 3] on the CPU, got another dtype, shape or device");
}

Inter parse_inter(const std::string& name) { return Inter(one_of("inter", name, {"paper", "half", "raw"})); }

// The tensors of a call and what their scores depend on.
template <class Key>
struct Scored {
  using C = ComputeOf<Key>;

  const Scope& scope;
  const std::vector<Clipping<C>> clipping;
  const Inter inter;
  const bool drop;

  Scored(const Scope& scope, const Tensor& clipping, Inter inter, bool drop)
      : scope(scope), clipping(numbers_of<Clipping<C>, C>(clipping)), inter(inter), drop(drop) {}

  const ScoreKernel<Key>& kernel(const Part& part) const {
    return SK_KERNELS(weighted_merge_kernels).scores.get<Key>(part.dtype);
  }
};

// What a thread gives its kernels.
template <class Key>
class ScoreThread {
 public:
  explicit ScoreThread(const Scored<Key>& of)
      : experts_(of.clipping.size()), scratch_(int64_t(of.clipping.size()) * kScratch) {
    args_.experts = experts_.data();
    args_.clipping = of.clipping.data();
    args_.inter = of.inter;
    args_.num_tasks = int(experts_.size());
    args_.drop = of.drop;
    args_.scratch = scratch_.get();
  }

  // Of elements begin to begin + n.
  const ScoreArgs<Key>& at(const Part& part, int64_t begin, int64_t n) {
    args_.base = part.base_at(begin);
    for (size_t t = 0; t < experts_.size(); ++t) experts_[t] = part.expert_at(int64_t(t), begin);
    args_.n = n;
    return args_;
  }

 private:
  ScoreArgs<Key> args_{};
  std::vector<const void*> experts_;
  Buffer<ComputeOf<Key>> scratch_;
};

template <class Key>
class ScoreKeys : public FormedKeys {
 public:
  explicit ScoreKeys(const Scored<Key>& scored) : scored_(scored) {}

  std::unique_ptr<KeyFormer> former() const override { return std::make_unique<Former>(scored_); }
  int64_t num_tasks() const override { return scored_.scope.num_tasks; }

  static ComputeOf<Key> score(Key key) {
    const Key above = key < kMiddleKey<Key> ? kMiddleKey<Key> - key : key - kMiddleKey<Key>;
    const Key bits = above ? above + kLeastScore<Key> : 0;
    ComputeOf<Key> magnitude;
    memcpy(&magnitude, &bits, sizeof bits);
    return key < kMiddleKey<Key> ? -magnitude : magnitude;
  }

 private:
  struct Former : KeyFormer {
    const Scored<Key>& of;
    ScoreThread<Key> thread;

    explicit Former(const Scored<Key>& of) : of(of), thread(of) {}
    void form(const Part& part, int64_t begin, int64_t n, void* keys) override {
      of.kernel(part).keys(thread.at(part, begin, n), static_cast<Key*>(keys), kFormedStride);
    }
  };
  static_assert(kFormedStride >= kChunk + kKeySlack);

  const Scored<Key>& scored_;
};

Tensor weighted_merge_limits(std::vector<Tensor> base, std::vector<Tensor> experts, Tensor clipping,
                             std::vector<int64_t> ranks, std::string inter_name, bool drop) {
  const Inter inter = parse_inter(inter_name);
  check_numbers("clipping", clipping);
  const Inputs inputs(base, experts, size_t(clipping.size(0)));
  const int64_t num_tasks = inputs.scope.num_tasks, numel = inputs.scope.numel;
  require(int64_t(ranks.size()) == num_tasks, "ranks must be one for every expert (", num_tasks, "), got ",
          ranks.size());
  std::vector<Place> places;
  for (const int64_t rank : ranks) {
    require(rank > 0 && rank <= numel, "ranks must be in [1, ", numel, "], the number of entries, got ", rank);
    places.push_back({int64_t(places.size()), rank});
  }
  const Tensor limits =
      torch::stable::new_empty(experts[0], {num_tasks, 2}, inputs.wide ? ScalarType::Double : ScalarType::Float);
  const auto fill = [&](auto key) {
    using Key = decltype(key);
    const Scored<Key> scored(inputs.scope, clipping, inter, drop);
    const ScoreKeys<Key> keys(scored);
    Scope scope = inputs.scope;
    scope.formed = &keys;
    scope.mixed = true;
    const std::vector<std::string> names;
    LimitSearch<Key> search(scope, places, /*all_ties=*/true, NonFinite::propagate, names);
    search.expect(Wanted::nothing);
    const Tally<Key> tally = search.count(Wanted::nothing);
    const std::vector<Limit<Key>>& found = search.settle(tally);
    auto* row = static_cast<ComputeOf<Key>*>(limits.data_ptr());
    for (size_t t = 0; t < found.size(); ++t, row += 2) {
      row[0] = keys.score(found[t].threshold);
      row[1] = keys.score(tally.totals[t].largest);
    }
  };
  inputs.wide ? fill(int64_t()) : fill(int32_t());
  return limits;
}

void weighted_merge_scored_out(std::vector<Tensor> base, std::vector<Tensor> experts, Tensor clipping, Tensor limits,
                               std::string inter_name, bool drop, std::vector<Tensor> out) {
  const Inter inter = parse_inter(inter_name);
  check_numbers("clipping", clipping);
  check_numbers("limits", limits);
  require(limits.size(0) == clipping.size(0), "limits must be of as many experts as clipping (", clipping.size(0),
          "), got ", limits.size(0));
  const Inputs inputs(base, experts, size_t(clipping.size(0)));
  Outputs outputs(out, base, experts, size_t(clipping.size(0)));
  const auto merge = [&](auto key) {
    using Key = decltype(key);
    const Scope& scope = inputs.scope;
    const Scored<Key> scored(scope, clipping, inter, drop);
    const auto live = numbers_of<Live<ComputeOf<Key>>, ComputeOf<Key>>(limits);
    scope.parallel([&](int64_t first, int64_t last) {
      ScoreThread<Key> thread(scored);
      for (int64_t c = first; c < last; ++c) {
        const Chunk chunk = scope.chunk(c);
        const bool stream = scope.numel * size_of(chunk.part.dtype) > kStreamBytes;
        scored.kernel(chunk.part)
            .merge(thread.at(chunk.part, chunk.begin, chunk.count), live.data(), stream,
                   outputs.at(scope, chunk.part_index, chunk.begin));
        scope.report(chunk);
      }
    });
  };
  inputs.wide ? merge(int64_t()) : merge(int32_t());
  outputs.deliver();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("weighted_merge_limits", TORCH_BOX(&weighted_merge_limits));
  m.impl("weighted_merge_scored_out", TORCH_BOX(&weighted_merge_scored_out));
}

}  // namespace sk
