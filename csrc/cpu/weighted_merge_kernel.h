// Weighted means of the experts over raw pointers: weights are importance that is given, or how far the scores of
// PCB-Merging are above limits. One read of everything and one rounding; a score is about fifty operations, the same on
// every instruction set.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

template <class Key>
struct MeanArgs {
  using C = ComputeOf<Key>;

  const void* base;               // may be null: then nothing is subtracted and nothing is added
  const void* const* experts;     // [num_tasks]
  const void* const* importance;  // [num_tasks]
  const C* weights;               // [num_tasks]
  C floor;                        // smaller importance counts as this
  int num_tasks;
  int64_t n;
  bool drop;    // a non-finite entry counts as 0
  bool stream;  // write past the caches
};

// What is amiss, which makes the result one that nobody wants.
struct Amiss {
  bool experts;     // NaN or infinity among what is summed, or in the base
  bool importance;  // NaN, infinity or a negative number
};

template <class Key>
using MeanKernel = Amiss (*)(const MeanArgs<Key>& args, void* out);

// What the agreement of an expert's change x with those of all is: with s the changes brought to [-1, 1],
// sum_j tanh(s s_j); tanh(x sum_j s_j); or tanh(x sum_j x_j).
enum class Inter { paper, half, raw };

constexpr int kScratch = 128;  // elements of an expert that a kernel writes down between its two passes over experts

// Of every expert: the magnitudes that a change is clipped to, and how far apart they are.
template <class C>
struct Clipping {
  C low, high, range;
};
// Of every expert: the score above which it has a weight, the distance from there to where that is 1, and its factor.
template <class C>
struct Live {
  C threshold, height, factor;
};

template <class Key>
struct ScoreArgs {
  using C = ComputeOf<Key>;

  const void* base;  // may be null: the experts are task vectors
  const void* const* experts;
  const Clipping<C>* clipping;  // [num_tasks]
  Inter inter;
  int num_tasks;
  int64_t n;
  bool drop;
  C* scratch;  // [num_tasks, kScratch]
};

template <class Key>
struct ScoreKernel {
  // Keys that order like the scores, of expert t at t * stride, with room for whole vectors: up to kKeySlack more.
  void (*keys)(const ScoreArgs<Key>& args, Key* keys, int64_t stride);
  // base + sum_t w_t factor_t c_t / max(sum_t w_t, 1e-12), c_t the clipped changes.
  void (*merge)(const ScoreArgs<Key>& args, const Live<ComputeOf<Key>>* live, bool stream, void* out);
};

constexpr int kKeySlack = 32;

// Keys are bits of positive finite numbers: in the middle those of scores that are 0, NaN or nearer to 0 than `Least`.
template <class Key>
constexpr Key kMiddleKey = kInfinityKey<Key> / 2;
template <class Key>
constexpr Key kLeastScore = Key(27) << 23;  // 2^-100
template <>
inline constexpr int64_t kLeastScore<int64_t> = int64_t(123) << 52;  // 2^-900

struct WeightedMergeKernels {
  PerDtype<MeanKernel> mean, mean_wide;  // importance in the dtype of the experts; in their compute type
  PerDtype<ScoreKernel> scores;
};

SK_DECLARE_KERNELS(WeightedMergeKernels, weighted_merge_kernels);

}  // namespace sk
