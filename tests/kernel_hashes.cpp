// Runs the kernels of one instruction set on fixed inputs and prints a hash of the results for each dtype and kernel.
// Equal output means equal bits; NaNs count as one value, whose bits the hardware chooses.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/block_sums.h"
#include "cpu/combine_groups_kernel.h"
#include "cpu/combine_kernel.h"
#include "cpu/combine_mask_kernel.h"
#include "cpu/gram_kernel.h"
#include "cpu/keep_kernel.h"
#include "cpu/masks_kernel.h"
#include "cpu/mix_kernel.h"
#include "cpu/representation_loss_kernel.h"
#include "cpu/steps_kernel.h"
#include "cpu/ties_merge_kernel.h"
#include "cpu/trim_kernel.h"
#include "cpu/weighted_merge_kernel.h"
#include "random_bits.h"

namespace {

constexpr int kTasks = 5;

struct Format {
  sk::Dtype dtype;
  const char* name;
  int bytes;
  uint64_t infinity;
};

// Any bit pattern in the 16-bit formats; elsewhere mostly multiples of 1/64, which often draw, and a few patterns.
std::vector<char> tensor(const Format& format, int64_t n) {
  std::vector<char> values(n * format.bytes);
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits = random_bits() >> 16;
    if (format.bytes > 2 && bits % 16) {
      const double wide = (int64_t(bits >> 8) % 129 - 64) / 64.0;
      const float narrow = float(wide);
      if (format.bytes == 8)
        std::memcpy(&bits, &wide, 8);
      else
        std::memcpy(&bits, &narrow, 4);
    }
    std::memcpy(&values[i * format.bytes], &bits, format.bytes);
  }
  return values;
}

struct Hash {
  uint64_t value = 0xCBF29CE484222325;
  void add(uint64_t bits) { value = (value ^ bits) * 0x100000001B3; }
  void add(const Format& format, const std::vector<char>& values) {
    const uint64_t magnitude = ~uint64_t(0) >> (65 - 8 * format.bytes);
    for (std::size_t i = 0; i < values.size(); i += format.bytes) {
      uint64_t bits = 0;
      std::memcpy(&bits, &values[i], format.bytes);
      add((bits & magnitude) > format.infinity ? format.infinity + 1 : bits);
    }
  }
  void add(double number) {
    uint64_t bits;
    std::memcpy(&bits, &number, 8);
    add(number == number ? bits : 1);
  }
};

template <class Key>
uint64_t key_bits(Key key) {
  return uint64_t(std::min<Key>(key, sk::kInfinityKey<Key> + 1));
}

// Every instruction on the same two inputs, with a third in place, its result added up and stored.
void run_steps(const Format& format, const std::vector<const void*>& inputs, int64_t n, bool wide, Hash& hash) {
  constexpr int kBlock = 128, kFirst = int(sk::Code::add), kCodes = int(sk::Code::within) + 1 - kFirst;
  std::vector<sk::Step> steps;
  for (int i = 0; i < 2; ++i) steps.push_back({sk::Code::load, i, i, i, false});
  for (int i = 0; i < kCodes; ++i) {
    const sk::Code code = sk::Code(kFirst + i);
    steps.push_back({sk::Code::load, 2, 2, 2, false});
    steps.push_back({code, 2, 0, code == sk::Code::within ? 0 : 1, i % 2 == 0});
    steps.push_back({sk::Code::sum, 0, 2, 2, false});
    steps.push_back({sk::Code::store, i, 2, 2, false});
  }
  steps.push_back({sk::Code::dot, 0, 0, 1, false});
  alignas(64) static char registers[3 * sk::register_stride<double>(kBlock) * 8];
  std::vector<std::vector<char>> outputs(kCodes, std::vector<char>(n * format.bytes));
  std::vector<void*> places;
  for (std::vector<char>& output : outputs) places.push_back(output.data());
  const double numbers[]{0.25, double(n / 2)};
  double sums[sk::kSumLanes]{};
  sk::StepsArgs args{};
  args.steps = steps.data();
  args.num_steps = int(steps.size());
  args.inputs = inputs.data();
  args.outputs = places.data();
  args.n = n;
  args.numbers = numbers;
  args.stride = 1;
  args.sums = sums;
  args.lanes = sk::kSumLanes;
  args.registers = registers;
  args.block = kBlock;
  sk::SK_ISA::steps_kernels.get(format.dtype, wide)(args);
  for (const std::vector<char>& output : outputs) hash.add(format, output);
  for (const double of_lane : sums) hash.add(of_lane);
}

// A masked merge of every kind of noise, and one of groups, forward and backward.
template <class Key>
void run_combine(const Format& format, const void* base, const void* const* task_vectors, int64_t n, Hash& hash) {
  using C = sk::ComputeOf<Key>;
  constexpr int kGroups = 11;
  const sk::CombineMaskKernels& masks = sk::SK_ISA::combine_mask_kernels;
  const sk::CombineGroupsKernels& groups = sk::SK_ISA::combine_groups_kernels;
  std::vector<C> numbers(kTasks * kGroups), logits(n), mask(n), pull(n);
  for (C& x : numbers) x = C(int64_t(random_bits() % 129) - 64) / 64;
  for (C& x : logits) x = C(int64_t(random_bits() % 513) - 256) / 64;
  std::vector<char> out(n * format.bytes);
  std::vector<double> sums(kTasks * kGroups);
  for (const double sharpness : {1.0, 2.0, 1.25, 1e300}) {
    const sk::MaskNoise noise{{7, 3, 0}, sharpness < 1e300, sharpness};
    hash.add(masks.draw<C>()(logits.data(), noise, 8, n, mask.data()));
    const sk::MaskedArgs<Key> args{base, task_vectors, numbers.data(), kTasks, mask.data(), C(0.375), n};
    masks.forward.get<Key>(format.dtype)(args, out.data());
    hash.add(format, out);
    masks.backward.get<Key>(format.dtype)(args, pull.data(), sums.data());
    for (int j = 0; j <= kTasks; ++j) hash.add(sums[j]);
    masks.logits<C>()(mask.data(), C(0.25), C(0.375), C(2), n, pull.data());
    for (const C x : pull) hash.add(double(x));
  }
  const sk::GroupsArgs<Key> args{base, task_vectors, numbers.data(), kTasks, kGroups, {7, 3, 1}, 8, n};
  groups.forward.get<Key>(format.dtype)(args, out.data());
  hash.add(format, out);
  groups.backward.get<Key>(format.dtype)(args, sums.data());
  for (const double sum : sums) hash.add(sum);
}

// Means by magnitudes of other tensors, whatever numbers these are; and by scores of changes that are clipped to any
// range.
template <class Key>
void run_weighted_merge(const Format& format, const void* base, const std::vector<const void*>& experts, int64_t n,
                        bool drop, Hash& hash) {
  using C = sk::ComputeOf<Key>;
  const sk::WeightedMergeKernels& kernels = sk::SK_ISA::weighted_merge_kernels;
  const std::vector<C> weights{C(0.3), C(1), C(0), C(2), C(0.7)};
  std::vector<char> out(n * format.bytes);
  sk::MeanArgs<Key> mean{base, experts.data(), experts.data(), weights.data(), C(0.25), kTasks, n, drop, false};
  const sk::Amiss amiss = kernels.mean.get<Key>(format.dtype)(mean, out.data());
  hash.add(uint64_t(amiss.experts * 2 + amiss.importance));
  hash.add(format, out);
  std::vector<std::vector<C>> wide(kTasks, std::vector<C>(n));
  std::vector<const void*> importance;
  for (int t = 0; t < kTasks; ++t) {
    for (int64_t i = 0; i < n; ++i) wide[t][i] = C((i * (t + 3)) % 11) / C(4);
    importance.push_back(wide[t].data());
  }
  mean.importance = importance.data();
  kernels.mean_wide.get<Key>(format.dtype)(mean, out.data());
  hash.add(format, out);
  std::vector<sk::Clipping<C>> clipping;
  std::vector<sk::Live<C>> live;
  for (int t = 0; t < kTasks; ++t) {
    clipping.push_back({C(0.125) * t, C(1) + t, C(1) + C(0.875) * t});
    live.push_back({C(0.001) * t, C(0.5), C(1) - t});
  }
  alignas(64) static C scratch[kTasks * sk::kScratch];
  for (const sk::Inter inter : {sk::Inter::paper, sk::Inter::half, sk::Inter::raw}) {
    const sk::ScoreArgs<Key> args{base, experts.data(), clipping.data(), inter, kTasks, n, drop, scratch};
    const sk::ScoreKernel<Key>& scores = kernels.scores.get<Key>(format.dtype);
    std::vector<Key> keys(kTasks * (n + sk::kKeySlack));
    scores.keys(args, keys.data(), n + sk::kKeySlack);
    for (int t = 0; t < kTasks; ++t)
      for (int64_t i = 0; i < n; ++i) hash.add(uint64_t(keys[t * (n + sk::kKeySlack) + i]));
    scores.merge(args, live.data(), false, out.data());
    hash.add(format, out);
  }
}

template <class Key>
void run(const Format& format) {
  using C = typename sk::TiesArgs<Key>::C;
  const sk::TrimKernel<Key>& trim = sk::SK_ISA::trim_kernels.get<Key>(format.dtype);
  const sk::TiesKernel<Key>& ties = sk::SK_ISA::ties_kernels.get<Key>(format.dtype);
  const sk::MixKernel<Key> mix = sk::SK_ISA::mix_kernels.uniform.get<Key>(format.dtype);
  const sk::MixKernel<Key> mix_by_column = sk::SK_ISA::mix_kernels.by_column.get<Key>(format.dtype);
  const sk::GramKernels& gram = sk::SK_ISA::gram_kernels;
  const sk::DotKernel<Key> dot = sk::SK_ISA::dot_kernels.get<Key>(format.dtype);
  const sk::RepresentationLossKernel<Key>& loss = sk::SK_ISA::representation_loss_kernels.get<Key>(format.dtype);
  Hash trimmed, located, merged[sk::kRules], mixed, multiplied, combined, lost, masked, bounded, stepped, weighed;
  for (int64_t n : {1, 5, 64, 257, 1003}) {
    const std::vector<char> base = tensor(format, n);
    std::vector<std::vector<char>> experts;
    for (int t = 0; t < kTasks; ++t) experts.push_back(tensor(format, n));
    std::vector<int8_t> signs(n);
    lost.add(loss.forward(base.data(), experts[0].data(), n, signs.data()));
    for (const int8_t sign : signs) lost.add(uint64_t(sign));
    std::vector<char> gradient(n * format.bytes);
    loss.backward(signs.data(), n, C(-0.37), /*stream=*/false, gradient.data());
    lost.add(format, gradient);
    const sk::MasksKernels& masks = sk::SK_ISA::masks_kernels;
    std::vector<uint32_t> words(n + sk::kWordSlack);
    std::vector<uint8_t> drawn((n + 7) / 8);
    masks.words({7, 1, 2}, /*first=*/8, n, words.data());
    for (int64_t i = 0; i < n; ++i) masked.add(uint64_t(words[i]));
    masks.bits({7, 1, 2}, sk::keep_below(0.3), /*first=*/8, n, drawn.data());
    for (const uint8_t byte : drawn) masked.add(uint64_t(byte));
    const sk::MaskSums sums =
        masks.sums.get<Key>(format.dtype)(base.data(), experts[0].data(), n, /*drop=*/n % 2, drawn.data());
    masked.add(uint64_t(sums.kept));
    masked.add(sums.all);
    masked.add(sums.kept_norm);
    for (const bool wide : {false, true})
      run_steps(format, {base.data(), experts[0].data(), experts[1].data()}, n, wide, stepped);
    for (int option = 0; option < 32; ++option) {
      const bool drop = option & 1, elect_count = option & 2, divide = option & 4, weighted = option & 8;
      const void* from = option & 16 ? base.data() : nullptr;
      std::vector<const void*> pointers;
      std::vector<std::vector<uint8_t>> bits(kTasks, std::vector<uint8_t>(n / 8 + 9, 0xFF));
      std::vector<const uint8_t*> masks_of_tasks;
      std::vector<Key> limits, keys(n + sk::kSlack);
      for (const std::vector<char>& expert : experts) {
        pointers.push_back(expert.data());
        trim.keys(from, expert.data(), n, drop, keys.data());
        for (int64_t i = 0; i < n; ++i) trimmed.add(key_bits(keys[i]));
        std::array<Key, 4> ends{keys[0], keys[n / 3], keys[n / 2], keys[n - 1]};
        for (Key& end : ends) end = std::min(end, sk::kInfinityKey<Key>);
        std::sort(ends.begin(), ends.end());
        const sk::Counts<Key> counts = trim.count(from, expert.data(), n, {ends[0], ends[1], ends[2], ends[3]},
                                                  /*rounded=*/elect_count, drop, keys.data());
        for (int64_t number : {counts.above, counts.at_hi, counts.inside, counts.at_lo}) trimmed.add(uint64_t(number));
        trimmed.add(key_bits(counts.largest));
        std::sort(keys.begin(), keys.begin() + counts.inside);
        for (int64_t i = 0; i < counts.inside; ++i) trimmed.add(key_bits(keys[i]));
        std::vector<Key> at(n + sk::kSlack);
        const sk::Counts<Key> places = trim.locate(from, expert.data(), n, {ends[0], ends[1], ends[2], ends[3]},
                                                   /*rounded=*/elect_count, drop, keys.data(), at.data());
        for (int64_t number : {places.above, places.at_hi, places.inside, places.at_lo}) located.add(uint64_t(number));
        located.add(key_bits(places.largest));
        std::vector<Key> key_at(n, -1);
        for (int64_t i = 0; i < places.inside; ++i) key_at[at[i]] = keys[i];
        for (const Key key : key_at) located.add(key_bits(key));
        const sk::L1Norms norms = trim.l1_norms(from, expert.data(), n, ends[1], drop);
        trimmed.add(norms.all);
        trimmed.add(norms.kept);
        const sk::KeepKernel<Key>& keep = sk::SK_ISA::keep_kernels.get<Key>(format.dtype);
        std::vector<uint8_t>& of_task = bits[limits.size()];
        keep.keep_above(from, expert.data(), n, {ends[0], ends[1], n / 3}, drop, of_task.data());
        keep.drop_above(from, expert.data(), n, {ends[3], ends[2], n / 2}, drop, of_task.data());
        for (int64_t i = 0; i < n; ++i) bounded.add(uint64_t(of_task[i / 8] >> i % 8 & 1));
        masks_of_tasks.push_back(of_task.data());
        limits.push_back(ends[1]);
      }
      run_weighted_merge<Key>(format, from, pointers, n, drop, weighed);
      const std::vector<C> weights{C(0.3), C(1), C(-0.5), C(2), C(0.7)}, rescales{C(1.1), C(1), C(3), C(1.5), C(1.01)};
      std::vector<char> out(n * format.bytes);
      std::vector<C> coefficients(3 * kTasks * n);
      for (size_t k = 0; k < coefficients.size(); ++k) coefficients[k] = weights[k % kTasks] / C(1 + k % 7);
      std::vector<std::vector<char>> mixtures(3, out);
      std::vector<void*> places;
      for (std::vector<char>& mixture : mixtures) places.push_back(mixture.data());
      sk::MixArgs<Key> sums_of{};
      sums_of.base = from;
      sums_of.experts = pointers.data();
      sums_of.coefficients = coefficients.data();
      if (weighted) sums_of.base_coefficients = coefficients.data();
      sums_of.stride = n;
      sums_of.num_outputs = 3;
      sums_of.num_tasks = kTasks;
      sums_of.n = n;
      sums_of.divisor = divide ? C(3) : C(1);
      sums_of.subtract = true;
      sums_of.fused = elect_count;
      sums_of.drop = drop;
      for (const sk::MixKernel<Key>& kernel : {mix, mix_by_column}) {
        kernel(sums_of, places.data());
        for (const std::vector<char>& mixture : mixtures) mixed.add(format, mixture);
      }
      sums_of.subtract = false;
      mix(sums_of, places.data());
      combined.add(format, mixtures[0]);
      const int strips = elect_count ? 2 : 1;  // a flat vector, or columns side by side
      const int64_t pairs = sk::num_pairs(kTasks), width = strips * sk::kSumLanes, steps = (n + width - 1) / width;
      std::vector<double> vectors(kTasks * sk::kGramSteps * sk::kSumLanes), products(strips * pairs * sk::kSumLanes);
      const sk::GramArgs<Key> all{
          from, pointers.data(), kTasks, steps, width, int(width), int(n - (steps - 1) * width), divide, drop};
      gram.add.get<Key>(format.dtype)(all, vectors.data(), products.data());
      for (double of_lane : products) multiplied.add(of_lane);
      gram.fold(products.data(), strips * pairs, products.data());
      for (int64_t p = 0; p < strips * pairs; ++p) multiplied.add(products[p]);
      if (from) {
        double sums[kTasks];
        dot(from, pointers.data(), kTasks, n, sums);
        for (double of_task : sums) combined.add(of_task);
        run_combine<Key>(format, from, pointers.data(), n, combined);
      }
      for (int turn = 0; turn < 2 * sk::kRules; ++turn) {
        const int rule = turn % sk::kRules;
        const bool paper = rule < 2, narrowed = turn >= sk::kRules;
        std::vector<sk::Draw> draws(n);
        sk::TiesArgs<Key> args{};
        args.base = from;
        args.experts = pointers.data();
        args.limits = limits.data();
        if (weighted && !paper) args.weights = weights.data();
        if (weighted && !paper && sk::Rule(rule) != sk::Rule::peft) args.rescales = rescales.data();
        if (sk::Rule(rule) == sk::Rule::exact_all && elect_count) args.unique_scales = rescales.data();
        if (narrowed) {
          args.masks = masks_of_tasks.data();
          args.first_bit = 1;
          args.min_count = elect_count ? 2 : 0;
        }
        args.num_tasks = kTasks;
        args.n = n;
        args.lam = C(0.37);
        args.divisor = C(1.5);
        args.elect_count = elect_count;
        args.divide = divide;
        args.drop = drop;
        args.zero_sign = weighted ? -1 : 1;
        args.draws = draws.data();
        args.max_draws = int(n);
        const sk::TiesResult result = ties.merge[rule](args, out.data());
        merged[rule].add(format, out);
        if (paper) {  // the others elect plus on a draw, beyond the end too, and nobody reads their votes
          merged[rule].add(uint64_t(result.sign_sum));
          draws.resize(result.num_draws);
          for (const sk::Draw& draw : draws) {
            merged[rule].add(uint64_t(draw.index));
            merged[rule].add(format, std::vector<char>(draw.value, draw.value + format.bytes));
          }
        }
        std::vector<std::vector<char>> outs(kTasks, out);
        std::vector<void*> targets;
        for (std::vector<char>& target : outs) targets.push_back(target.data());
        const sk::TiesResult votes = ties.split[rule](args, targets.data());
        if (paper) merged[rule].add(uint64_t(votes.sign_sum));
        for (const std::vector<char>& target : outs) merged[rule].add(format, target);
      }
    }
  }
  const auto print = [&](const char* kernel, const Hash& hash) {
    std::printf("%s %s %016llx\n", format.name, kernel, static_cast<unsigned long long>(hash.value));
  };
  print("trim", trimmed);
  print("locate", located);
  print("ties_merge paper", merged[0]);
  print("ties_merge paper max", merged[1]);
  print("ties_merge mergekit", merged[2]);
  print("ties_merge mergekit all", merged[3]);
  print("ties_merge peft", merged[4]);
  print("ties_merge exact", merged[5]);
  print("ties_merge exact all", merged[6]);
  print("ties_merge magmax", merged[7]);
  print("keep", bounded);
  print("mix", mixed);
  print("weighted_merge", weighed);
  print("gram", multiplied);
  print("steps", stepped);
  print("combine", combined);
  print("representation_loss", lost);
  print("masks", masked);
}

}  // namespace

int main() {
  run<int32_t>({sk::Dtype::f32, "float32", 4, 0x7F800000});
  run<int32_t>({sk::Dtype::f16, "float16", 2, 0x7C00});
  run<int32_t>({sk::Dtype::bf16, "bfloat16", 2, 0x7F80});
  run<int64_t>({sk::Dtype::f64, "float64", 8, 0x7FF0000000000000});
}
