#include "surgery_adapter_kernel.h"

#include "adapter_block.h"

namespace sk {
namespace SK_ISA {
namespace {

template <class C>
inline void add_row(const C* row, int64_t dim, C* sum) {
  for (int64_t i = 0; i < dim; ++i) sum[i] += row[i];
}

template <class C>
inline void subtract_row(const C* row, int64_t dim, C* from) {
  for (int64_t i = 0; i < dim; ++i) from[i] -= row[i];
}

template <class S>
void forward(const AdapterForward<typename Compute<S>::Key>& args) {
  using C = typename Compute<S>::type;
  const int64_t dim = args.adapter.dim, rank = args.adapter.rank;
  const BlockScratch<C> scratch = {dim, rank, args.scratch};
  const Panel<C> panel = scratch.features(), hidden = scratch.hidden();
  for (int64_t i = 0; i < args.rows; ++i) load_row(static_cast<const S*>(args.features[i]), dim, panel.below(i).at);
  forward_hidden(args.adapter, panel, hidden, args.rows, args.relu);
  add_out(args.adapter, hidden, panel, args.rows);
  for (int64_t i = 0; i < args.rows; ++i) {
    C* const row = panel.below(i).at;
    if (args.bias) subtract_row(args.bias, dim, row);
    if (args.hidden) memcpy(args.hidden + i * rank, hidden.below(i).at, size_t(rank) * sizeof(C));
    if (args.sums) add_row(row, dim, static_cast<C*>(args.sums[i]));
    store_row(row, dim, static_cast<S*>(args.corrected[i]));
  }
}

// grad [row] = gradient of the corrected row + gradient of the mean it takes part in
template <class S>
inline void load_grad(const AdapterBackward<typename Compute<S>::Key>& args, int64_t i,
                      typename Compute<S>::type* grad) {
  using C = typename Compute<S>::type;
  const int64_t dim = args.adapter.dim;
  if (args.grad) {
    load_row(static_cast<const S*>(args.grad[i]), dim, grad);
  } else {
    memset(grad, 0, size_t(padded(dim)) * sizeof(C));
  }
  if (args.grad_means) {
    const C* const of_mean = static_cast<const C*>(args.grad_means[i]);
    for (int64_t j = 0; j < dim; ++j) grad[j] += of_mean[j] / args.tokens;
  }
}

template <class S>
void backward(const AdapterBackward<typename Compute<S>::Key>& args) {
  using C = typename Compute<S>::type;
  const PackedAdapter<C> adapter = args.adapter;
  const int64_t dim = adapter.dim, rank = adapter.rank;
  const BlockScratch<C> scratch = {dim, rank, args.scratch};
  const Panel<C> features = scratch.features(), grad = scratch.grad(), hidden = scratch.hidden(),
                 d_hidden = scratch.d_hidden();
  for (int64_t i = 0; i < args.rows; ++i) {
    load_grad<S>(args, i, grad.below(i).at);
    load_row(args.hidden + i * rank, rank, hidden.below(i).at);
  }
  for (int64_t i = 0; args.minus_d_bias && i < args.rows; ++i) add_row(grad.below(i).at, dim, args.minus_d_bias);
  backward_hidden(adapter, grad, hidden, d_hidden, args.rows, args.relu);
  if (args.d_down) {
    for (int64_t i = 0; i < args.rows; ++i)
      load_row(static_cast<const S*>(args.features[i]), dim, features.below(i).at);
    add_gradients(features, grad, hidden, d_hidden, {args.d_down, padded(dim)}, {args.minus_d_up_t, padded(dim)},
                  args.rows, dim, rank);
  }
  if (args.d_features) {
    add_out(adapter, d_hidden, grad, args.rows);
    for (int64_t i = 0; i < args.rows; ++i) store_row(grad.below(i).at, dim, static_cast<S*>(args.d_features[i]));
  }
}

}  // namespace

const AdapterKernels adapter_kernels = {
    {pack_forward<float>, pack_forward<float>, pack_forward<float>, pack_forward<double>},
    {pack_backward<float>, pack_backward<float>, pack_backward<float>, pack_backward<double>},
    {forward<float>, forward<Half>, forward<BFloat16>, forward<double>},
    {backward<float>, backward<Half>, backward<BFloat16>, backward<double>},
};

}  // namespace SK_ISA
}  // namespace sk
