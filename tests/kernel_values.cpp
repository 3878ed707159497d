// Runs the surgery kernels of one instruction set on fixed inputs and prints the results, a dtype, a name and numbers a
// line: products may be rounded once or twice, so that instruction sets agree to a tolerance only.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/gram_cross_kernel.h"
#include "cpu/surgery_train_kernel.h"
#include "random_bits.h"

namespace {

constexpr int64_t kDim = 37, kRank = 5, kRows = 13, kSteps = 3, kSize = kDim * kRank;

struct Format {
  sk::Dtype dtype;
  const char* name;
  int bits, mantissa, bias;
};

// Either sign, magnitudes in [1/8, 2).
uint64_t encoded(const Format& format) {
  const uint64_t random = random_bits() >> 8, mantissa = random & ((uint64_t(1) << format.mantissa) - 1);
  const uint64_t exponent = uint64_t(format.bias) - (random_bits() >> 30) % 4, sign = random_bits() >> 63;
  return sign << (format.bits - 1) | exponent << format.mantissa | mantissa;
}

double decoded(const Format& format, const char* at) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, format.bits / 8);
  const uint64_t one = uint64_t(1) << format.mantissa, mantissa = bits & (one - 1);
  const int exponent = int(bits >> format.mantissa & ((uint64_t(1) << (format.bits - 1 - format.mantissa)) - 1));
  const double magnitude = std::ldexp(double(exponent ? one + mantissa : mantissa),
                                      (exponent ? exponent : 1) - format.bias - format.mantissa);
  return bits >> (format.bits - 1) ? -magnitude : magnitude;
}

struct Stored {  // [rows, kDim] of a storage dtype
  const Format& format;
  std::vector<char> bytes;

  Stored(const Format& format, int64_t rows) : format(format), bytes(rows * kDim * format.bits / 8) {
    for (int64_t i = 0; i < rows * kDim; ++i) {
      const uint64_t bits = encoded(format);
      std::memcpy(&bytes[i * format.bits / 8], &bits, format.bits / 8);
    }
  }
  std::vector<void*> rows() {
    std::vector<void*> pointers;
    for (size_t at = 0; at < bytes.size(); at += kDim * format.bits / 8) pointers.push_back(&bytes[at]);
    return pointers;
  }
  void print(const char* what) const {
    std::printf("%s %s", format.name, what);
    for (size_t at = 0; at < bytes.size(); at += format.bits / 8) std::printf(" %.12g", decoded(format, &bytes[at]));
    std::printf("\n");
  }
};

template <class C>
struct Values : std::vector<C> {
  explicit Values(int64_t size, double scale = 0) : std::vector<C>(size) {
    for (C& x : *this) x = C(scale * (double(random_bits() >> 40) / (1 << 23) - 1));
  }
  void print(const Format& format, const char* what) const {
    std::printf("%s %s", format.name, what);
    for (const C x : *this) std::printf(" %.12g", double(x));
    std::printf("\n");
  }
};

template <class Key>
void run(const Format& format) {
  using C = sk::ComputeOf<Key>;
  const sk::AdapterKernels& kernels = sk::SK_ISA::adapter_kernels;
  Stored features(format, kRows), grad(format, kRows), corrected(format, kRows), d_features(format, kRows);
  Values<C> down(kSize, 0.3), up(kSize, 0.3), means(kDim), hidden(kRows * kRank);
  Values<C> scratch(sk::train_scratch(kDim, kRank)), packed(sk::PackedAdapter<C>::size(kDim, kRank));
  const sk::PackedAdapter<C> adapter = {kDim, kRank, packed.data(), packed.data() + kDim * sk::padded(kRank)};

  const std::vector<void*> sums(kRows, means.data());
  kernels.pack_forward.get<Key>(format.dtype)(down.data(), up.data(), adapter);
  kernels.forward.get<Key>(format.dtype)({adapter, nullptr, /*relu=*/true, kRows, features.rows().data(),
                                          corrected.rows().data(), sums.data(), hidden.data(), scratch.data()});
  corrected.print("corrected");
  means.print(format, "means");
  hidden.print(format, "hidden");

  Values<C> d_down(kRank * sk::padded(kDim)), minus_d_up_t(kRank * sk::padded(kDim));
  kernels.pack_backward.get<Key>(format.dtype)(down.data(), up.data(), adapter);
  kernels.backward.get<Key>(format.dtype)({adapter, /*relu=*/true, kRows, grad.rows().data(), sums.data(), C(kRows),
                                           features.rows().data(), hidden.data(), d_features.rows().data(),
                                           d_down.data(), minus_d_up_t.data(), nullptr, scratch.data()});
  d_features.print("d_features");
  d_down.print(format, "d_down");
  minus_d_up_t.print(format, "d_up");

  const int64_t batch = 7;
  std::vector<int64_t> indices(kSteps * batch);
  for (int64_t& i : indices) i = int64_t(random_bits() >> 20) % kRows;
  Values<C> down_moments(2 * kSize), up_moments(2 * kSize), losses(kSteps);
  const std::vector<sk::AdamStep<C>> steps(2 * kSteps, {C(0.01), C(10)});
  sk::SurgeryTraining<Key> training{};
  training.dim = kDim, training.rank = kRank, training.steps = kSteps, training.batch = batch;
  training.features = features.bytes.data(), training.targets = grad.bytes.data();
  training.indices = indices.data(), training.index_stride = batch;
  training.down = {down.data(), down_moments.data(), down_moments.data() + kSize};
  training.up = {up.data(), up_moments.data(), up_moments.data() + kSize};
  training.adam = {{C(0.9), C(0.1)}, {C(0.999), C(0.001)}, C(1e-8), /*zero_grad_steps=*/1, steps.data()};
  training.losses = losses.data(), training.loss_stride = 1;
  training.scratch = scratch.data();
  sk::SK_ISA::surgery_train_kernels.get<Key>(format.dtype)(training);
  losses.print(format, "losses");
  down.print(format, "trained_down");
  up.print(format, "trained_up");

  const sk::GramCrossKernels& products = sk::SK_ISA::gram_cross_kernels;
  Values<C> strip(kRows * sk::kStrip), weighted(kRows * sk::kStrip), weights(kRows, 1), sums_of_rows(kDim);
  products.pack(format.dtype, C())({features.bytes.data(), kDim, kRows, kDim, weights.data(), strip.data(),
                                    weighted.data(), sums_of_rows.data(), /*add=*/false});
  Values<C> tile(sk::kStrip * sk::kStrip), gram(kDim * kDim);
  for (const bool upper : {true, false})
    products.products(C())({weighted.data(), strip.data(), kRows, kDim, kDim, upper, tile.data(), gram.data(), kDim,
                            /*add=*/!upper});
  sums_of_rows.print(format, "sums_of_rows");
  gram.print(format, "gram_cross");
}

}  // namespace

int main() {
  run<int32_t>({sk::Dtype::f32, "float32", 32, 23, 127});
  run<int32_t>({sk::Dtype::f16, "float16", 16, 10, 15});
  run<int32_t>({sk::Dtype::bf16, "bfloat16", 16, 7, 127});
  run<int64_t>({sk::Dtype::f64, "float64", 64, 52, 1023});
}
