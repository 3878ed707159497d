#include "surgery_train_kernel.h"

#include "adapter_block.h"

namespace sk {
namespace SK_ISA {
namespace {

// A factor while it is trained, each panel [rank, padded(dim)]. For `up` it is -up^T: what the products read, and
// Adam treats a sign alike.
template <class C>
struct Factor {
  Panel<C> value, first, second, gradient;
};

template <class C>
inline void zero(Panel<C> panel, int64_t rows) {
  memset(panel.at, 0, size_t(rows * panel.row) * sizeof(C));
}

// gradient [rank, dim], then `zero_grad_steps` steps without one.
template <class C>
inline void move(const Factor<C>& factor, const AdamStep<C>* adam, int64_t zero_grad_steps, int64_t rank, int64_t dim,
                 C beta1, C beta2, C eps) {
  using V = Vec<C>;
  const V keep1 = V::set(beta1), keep2 = V::set(beta2), take1 = V::set(1 - beta1), take2 = V::set(1 - beta2);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t i = r * factor.value.row, end = i + dim; i < end; i += V::N) {
      const V gradient = load(factor.gradient.at + i);
      V value = load(factor.value.at + i);
      V first = load(factor.first.at + i) * keep1 + gradient * take1;
      V second = load(factor.second.at + i) * keep2 + gradient * gradient * take2;
      for (int64_t z = 0;; ++z) {
        const V step = V::set(adam[z].rate) * first;
        value = value - step / (square_root(second) * V::set(adam[z].scale) + V::set(eps));
        if (z == zero_grad_steps) break;
        first = first * keep1;
        second = second * keep2;
      }
      store(value, factor.value.at + i);
      store(first, factor.first.at + i);
      store(second, factor.second.at + i);
    }
}

// bias = features - target, of which correcting the features makes corrected - target.
template <class C>
inline void subtract_row(const C* features, C* target, int64_t dim) {
  using V = Vec<C>;
  for (int64_t i = 0; i < dim; i += V::N) store(load(features + i) - load(target + i), target + i);
}

// The sum of |bias|; sign(bias) * slope takes the place of bias.
template <class C>
inline double loss_row(C* bias, int64_t dim, C slope) {
  using V = Vec<C>;
  const V zero = V::set(0), plus = V::set(slope), minus = V::set(-slope);
  V sum = zero;
  for (int64_t i = 0; i < dim; i += V::N) {
    const V x = load(bias + i);
    const auto above = greater(x, zero), below = greater(zero, x);
    sum = sum + select<C>(below, zero - x, x);
    store(select<C>(above, plus, zero_unless<C>(below, minus)), bias + i);
  }
  C lanes[V::N];
  store(sum, lanes);
  double total = 0;
  for (C lane : lanes) total += double(lane);
  return total;
}

template <class C>
void read(const Moving<C>& down, const Moving<C>& up, int64_t rank, int64_t dim, const Factor<C>& to_down,
          const Factor<C>& to_minus_up) {
  const auto copy = [&](const C* from, Panel<C> to) { pad<C>(from, rank, dim, 1, to.at); };
  const auto turn = [&](const C* from, C sign, Panel<C> to) {
    zero(to, rank);  // the padding too: the loss sums whole vectors
    transpose<C>({from, rank}, dim, rank, sign, to);
  };
  copy(down.value, to_down.value), turn(up.value, -1, to_minus_up.value);
  copy(down.first, to_down.first), turn(up.first, -1, to_minus_up.first);
  copy(down.second, to_down.second), turn(up.second, 1, to_minus_up.second);
}

template <class C>
void write(const Factor<C>& down, const Factor<C>& minus_up, int64_t rank, int64_t dim, const Moving<C>& to_down,
           const Moving<C>& to_up) {
  const auto copy = [&](Panel<C> from, C* to) {
    for (int64_t r = 0; r < rank; ++r) memcpy(to + r * dim, from.below(r).at, size_t(dim) * sizeof(C));
  };
  const auto turn = [&](Panel<C> from, C sign, C* to) {
    transpose<C>({from.at, from.row}, rank, dim, sign, {to, rank});
  };
  copy(down.value, to_down.value), turn(minus_up.value, -1, to_up.value);
  copy(down.first, to_down.first), turn(minus_up.first, -1, to_up.first);
  copy(down.second, to_down.second), turn(minus_up.second, 1, to_up.second);
}

template <class S>
void train(const SurgeryTraining<typename Compute<S>::Key>& args) {
  using C = typename Compute<S>::type;
  const int64_t dim = args.dim, rank = args.rank, width = padded(dim);
  const BlockScratch<C> block = {dim, rank, args.scratch};
  const Panel<C> features = block.features(), bias = block.grad(), hidden = block.hidden(), d_hidden = block.d_hidden();

  C* free = args.scratch + block_scratch(dim, rank);
  const auto panel = [&](int64_t rows, int64_t columns) {
    const Panel<C> taken = {free, columns};
    free += rows * columns;
    return taken;
  };
  const auto factor = [&]() {
    return Factor<C>{panel(rank, width), panel(rank, width), panel(rank, width), panel(rank, width)};
  };
  const Factor<C> down = factor(), minus_up = factor();
  const PackedAdapter<C> forward = {dim, rank, panel(dim, padded(rank)).at, minus_up.value.at};  // in: down^T
  const PackedAdapter<C> backward = {dim, rank, panel(dim, padded(rank)).at, down.value.at};     // in: -up

  read(args.down, args.up, rank, dim, down, minus_up);
  for (int64_t s = 0; s < args.steps; ++s) {
    transpose<C>({down.value.at, width}, rank, dim, 1, {forward.in, padded(rank)});
    transpose<C>({minus_up.value.at, width}, rank, dim, 1, {backward.in, padded(rank)});
    zero(down.gradient, rank);
    zero(minus_up.gradient, rank);
    double loss = 0;
    for (int64_t first = 0; first < args.batch; first += kBlockRows) {
      const int64_t rows = args.batch - first < kBlockRows ? args.batch - first : kBlockRows;
      const int64_t* const images = args.indices + s * args.index_stride + first;
      for (int64_t i = 0; i < rows; ++i) {
        load_row(static_cast<const S*>(args.features) + images[i] * dim, dim, features.below(i).at);
        load_row(static_cast<const S*>(args.targets) + images[i] * dim, dim, bias.below(i).at);
        subtract_row(features.below(i).at, bias.below(i).at, dim);
      }
      forward_hidden(forward, features, hidden, rows);
      add_out(forward, hidden, bias, rows);
      for (int64_t i = 0; i < rows; ++i) loss += loss_row(bias.below(i).at, dim, 1 / C(args.batch * dim));
      backward_hidden(backward, bias, hidden, d_hidden, rows);
      add_gradients(features, bias, hidden, d_hidden, down.gradient, minus_up.gradient, rows, dim, rank);
    }
    args.losses[s * args.loss_stride] = C(loss / double(args.batch * dim));
    const AdamStep<C>* const adam = args.adam + s * (1 + args.zero_grad_steps);
    for (const Factor<C>& moving : {down, minus_up})
      move(moving, adam, args.zero_grad_steps, rank, dim, args.beta1, args.beta2, args.eps);
  }
  write(down, minus_up, rank, dim, args.down, args.up);
}

}  // namespace

const SurgeryTrainKernels surgery_train_kernels = {train<float>, train<Half>, train<BFloat16>, train<double>};

}  // namespace SK_ISA
}  // namespace sk
