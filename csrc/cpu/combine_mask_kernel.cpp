#include "combine_mask_kernel.h"

#include <algorithm>
#include <cstring>

#include "combine_tile.h"
#include "exponential.h"
#include "random_bits.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kTile = kMaskLanes;

// How a mask follows from a logit: of noise at temperature 1 or 1/2 the logarithm is not needed.
enum class Way { drawn, drawn_at_1, drawn_at_half, sure };

// u of a word and 1 - u, both times 2^32; of float times 2^23, from the upper bits: either is exact.
template <class C>
struct Shares {
  C u, rest;

  explicit Shares(uint32_t word) {
    if constexpr (sizeof(C) == 8) {
      u = from_bits_of(0x4330000000000000 | uint64_t(word)) - 4503599627370495.5;  // of 2^52 + w the mantissa is w
      rest = 4294967296.0 - u;
    } else {
      u = float(int32_t(word >> 9)) + 0.5f;
      rest = 8388608.0f - u;
    }
  }
};

inline float exponential_of(float x) { return exponential_f32(x); }
inline double exponential_of(double x) { return exponential(x); }

template <Way way, class C>
inline void draw_group(const C* logits, const uint32_t* words, double sharpness, C* mask) {
  for (int l = 0; l < kSumLanes; ++l) {
    C m;
    if constexpr (way == Way::drawn_at_1 || way == Way::drawn_at_half) {
      const Shares<C> shares(words[l]);
      const C u = shares.u, other = shares.rest * exponential_of(-logits[l]);
      m = way == Way::drawn_at_1 ? u / (u + other) : u * u / (u * u + other * other);
    } else {
      double x = double(logits[l]);
      if constexpr (way == Way::drawn) {
        const Shares<double> shares(words[l]);
        x = x + logarithm(shares.u / shares.rest);
      }
      m = C(1.0 / (1.0 + exponential(x * -sharpness)));
    }
    mask[l] = m == m ? m : C(__builtin_nan(""));  // another NaN's payload could carry when it is rounded
  }
}

template <Way way, class C>
double draw_tiles(const C* logits, const MaskNoise& noise, int64_t first, int64_t n, C* mask) {
  double sums[kMaskLanes] = {};
  uint32_t words[kTile + kWords] = {};
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = int(std::min<int64_t>(kTile, n - i));
    if (way != Way::sure) words_of(noise.stream, first + i, count, words);
    int g = 0;
    for (; g + kSumLanes <= count; g += kSumLanes) {
      C x[kSumLanes], m[kSumLanes];  // apart from each other, as the compiler cannot know of the arguments
      memcpy(x, logits + i + g, sizeof x);
      draw_group<way>(x, words + g, noise.sharpness, m);
      for (int l = 0; l < kSumLanes; ++l) sums[g + l] += double(m[l]);
      memcpy(mask + i + g, m, sizeof m);
    }
    if (g < count) {
      C x[kSumLanes] = {}, m[kSumLanes];
      std::copy_n(logits + i + g, count - g, x);
      draw_group<way>(x, words + g, noise.sharpness, m);
      for (int l = 0; l < count - g; ++l) sums[g + l] += double(m[l]);
      std::copy_n(m, count - g, mask + i + g);
    }
  }
  return fold_halves(sums, kMaskLanes);
}

template <class C>
double draw(const C* logits, const MaskNoise& noise, int64_t first, int64_t n, C* mask) {
  if (!noise.drawn) return draw_tiles<Way::sure>(logits, noise, first, n, mask);
  if (noise.sharpness == 1) return draw_tiles<Way::drawn_at_1>(logits, noise, first, n, mask);
  if (noise.sharpness == 2) return draw_tiles<Way::drawn_at_half>(logits, noise, first, n, mask);
  return draw_tiles<Way::drawn>(logits, noise, first, n, mask);
}

// One task vector after the other, each in a run that prefetching can follow.
template <class S, class C>
void add_up(const MaskedArgs<typename Compute<S>::Key>& args, int64_t at, int count, C* sums, C* room) {
  std::fill_n(sums, count, C(0));
  for (int t = 0; t < args.num_tasks; ++t) {
    const C* const x = widened(static_cast<const S*>(args.task_vectors[t]) + at, count, room);
    const C coefficient = args.coefficients[t];
    for (int i = 0; i < count; ++i) sums[i] = sums[i] + x[i] * coefficient;
  }
}

template <class S>
void forward(const MaskedArgs<typename Compute<S>::Key>& args, void* out) {
  using C = typename Compute<S>::type;
  C sums[kTile], room[kTile];
  for (int64_t at = 0; at < args.n; at += kTile) {
    const int count = int(std::min<int64_t>(kTile, args.n - at));
    add_up<S>(args, at, count, sums, room);
    const C* const base = widened(static_cast<const S*>(args.base) + at, count, room);
    for (int i = 0; i < count; ++i) sums[i] = base[i] + args.mask[at + i] / args.mean * sums[i];
    store_narrowed(sums, count, static_cast<S*>(out) + at);
  }
}

template <class S>
void backward(const MaskedArgs<typename Compute<S>::Key>& args, typename Compute<S>::type* pull, double* sums) {
  using C = typename Compute<S>::type;
  C total[kTile], weighted[kTile], room[kTile];
  std::fill_n(sums, 1 + args.num_tasks, 0.0);
  for (int64_t at = 0; at < args.n; at += kTile) {
    const int count = int(std::min<int64_t>(kTile, args.n - at));
    const C* const mask = args.mask + at;
    C* const to = pull + at;
    add_up<S>(args, at, count, total, room);
    const C* const gradient = widened(static_cast<const S*>(args.base) + at, count, room);
    for (int i = 0; i < count; ++i) {
      to[i] = gradient[i] * total[i];
      weighted[i] = gradient[i] * (mask[i] / args.mean);
    }
    sums[0] += dot<C>(to, mask, count);
    for (int t = 0; t < args.num_tasks; ++t)
      sums[1 + t] += dot<C>(weighted, widened(static_cast<const S*>(args.task_vectors[t]) + at, count, room), count);
  }
}

template <class C>
void logits_gradient(const C* mask, C shift, C mean, C sharpness, int64_t n, C* pull) {
  for (int64_t i = 0; i < n; ++i) pull[i] = (pull[i] - shift) / mean * (mask[i] * (C(1) - mask[i]) * sharpness);
}

}  // namespace

const CombineMaskKernels combine_mask_kernels = {
    draw<float>,
    draw<double>,
    {forward<float>, forward<Half>, forward<BFloat16>, forward<double>},
    {backward<float>, backward<Half>, backward<BFloat16>, backward<double>},
    logits_gradient<float>,
    logits_gradient<double>,
};

}  // namespace SK_ISA
}  // namespace sk
