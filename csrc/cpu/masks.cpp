#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>

#include "../trim_options.h"
#include "block_sums.h"
#include "finite.h"
#include "ids.h"
#include "inputs.h"
#include "long_row.h"
#include "masks_kernel.h"
#include "rank.h"
#include "trim_kernel.h"

namespace sk {
namespace {

struct MaskOptions {
  std::vector<double> density;
  bool della;
  std::vector<double> epsilon;  // of della
  uint64_t seed;
  std::vector<uint32_t> tensor_ids, task_ids;
  bool drop;
};

// A tensor whose entries are ranked along its second dimension; a vector is one row.
struct Rows {
  int64_t slabs, size, columns;  // [slabs, size, columns]

  explicit Rows(const Tensor& t) : slabs(1), size(t.numel()), columns(1) {
    if (t.dim() < 2) return;
    slabs = t.size(0);
    size = t.size(1);
    for (int64_t d = 2; d < t.dim(); ++d) columns *= t.size(d);
  }
};

template <class Key>
class Masker {
 public:
  Masker(const Scope& scope, const MaskOptions& options, const std::vector<Tensor>& bits)
      : scope_(scope), options_(options), kernels_(SK_KERNELS(masks_kernels)) {
    for (size_t p = 0; p < scope.parts.size(); ++p) {
      bits_.push_back(static_cast<uint8_t*>(bits[p].data_ptr()));
      first_block_.push_back(num_blocks_);
      num_blocks_ += blocks_of(p);
    }
    sums_.resize(size_t(num_blocks_ * scope.num_tasks));
  }

  // Bits by rank, where they are not drawn with the sums.
  void rank(const std::vector<Rows>& rows) const {
    struct Item {
      size_t part;
      int64_t task, first, last;  // slabs
    };
    std::vector<Item> items;
    for (size_t p = 0; p < rows.size(); ++p) {
      if (scope_.parts[p].numel == 0) continue;
      require(rows[p].size <= int64_t(UINT32_MAX), "experts must have rows of at most 2**32 - 1 entries, got ",
              rows[p].size);
      // Every item starts at a byte of the bits, and is worth a thread.
      const int64_t slab = rows[p].size * rows[p].columns, step = 8 / std::gcd<int64_t>(8, slab);
      const int64_t slabs = (kSlabs / slab / step + 1) * step;
      for (int64_t t = 0; t < scope_.num_tasks; ++t)
        for (int64_t s = 0; s < rows[p].slabs; s += slabs)
          items.push_back({p, t, s, std::min(s + slabs, rows[p].slabs)});
    }
    if (items.empty()) return;
    int64_t largest = 1;  // bytes that a thread takes
    for (const Rows& of_part : rows) largest = std::max(largest, Scratch::bytes(of_part));
    const int64_t workers = std::clamp<int64_t>(kRankBytes / largest, 1, int64_t(items.size()));
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      Scratch scratch;
      for (size_t i = next++; i < items.size(); i = next++)
        rank_slabs(rows[items[i].part], items[i].part, items[i].task, items[i].first, items[i].last, scratch);
    });
  }

  // The sums of every tensor and expert.  # [num_tensors, num_tasks, 3]
  void sum(double* out) {
    torch::stable::parallel_for(0, num_blocks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) sum_block(b);
    });
    for (size_t p = 0; p < scope_.parts.size(); ++p)
      for (int64_t t = 0; t < scope_.num_tasks; ++t, out += 3) fold(p, t, out);
  }

 private:
  static constexpr int64_t kSlabs = 1 << 16;       // elements of an item
  static constexpr int64_t kTile = 16;             // columns that are ranked from one read: a cache line of float32
  static constexpr int64_t kRowBytes = 8 << 20;    // a row that would take more is not sorted
  static constexpr int64_t kRankBytes = 32 << 20;  // of all threads

  struct Scratch {
    std::vector<Key> keys;         // [columns, size]
    std::vector<uint32_t> words;   // [columns, size]
    std::vector<uint32_t> limits;  // [size]
    RowOrder<Key> order;
    LongRow<Key> long_row;

    static constexpr int64_t kOfEntry = sizeof(Key) + 4;  // of every column, and once besides:
    static constexpr int64_t kOfRank = 4 + 2 * sizeof(typename RowOrder<Key>::Entry);

    static bool too_long(const Rows& rows) { return rows.size * (kOfEntry + kOfRank) > kRowBytes; }
    static int64_t tile(const Rows& rows) {
      const int64_t most = (kRowBytes / std::max<int64_t>(1, rows.size) - kOfRank) / kOfEntry;
      return std::clamp<int64_t>(most, 1, std::min(kTile, rows.columns));
    }
    static int64_t bytes(const Rows& rows) {
      return too_long(rows) ? LongRow<Key>::kBytes : rows.size * (tile(rows) * kOfEntry + kOfRank);
    }
  };

  int64_t blocks_of(size_t p) const { return (scope_.parts[p].numel + kSumBlock - 1) / kSumBlock; }
  int64_t bytes_of(size_t p) const { return (scope_.parts[p].numel + 7) / 8; }
  uint8_t* bits_at(size_t p, int64_t t, int64_t i) const { return bits_[p] + t * bytes_of(p) + i / 8; }
  RandomStream stream(size_t p, int64_t t) const {
    return {options_.seed, options_.tensor_ids[p], options_.task_ids[size_t(t)]};
  }
  MaskSums& sums_at(size_t p, int64_t t, int64_t block) {
    return sums_[size_t(first_block_[p] * scope_.num_tasks + t * blocks_of(p) + block)];
  }

  void sum_block(int64_t index) {
    const size_t p =
        size_t(std::upper_bound(first_block_.begin(), first_block_.end(), index) - first_block_.begin() - 1);
    const Part& part = scope_.parts[p];
    const int64_t block = index - first_block_[p], begin = block * kSumBlock;
    const int64_t count = std::min(kSumBlock, part.numel - begin);
    for (int64_t t = 0; t < scope_.num_tasks; ++t) {
      uint8_t* const bits = bits_at(p, t, begin);
      if (!options_.della) kernels_.bits(stream(p, t), keep_below(options_.density[size_t(t)]), begin, count, bits);
      sums_at(p, t, block) = kernels_.sums.template get<Key>(part.dtype)(part.base_at(begin), part.expert_at(t, begin),
                                                                         count, options_.drop, bits);
    }
    scope_.report({part, p, index, begin, count});
  }

  void fold(size_t p, int64_t t, double* out) {
    std::vector<double> all, kept_norm;
    int64_t kept = 0;
    for (int64_t b = 0; b < blocks_of(p); ++b) {
      const MaskSums& sums = sums_at(p, t, b);
      kept += sums.kept;
      all.push_back(sums.all);
      kept_norm.push_back(sums.kept_norm);
    }
    out[0] = double(kept);
    out[1] = fold_halves(all.data(), int64_t(all.size()));
    out[2] = fold_halves(kept_norm.data(), int64_t(kept_norm.size()));
  }

  void rank_slabs(const Rows& rows, size_t p, int64_t t, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t slab = rows.size * rows.columns, begin = first * slab, count = (last - first) * slab;
    uint8_t* const bits = bits_at(p, t, begin);
    const double density = options_.density[size_t(t)];
    if (density >= 1) return kernels_.bits(stream(p, t), keep_below(density), begin, count, bits);
    memset(bits, 0, size_t(count + 7) / 8);
    const auto limit = [&, epsilon = options_.epsilon[size_t(t)]](int64_t rank) {
      return limit_of(rank, density, epsilon, rows.size);
    };
    const int64_t tile = Scratch::tile(rows);
    if (!Scratch::too_long(rows)) {
      scratch.limits.resize(size_t(rows.size));
      for (int64_t r = 0; r < rows.size; ++r) scratch.limits[size_t(r)] = limit(r);
    }
    for (int64_t s = first; s < last; ++s)
      for (int64_t c = 0; c < rows.columns; c += tile) {
        if (Scratch::too_long(rows))
          rank_long(rows, p, t, s * slab + c, limit, bits_at(p, t, 0), scratch);
        else
          rank_tile(rows, p, t, s * slab + c, std::min(tile, rows.columns - c), bits_at(p, t, 0), scratch);
      }
  }

  // The word below which the entry of a rank is kept.
  static uint32_t limit_of(int64_t rank, double density, double epsilon, int64_t size) {
    const double p = size > 1 ? (density - epsilon) + 2 * epsilon * double(rank) / double(size - 1) : density;
    return uint32_t(keep_below(p));
  }

  template <class Limit>
  void rank_long(const Rows& rows, size_t p, int64_t t, int64_t at, const Limit& limit, uint8_t* bits,
                 Scratch& scratch) const {
    const auto flat = [&](int64_t i) { return at + i * rows.columns; };
    const auto read = [&](int64_t first, int64_t count, Key* keys, uint32_t* words) {
      uint32_t aligned[LongRow<Key>::kPiece + kWordSlack + 4];
      const int64_t step = rows.columns == 1 ? count : 1;
      for (int64_t i = 0; i < count; i += step) {
        const int64_t from = flat(first + i);
        load(p, t, from, step, keys + i, aligned);
        std::copy_n(aligned + from % 4, step, words + i);
      }
    };
    scratch.long_row.decide(rows.size, read, limit, [&](int64_t i) { bits[flat(i) / 8] |= uint8_t(1 << flat(i) % 8); });
  }

  // `columns` neighbouring rows whose first entries start at element `at`.
  void rank_tile(const Rows& rows, size_t p, int64_t t, int64_t at, int64_t columns, uint8_t* bits,
                 Scratch& scratch) const {
    scratch.keys.resize(size_t(columns * rows.size + kSlack));
    scratch.words.resize(size_t(columns * rows.size + kWordSlack + 4));
    const bool contiguous = rows.columns == 1;
    int64_t shift = 0;  // of the words
    if (contiguous) {
      shift = at % 4;
      load(p, t, at, rows.size, scratch.keys.data(), scratch.words.data());
    } else {
      Key keys[kTile + kSlack];
      uint32_t words[kTile + kWordSlack + 4];
      for (int64_t r = 0; r < rows.size; ++r) {
        const int64_t from = at + r * rows.columns;
        load(p, t, from, columns, keys, words);
        for (int64_t c = 0; c < columns; ++c) {
          scratch.keys[size_t(c * rows.size + r)] = keys[c];
          scratch.words[size_t(c * rows.size + r)] = words[c + from % 4];
        }
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      const auto* const entries = scratch.order.sort(scratch.keys.data() + c * rows.size, rows.size);
      const uint32_t* const words = scratch.words.data() + c * rows.size + shift;
      for (int64_t r = 0; r < rows.size; ++r) {
        const int64_t i = entries[r].index, flat = at + c + i * rows.columns;
        bits[flat / 8] |= uint8_t((words[i] < scratch.limits[size_t(r)]) << flat % 8);
      }
    }
  }

  // Keys and words of elements; words start at the last multiple of 4 before them. All NaNs rank alike.
  void load(size_t p, int64_t t, int64_t at, int64_t count, Key* keys, uint32_t* words) const {
    const Part& part = scope_.parts[p];
    SK_KERNELS(trim_kernels)
        .get<Key>(part.dtype)
        .keys(part.base_at(at), part.expert_at(t, at), count, options_.drop, keys);
    for (int64_t i = 0; i < count; ++i) keys[i] = std::min<Key>(keys[i], kInfinityKey<Key> + 1);
    kernels_.words(stream(p, t), at - at % 4, count + at % 4, words);
  }

  const Scope& scope_;
  const MaskOptions& options_;
  const MasksKernels& kernels_;
  std::vector<uint8_t*> bits_;  // of every tensor: [num_tasks, bytes]
  std::vector<int64_t> first_block_;
  int64_t num_blocks_ = 0;
  std::vector<MaskSums> sums_;  // of every tensor: [num_tasks, blocks]
};

std::vector<double> ranges_of(const std::optional<std::vector<double>>& epsilon, const std::vector<double>& density) {
  require(epsilon.has_value(), "epsilon must be given with rule='della', got none");
  require(epsilon->size() == density.size(), "epsilon must be one number per expert (", density.size(), "), got ",
          epsilon->size());
  for (size_t t = 0; t < density.size(); ++t) {
    const double e = std::abs((*epsilon)[t]);
    require(density[t] >= 1 || (density[t] - e > 0 && density[t] + e < 1),
            "epsilon must keep density - epsilon and density + epsilon in (0, 1), got ", (*epsilon)[t],
            " with density ", density[t]);
  }
  return *epsilon;
}

std::tuple<std::vector<Tensor>, Tensor> masks(std::vector<Tensor> base, std::vector<Tensor> experts,
                                              std::vector<double> density, std::string rule,
                                              std::optional<std::vector<double>> epsilon, int64_t seed,
                                              std::optional<std::vector<int64_t>> tensor_ids,
                                              std::optional<std::vector<int64_t>> task_ids, std::string nonfinite_name,
                                              std::optional<std::vector<std::string>> names) {
  const bool della = one_of("rule", rule, {"random", "della"}) == 1;
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  const Inputs inputs(base, experts, density.size());
  const Scope& scope = inputs.scope;
  const MaskOptions options{density,
                            della,
                            della ? ranges_of(epsilon, density) : std::vector<double>(),
                            uint64_t(seed),
                            ids(tensor_ids, scope.parts.size(), "tensor_ids", "merged tensor"),
                            ids(task_ids, density.size(), "task_ids", "expert"),
                            nonfinite == NonFinite::drop};
  std::vector<Tensor> bits;
  std::vector<Rows> rows;
  for (size_t p = 0; p < scope.parts.size(); ++p) {
    const Tensor& first = experts[p * density.size()];
    rows.emplace_back(first);
    bits.push_back(torch::stable::new_empty(first, {scope.num_tasks, (first.numel() + 7) / 8}, ScalarType::Byte));
  }
  const Tensor sums =
      torch::stable::new_empty(experts[0], {int64_t(scope.parts.size()), scope.num_tasks, 3}, ScalarType::Double);
  const auto fill = [&](auto key) {
    using Key = decltype(key);
    Masker<Key> masker(scope, options, bits);
    if (della) masker.rank(rows);
    double* const out = static_cast<double*>(sums.data_ptr());
    masker.sum(out);
    // a sum of float32 magnitudes is finite where they are: finite inputs cost no second read
    if (nonfinite == NonFinite::error &&
        !std::all_of(out, out + sums.numel(), [](double x) { return std::isfinite(x); }))
      check_finite<Key>(scope, names.value_or(std::vector<std::string>()));
  };
  inputs.wide ? fill(int64_t()) : fill(int32_t());
  return {bits, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("masks", TORCH_BOX(&masks)); }

}  // namespace sk
