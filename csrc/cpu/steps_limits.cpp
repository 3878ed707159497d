#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "select.h"
#include "steps_program.h"
#include "trim.h"
#include "trim_keys.h"

namespace sk {
namespace {

constexpr int64_t kHeld = 1 << 16;  // keys of a vector that are held together; those of a larger one are formed again

// What forms the keys of some vectors, from element `offset` of their tensor on, each with its own numbers.
class ProgramKeys : public FormedKeys {
 public:
  ProgramKeys(const Program& program, const StepsInputs& inputs, const Numbers& numbers, int64_t first, int64_t size,
              int64_t offset)
      : program_(program), inputs_(inputs), numbers_(numbers), first_(first), size_(size), offset_(offset) {}

  std::unique_ptr<KeyFormer> former() const override { return std::make_unique<Former>(*this); }

 private:
  struct Former : KeyFormer {
    const ProgramKeys& of;
    StepsThread thread;

    explicit Former(const ProgramKeys& of) : of(of), thread(of.program_, of.inputs_.scope.num_tasks, of.inputs_.wide) {
      thread.args.keys = true;
      thread.offset = of.offset_;
    }
    void form(const Part& part, int64_t begin, int64_t n, void* keys) override {
      const int64_t end = begin + n;
      for (int64_t last; begin < end; begin = last) {
        const int64_t vector = of.numbers_.are_shared() ? 0 : begin / of.size_;
        last = of.numbers_.are_shared() ? end : std::min(end, (vector + 1) * of.size_);
        thread.args.numbers = of.numbers_.of(of.first_ + vector);
        thread.outputs[0] = keys;
        thread.run(part, begin, last - begin);
        keys = static_cast<char*>(keys) + (last - begin) * (of.inputs_.wide ? 8 : 4);
      }
    }
  };

  const Program& program_;
  const StepsInputs& inputs_;
  const Numbers& numbers_;
  const int64_t first_, size_, offset_;
};

// The limits of keys that are all in memory. Entry i lies at begin + i * stride of its tensor.
template <class Key>
void find_limits(const Key* keys, int64_t size, const std::vector<Place>& places, int64_t begin, int64_t stride,
                 Limit<Key>* limits) {
  const auto [smallest, largest] = std::minmax_element(keys, keys + size);
  const OrderStatistics<Key> order({{keys, size}}, size ? *smallest : 0, size ? *largest : 0);
  for (const Place& place : places) {
    Limit<Key>& limit = *limits++;
    limit = {kInfinityKey<Key>, 0};
    if (place.rank == 0) continue;
    limit.threshold = order.kth_largest(place.rank);
    const auto count_if = [&](auto test) { return std::count_if(keys, keys + size, test); };
    int64_t budget = place.rank - count_if([&](Key key) { return key > limit.threshold; });
    if (place.from_smallest) budget = count_if([&](Key key) { return key == limit.threshold; }) + 1 - budget;
    int64_t i = 0;
    while (budget -= keys[i] == limit.threshold) ++i;
    limit.cut = begin + i * stride + 1;
  }
}

template <class Key>
class Search {
 public:
  Search(const StepsInputs& inputs, const Program& program, const Numbers& numbers, const std::vector<int64_t>& ranks)
      : inputs_(inputs), program_(program), numbers_(numbers), ranks_(ranks) {}

  // limits: [num_blocks, num_ranks], or of whole tensors [num_tensors, num_ranks]
  void run(Limit<Key>* limits, bool whole) const {
    for (size_t p = 0; p < inputs_.vectors.size(); ++p) {
      const Vectors& vectors = inputs_.vectors[p];
      const std::vector<Place> places = places_of(whole ? inputs_.scope.parts[p].numel : vectors.size);
      if (whole) {
        search(p, places, 0, inputs_.scope.parts[p].numel, vectors.first, limits + p * places.size());
        continue;
      }
      Limit<Key>* const of_tensor = limits + vectors.first * int64_t(ranks_.size());
      if (vectors.by_column)
        search_columns(p, places, of_tensor);
      else if (vectors.size > kHeld)
        search_large(p, places, of_tensor);
      else
        search_small(p, places, of_tensor);
    }
  }

 private:
  std::vector<Place> places_of(int64_t size) const {
    std::vector<Place> places;
    for (const int64_t rank : ranks_) {
      require(rank >= -size && rank <= size, "ranks must be in [-", size, ", ", size, "], the number of entries, got ",
              rank);
      places.push_back({0, rank < 0 ? size + 1 + rank : rank, rank < 0});
    }
    return places;
  }

  void search_large(size_t p, const std::vector<Place>& places, Limit<Key>* limits) const {
    const Vectors& vectors = inputs_.vectors[p];
    for (int64_t v = 0; v < vectors.count; ++v)
      search(p, places, v * vectors.size, vectors.size, vectors.first + v, limits + v * int64_t(places.size()));
  }

  // Elements begin to begin + n of a tensor, which start with vector `first` of all.
  void search(size_t p, const std::vector<Place>& places, int64_t begin, int64_t n, int64_t first,
              Limit<Key>* limits) const {
    const Part& part = inputs_.scope.parts[p];
    const ProgramKeys keys(program_, inputs_, numbers_, first, inputs_.vectors[p].size, begin);
    Scope scope;
    scope.num_tasks = inputs_.scope.num_tasks;
    scope.formed = &keys;
    std::vector<const char*> pointers;
    for (int64_t i = 0; i < scope.num_tasks; ++i) pointers.push_back(part.expert_at(i, begin));
    scope.add(part.dtype, n, nullptr, std::move(pointers));
    scope.mixed = true;
    for (Limit<Key> limit : limits_at<Key>(scope, places, /*all_ties=*/false, NonFinite::propagate, {})) {
      if (limit.cut > 0) limit.cut += begin;
      *limits++ = limit;
    }
  }

  void search_small(size_t p, const std::vector<Place>& places, Limit<Key>* limits) const {
    const Vectors& vectors = inputs_.vectors[p];
    const int64_t grain = std::max<int64_t>(1, kHeld / std::max<int64_t>(1, vectors.size));
    torch::stable::parallel_for(0, vectors.count, grain, [&](int64_t first, int64_t last) {
      StepsThread thread(program_, inputs_.scope.num_tasks, inputs_.wide);
      thread.args.keys = true;
      std::vector<Key> keys(size_t(vectors.size));
      thread.outputs[0] = keys.data();
      for (int64_t v = first; v < last; ++v) {
        thread.args.numbers = numbers_.of(vectors.first + v);
        thread.run(inputs_.scope.parts[p], v * vectors.size, vectors.size);
        for (Key& key : keys) key &= kMaxKey<Key>;
        find_limits(keys.data(), vectors.size, places, v * vectors.size, 1, limits + v * int64_t(places.size()));
      }
    });
  }

  void search_columns(size_t p, const std::vector<Place>& places, Limit<Key>* limits) const {
    const Vectors& vectors = inputs_.vectors[p];
    const int64_t width =
        std::clamp<int64_t>(kHeld / std::max<int64_t>(1, vectors.size), 1, program_.block(inputs_.wide));
    const int64_t strips = (vectors.count + width - 1) / width;
    torch::stable::parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
      StepsThread thread(program_, inputs_.scope.num_tasks, inputs_.wide);
      thread.args.keys = true;
      thread.args.by_column = !numbers_.are_shared();
      thread.args.stride = thread.args.by_column ? numbers_.stride() : 1;
      std::vector<Key> rows(size_t(width * vectors.size)), keys(size_t(vectors.size));
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t column = strip * width, count = std::min(width, vectors.count - column);
        thread.args.numbers = thread.args.by_column ? numbers_.from(vectors.first + column) : numbers_.of(0);
        thread.args.lanes = count;
        for (int64_t row = 0; row < vectors.size; ++row) {
          thread.outputs[0] = &rows[size_t(row * count)];
          thread.run(inputs_.scope.parts[p], row * vectors.count + column, count);
        }
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t row = 0; row < vectors.size; ++row)
            keys[size_t(row)] = rows[size_t(row * count + c)] & kMaxKey<Key>;
          find_limits(keys.data(), vectors.size, places, column + c, vectors.count,
                      limits + (column + c) * int64_t(places.size()));
        }
      }
    });
  }

  const StepsInputs& inputs_;
  const Program& program_;
  const Numbers& numbers_;
  const std::vector<int64_t>& ranks_;
};

std::tuple<Tensor, Tensor> steps_limits(std::vector<Tensor> inputs, int64_t num_inputs, std::vector<int64_t> words,
                                        Tensor numbers_tensor, std::vector<int64_t> ranks, std::string axis_name,
                                        bool wide, bool whole) {
  const Axis axis = parse_axis(axis_name);
  const StepsInputs taken(inputs, num_inputs, axis, wide);
  Numbers numbers(numbers_tensor);
  const Program program(words, num_inputs, numbers.count());
  numbers.check(taken.num_blocks);
  if (axis == Axis::column && !numbers.are_shared()) numbers.transpose();
  require(program.num_outputs == 1 && program.num_sums == 0 && !program.packs_any(),
          "program must store its keys and nothing else, got ", program.num_outputs, " outputs and ", program.num_sums,
          " sums");
  require(!ranks.empty(), "ranks must be at least one, got none");
  require(!whole || axis != Axis::column, "whole must be False by column, got True");

  const int64_t num_limits = whole ? int64_t(taken.scope.parts.size()) : taken.num_blocks;
  const std::vector<int64_t> shape{num_limits, int64_t(ranks.size())};
  const ScalarType dtype = taken.wide ? ScalarType::Double : ScalarType::Float;
  const Tensor thresholds = torch::stable::new_empty(numbers_tensor, shape, dtype);
  const Tensor cuts = torch::stable::new_empty(numbers_tensor, shape, ScalarType::Long);
  const auto fill = [&](auto key) {
    using Key = decltype(key);
    std::vector<Limit<Key>> limits(size_t(thresholds.numel()));
    Search<Key>(taken, program, numbers, ranks).run(limits.data(), whole);
    for (size_t i = 0; i < limits.size(); ++i) {
      memcpy(static_cast<Key*>(thresholds.data_ptr()) + i, &limits[i].threshold, sizeof(Key));
      static_cast<int64_t*>(cuts.data_ptr())[i] = limits[i].cut;
    }
  };
  taken.wide ? fill(int64_t()) : fill(int32_t());
  return {thresholds, cuts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("steps_limits", TORCH_BOX(&steps_limits)); }

}  // namespace sk
