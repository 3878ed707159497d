#include "surgery_train_kernel.h"

#include "adapter_block.h"

namespace sk {
namespace SK_ISA {
namespace {

template <class C>
inline void zero(Panel<C> panel, int64_t rows) {
  memset(panel.at, 0, size_t(rows * panel.row) * sizeof(C));
}

// A factor while it is trained, each panel [rank, padded(dim)]: down, or -up^T, which is what the products read; Adam
// moves a parameter and its negative alike. What their padding holds stays there: loss_row drops it.
template <class C>
struct Factor {
  Panel<C> value, first, second, gradient;
};

// Hands out a task's scratch memory, panel after panel.
template <class C>
struct Arena {
  C* free;

  Panel<C> panel(int64_t rows, int64_t columns) {
    const Panel<C> taken = {free, columns};
    free += rows * columns;
    return taken;
  }
  Factor<C> factor(int64_t rank, int64_t dim) {
    const auto next = [&] { return panel(rank, padded(dim)); };
    return {next(), next(), next(), next()};
  }
};

// The adapter of one task while it is trained, out of the tensors it comes from and goes back to.
template <class C>
struct TrainedAdapter {
  int64_t dim, rank;
  Factor<C> down, minus_up;
  PackedAdapter<C> forward, backward;  // their `in` holds down^T, and -up; their `out` is the factor itself

  TrainedAdapter(int64_t dim, int64_t rank, Arena<C> arena)
      : dim(dim),
        rank(rank),
        down(arena.factor(rank, dim)),
        minus_up(arena.factor(rank, dim)),
        forward{dim, rank, arena.panel(dim, padded(rank)).at, minus_up.value.at},
        backward{dim, rank, arena.panel(dim, padded(rank)).at, down.value.at} {}

  void read(const Moving<C>& from_down, const Moving<C>& from_up) const {
    const auto copy = [&](const C* from, Panel<C> to) { pad<C>(from, rank, dim, 1, to.at); };
    const auto turn = [&](const C* from, C sign, Panel<C> to) { transpose<C>({from, rank}, dim, rank, sign, to); };
    copy(from_down.value, down.value), turn(from_up.value, -1, minus_up.value);
    copy(from_down.first, down.first), turn(from_up.first, -1, minus_up.first);
    copy(from_down.second, down.second), turn(from_up.second, 1, minus_up.second);
  }

  void write(const Moving<C>& to_down, const Moving<C>& to_up) const {
    const auto copy = [&](Panel<C> from, C* to) {
      for (int64_t r = 0; r < rank; ++r) store_row(from.below(r).at, dim, to + r * dim);
    };
    const auto turn = [&](Panel<C> from, C sign, C* to) {
      transpose<C>({from.at, from.row}, rank, dim, sign, {to, rank});
    };
    copy(down.value, to_down.value), turn(minus_up.value, -1, to_up.value);
    copy(down.first, to_down.first), turn(minus_up.first, -1, to_up.first);
    copy(down.second, to_down.second), turn(minus_up.second, 1, to_up.second);
  }

  void start_step() const {
    transpose<C>({down.value.at, down.value.row}, rank, dim, 1, {forward.in, padded(rank)});
    transpose<C>({minus_up.value.at, minus_up.value.row}, rank, dim, 1, {backward.in, padded(rank)});
    zero(down.gradient, rank);
    zero(minus_up.gradient, rank);
  }
};

// bias = features - target; corrected features less the target come from adding to it what is added to the features.
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
    V x = load(bias + i);
    if (i + V::N > dim) x = zero_unless<C>(V::first(int(dim - i)), x);  // infinity * 0 is in the padding
    const auto above = greater(x, zero), below = greater(zero, x);
    sum = sum + absolute(x);
    store(select<C>(above, plus, zero_unless<C>(below, minus)), bias + i);
  }
  C lanes[V::N];
  store(sum, lanes);
  double total = 0;
  for (C lane : lanes) total += double(lane);
  return total;
}

// Adds the gradients of a batch and returns its loss.
template <class S, class C>
double add_batch(const SurgeryTraining<typename Compute<S>::Key>& args, const int64_t* images,
                 const TrainedAdapter<C>& adapter, const BlockScratch<C>& block) {
  const int64_t dim = adapter.dim;
  const Panel<C> features = block.features(), bias = block.grad(), hidden = block.hidden(), d_hidden = block.d_hidden();
  double loss = 0;
  for (int64_t first = 0; first < args.batch; first += kBlockRows) {
    const int64_t rows = args.batch - first < kBlockRows ? args.batch - first : kBlockRows;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = images[first + i] * dim;
      load_row(static_cast<const S*>(args.features) + at, dim, features.below(i).at);
      load_row(static_cast<const S*>(args.targets) + at, dim, bias.below(i).at);
      subtract_row(features.below(i).at, bias.below(i).at, dim);
    }
    forward_hidden(adapter.forward, features, hidden, rows);
    add_out(adapter.forward, hidden, bias, rows);
    for (int64_t i = 0; i < rows; ++i) loss += loss_row(bias.below(i).at, dim, 1 / C(args.batch * dim));
    backward_hidden(adapter.backward, bias, hidden, d_hidden, rows);
    add_gradients(features, bias, hidden, d_hidden, adapter.down.gradient, adapter.minus_up.gradient, rows, dim,
                  adapter.rank);
  }
  return loss / double(args.batch * dim);
}

// One step with the gradient and `zero_grad_steps` without one, each element through all of them while in registers.
template <class C>
void move(const Factor<C>& factor, int64_t rank, int64_t dim, const Adam<C>& adam, const AdamStep<C>* steps) {
  using V = Vec<C>;
  const V keep1 = V::set(adam.first.keep), take1 = V::set(adam.first.take), keep2 = V::set(adam.second.keep),
          take2 = V::set(adam.second.take), eps = V::set(adam.eps);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t i = r * factor.value.row, end = i + dim; i < end; i += V::N) {
      const V gradient = load(factor.gradient.at + i);
      V value = load(factor.value.at + i);
      V first = load(factor.first.at + i) * keep1 + gradient * take1;
      V second = load(factor.second.at + i) * keep2 + gradient * gradient * take2;
      for (int64_t z = 0;; ++z) {
        value = value - V::set(steps[z].rate) * first / (square_root(second) * V::set(steps[z].scale) + eps);
        if (z == adam.zero_grad_steps) break;
        first = first * keep1;
        second = second * keep2;
      }
      store(value, factor.value.at + i);
      store(first, factor.first.at + i);
      store(second, factor.second.at + i);
    }
}

template <class S>
void train(const SurgeryTraining<typename Compute<S>::Key>& args) {
  using C = typename Compute<S>::type;
  const BlockScratch<C> block = {args.dim, args.rank, args.scratch};
  const TrainedAdapter<C> adapter(args.dim, args.rank, {args.scratch + block_scratch(args.dim, args.rank)});
  adapter.read(args.down, args.up);
  for (int64_t s = 0; s < args.steps; ++s) {
    adapter.start_step();
    const double loss = add_batch<S>(args, args.indices + s * args.index_stride, adapter, block);
    args.losses[s * args.loss_stride] = C(loss);
    const AdamStep<C>* const steps = args.adam.steps + s * (1 + args.adam.zero_grad_steps);
    for (const Factor<C>& factor : {adapter.down, adapter.minus_up})
      move(factor, args.rank, args.dim, args.adam, steps);
  }
  adapter.write(args.down, args.up);
}

}  // namespace

const SurgeryTrainKernels surgery_train_kernels = {train<float>, train<Half>, train<BFloat16>, train<double>};

}  // namespace SK_ISA
}  // namespace sk
