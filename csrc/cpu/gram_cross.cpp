#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "buffer.h"
#include "gram_cross_kernel.h"

namespace sk {
namespace {

constexpr int64_t kPackedBytes = 8 << 20;    // strips of tasks that are multiplied together
constexpr int64_t kWorkPerThread = 1 << 19;  // multiply-adds

// Rows of every task: [num_tasks, rows, width], or [rows, width] cut by offsets.
struct Matrix {
  Tensor alive;
  Dtype dtype;
  int64_t width, task_stride, row_stride;

  Matrix(const Tensor& t, bool ragged, const char* name) : alive(t), dtype(dtype_of(t, name)) {
    require(t.is_cpu(), name, " must be on the CPU, got another device");
    require(t.dim() == (ragged ? 2 : 3), name, " must be ", ragged ? "[rows, dim]" : "[num_tasks, rows, dim]", ", got ",
            t.dim(), " dimensions");
    width = t.size(t.dim() - 1);
    if (width > 1 && t.stride(t.dim() - 1) != 1) alive = torch::stable::contiguous(t);
    row_stride = alive.stride(alive.dim() - 2);
    task_stride = ragged ? 0 : alive.stride(0);
  }
  int64_t rows() const { return alive.size(alive.dim() - 2); }
  int64_t strips() const { return (width + kStrip - 1) / kStrip; }
  const void* at(int64_t task, int64_t row, int64_t column) const {
    const int64_t place = task * task_stride + row * row_stride + column;
    return static_cast<const char*>(alive.data_ptr()) + place * size_of(dtype);
  }
};

// What a call is given, checked. Ragged tasks begin at rows of the one matrix, else each has its own.
struct Operands {
  Matrix x;
  std::optional<Matrix> y;
  std::optional<Tensor> weights;
  bool ragged, wide;
  std::vector<int64_t> first, rows;  // of every task

  Operands(const Tensor& x_, const std::optional<Tensor>& y_, const std::optional<Tensor>& weights_,
           const std::optional<std::vector<int64_t>>& offsets, bool wide_)
      : x(x_, offsets.has_value(), "x"), ragged(offsets.has_value()), wide(wide_ || x.dtype == Dtype::f64) {
    if (ragged) {
      require(!offsets->empty() && offsets->front() == 0 && offsets->back() == x.rows() &&
                  std::is_sorted(offsets->begin(), offsets->end()),
              "offsets must rise from 0 to the rows of x, ", x.rows(), ", got another list");
      for (size_t t = 0; t + 1 < offsets->size(); ++t) {
        first.push_back((*offsets)[t]);
        rows.push_back((*offsets)[t + 1] - (*offsets)[t]);
      }
    } else {
      first.assign(size_t(x_.size(0)), 0);
      rows.assign(size_t(x_.size(0)), x.rows());
    }
    if (y_) {
      y.emplace(*y_, ragged, "y");
      require(y->dtype == x.dtype, "y must have the dtype of x, got another");
      require(y->rows() == x.rows() && (ragged || y_->size(0) == num_tasks()), "y must have the rows of x, got others");
    }
    if (weights_) {
      require(weights_->is_cpu() && weights_->scalar_type() == compute(), "weights must be ",
              wide ? "float64" : "float32", " on the CPU, got another tensor");
      require(ragged ? has_shape(*weights_, {x.rows()}) : has_shape(*weights_, {num_tasks(), x.rows()}),
              "weights must be one for every row of x, got another shape");
      weights = torch::stable::contiguous(*weights_);
    }
  }
  int64_t num_tasks() const { return int64_t(rows.size()); }
  int64_t y_width() const { return y ? y->width : 0; }
  int64_t y_strips() const { return y ? y->strips() : 0; }
  ScalarType compute() const { return wide ? ScalarType::Double : ScalarType::Float; }
  template <class C>
  const C* weights_at(int64_t task, int64_t row) const {
    if (!weights) return nullptr;
    return static_cast<const C*>(weights->data_ptr()) + (ragged ? 0 : task * x.rows()) + row;
  }
};

struct Results {
  Tensor gram, cross, x_sums, y_sums;
};

// A fixed order: rows are added up in runs of kStripRows, and the runs one after the other.
template <class C>
class GramCross {
 public:
  GramCross(const Operands& operands, const Results& results)
      : in_(operands),
        out_(results),
        strips_(in_.x.strips() + in_.y_strips()),
        packed_((strips_ + (in_.weights ? in_.x.strips() : 0)) * kStripRows * kStrip) {
    for (int64_t i = 0; i < in_.x.strips(); ++i)
      for (int64_t j = i; j < strips_; ++j) pairs_.emplace_back(i, j);
  }

  void run() const {
    if (in_.num_tasks() == 0) return;
    const int64_t fit = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, packed_ * int64_t(sizeof(C))));
    const int64_t most = runs(*std::max_element(in_.rows.begin(), in_.rows.end()));
    const int64_t together = std::min(fit, most), group = std::min(fit / together, in_.num_tasks());
    const Buffer<C> memory(group * together * packed_);
    const auto of_run = [&](int64_t task, int64_t run) { return memory.get() + (task * together + run) * packed_; };
    for (int64_t task = 0; task < in_.num_tasks(); task += group) {
      const int64_t tasks = std::min(group, in_.num_tasks() - task);
      for (int64_t first = 0; first < most; first += together) {
        const int64_t here = std::min(together, most - first), pairs = int64_t(pairs_.size());
        each(tasks * strips_, 4 * here * kStripRows * kStrip, [&](int64_t k, C*) {
          for (int64_t run = 0; run < here; ++run)
            pack(task + k / strips_, first + run, k % strips_, of_run(k / strips_, run));
        });
        each(tasks * pairs, here * kStripRows * kStrip * kStrip, [&](int64_t k, C* scratch) {
          for (int64_t run = 0; run < here; ++run)
            multiply(task + k / pairs, first + run, pairs_[k % pairs], of_run(k / pairs, run), scratch);
        });
      }
    }
    each(in_.num_tasks() * in_.x.strips(), in_.x.width * kStrip,
         [&](int64_t k, C*) { mirror(k / in_.x.strips(), k % in_.x.strips()); });
  }

 private:
  const Operands& in_;
  const Results& out_;
  int64_t strips_, packed_;  // of one task: strips of x and then y; elements of all of them and of the weighted ones
  std::vector<std::pair<int64_t, int64_t>> pairs_;

  template <class Body>
  void each(int64_t count, int64_t work, const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      const Buffer<C> scratch(kStrip * kStrip);
      for (int64_t k = first; k < last; ++k) body(k, scratch.get());
    });
  }

  static C* strip(C* packed, int64_t number) { return packed + number * kStripRows * kStrip; }
  static int64_t width(int64_t of_matrix, int64_t number) { return std::min(kStrip, of_matrix - number * kStrip); }
  static C* at(const Tensor& t, int64_t place) { return static_cast<C*>(t.data_ptr()) + place; }
  // Of no rows too there is a run: somebody writes the zeros.
  static int64_t runs(int64_t rows) { return std::max<int64_t>(1, (rows + kStripRows - 1) / kStripRows); }
  // Of a run: negative behind the last.
  int64_t rows(int64_t task, int64_t run) const { return std::min(kStripRows, in_.rows[task] - run * kStripRows); }

  void pack(int64_t task, int64_t run, int64_t number, C* packed) const {
    const bool of_x = number < in_.x.strips();
    const Matrix& matrix = of_x ? in_.x : *in_.y;
    const int64_t place = of_x ? number : number - in_.x.strips(), column = place * kStrip;
    if (rows(task, run) < (run == 0 ? 0 : 1)) return;
    C* const plain = strip(packed, number);
    C* const weighted = !of_x ? nullptr : in_.weights ? strip(packed, strips_ + number) : plain;
    const int64_t row = in_.first[task] + run * kStripRows;
    SK_KERNELS(gram_cross_kernels)
        .pack(matrix.dtype, C())({matrix.at(task, row, column), matrix.row_stride, rows(task, run),
                                  width(matrix.width, place), in_.weights_at<C>(task, row), plain, weighted,
                                  at(of_x ? out_.x_sums : out_.y_sums, task * matrix.width + column), run > 0});
  }

  void multiply(int64_t task, int64_t run, std::pair<int64_t, int64_t> pair, C* packed, C* scratch) const {
    const auto [i, j] = pair;
    const int64_t dim = in_.x.width, x_strips = in_.x.strips();
    const bool of_x = j < x_strips;
    const int64_t to_width = of_x ? dim : in_.y_width(), place = of_x ? j : j - x_strips;
    if (rows(task, run) < (run == 0 ? 0 : 1)) return;
    C* const out = at(of_x ? out_.gram : out_.cross, (task * dim + i * kStrip) * to_width + place * kStrip);
    SK_KERNELS(gram_cross_kernels)
        .products(C())({strip(packed, in_.weights ? strips_ + i : i), strip(packed, j), rows(task, run), width(dim, i),
                        width(to_width, place), i == j, scratch, out, to_width, run > 0});
  }

  // Below the diagonal: of the rows of a strip.
  void mirror(int64_t task, int64_t number) const {
    const int64_t dim = in_.x.width;
    C* const gram = at(out_.gram, task * dim * dim);
    for (int64_t strip = 0; strip <= number; ++strip)
      for (int64_t i = number * kStrip; i < std::min((number + 1) * kStrip, dim); ++i)
        for (int64_t j = strip * kStrip; j < std::min((strip + 1) * kStrip, i); ++j)
          gram[i * dim + j] = gram[j * dim + i];
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_cross(Tensor x, std::optional<Tensor> y, std::optional<Tensor> weights,
                                                      std::optional<std::vector<int64_t>> offsets, bool wide) {
  const Operands operands(x, y, weights, offsets, wide);
  const int64_t num_tasks = operands.num_tasks(), dim = operands.x.width, y_dim = operands.y_width();
  const auto empty = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(x, sizes, operands.compute());
  };
  const Results results = {empty({num_tasks, dim, dim}), empty({num_tasks, dim, y_dim}), empty({num_tasks, dim}),
                           empty({num_tasks, y_dim})};
  if (operands.wide) {
    GramCross<double>(operands, results).run();
  } else {
    GramCross<float>(operands, results).run();
  }
  return {results.gram, results.cross, results.x_sums, results.y_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("gram_cross", TORCH_BOX(&gram_cross)); }

}  // namespace sk
