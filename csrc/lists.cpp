// Ops on lists of tensors of any device that look at what the tensors are and never at their elements: in Python a
// model of a thousand tensors would take longer to check than a GPU takes to merge it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "check.h"

namespace sk {
namespace {

// What tells tensors of one shape apart from those of another kind: any dtype, of ops' or not.
std::tuple<int32_t, int32_t, int32_t> kind_of(const Tensor& t) {
  int32_t dtype, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
  return {dtype, device, t.get_device_index()};
}

std::vector<int64_t> first_of_tied(std::vector<Tensor> tensors, int64_t num_models) {
  require(num_models > 0 && tensors.size() % size_t(num_models) == 0, "tensors must be num_models for every name, got ",
          tensors.size(), " for ", num_models);
  std::vector<int64_t> first;
  std::unordered_map<std::string, int64_t> known;
  for (auto of_name = tensors.begin(); of_name != tensors.end(); of_name += num_models) {
    const int64_t index = int64_t(first.size());
    const auto kind = kind_of(*of_name);
    const auto sizes = of_name->sizes();
    std::string memory(reinterpret_cast<const char*>(sizes.data()), sizes.size() * sizeof(int64_t));
    const auto append = [&](const auto& value) { memory.append(reinterpret_cast<const char*>(&value), sizeof value); };
    append(std::get<0>(kind));
    bool has_memory = true;
    for (auto t = of_name; t != of_name + num_models; ++t) {
      if (kind_of(*t) != kind || !has_shape(*t, sizes)) return {};
      const void* const data = t->data_ptr();
      has_memory &= data != nullptr;
      append(data);
      for (const int64_t stride : t->strides()) append(stride);
    }
    first.push_back(has_memory ? known.emplace(std::move(memory), index).first->second : index);
  }
  return first;
}

constexpr size_t kHead = 7;  // columns of a row before the addresses of the experts

// The rows of the tensors of one dtype.
struct Group {
  ScalarType dtype;
  int64_t num_parts = 0, num_chunks = 0;
  std::vector<int64_t> words{};
};

struct Table {
  std::vector<Tensor> alive, filled;
  std::vector<Group> groups;
  int64_t numel = 0, num_chunks = 0;
  bool in_place = false, copied = false;

  int64_t address(const Tensor& t) {
    const bool contiguous = t.is_contiguous();
    if (!contiguous) alive.push_back(torch::stable::contiguous(t));
    return int64_t(reinterpret_cast<intptr_t>((contiguous ? t : alive.back()).data_ptr()));
  }
  Group& group_of(ScalarType dtype) {
    for (Group& group : groups)
      if (group.dtype == dtype) return group;
    groups.push_back({dtype});
    return groups.back();
  }
};

void check_experts(const std::vector<Tensor>& base, const std::vector<Tensor>& experts, size_t num_tasks) {
  require(num_tasks > 0 && experts.size() % num_tasks == 0,
          "experts must be one tensor for every expert and merged tensor, got ", experts.size(), " for ", num_tasks,
          " experts");
  require(!experts.empty(), "experts must be at least one tensor, got none");
  const size_t parts = experts.size() / num_tasks;
  require(base.empty() || base.size() == parts, "base must be one tensor for every merged tensor, got ", base.size(),
          " for ", parts);
  const bool wide = dtype_of(experts[0], "experts") == Dtype::f64;
  for (size_t i = 0; i < experts.size(); ++i) {
    const Tensor& first = experts[i - i % num_tasks];
    if (i % num_tasks == 0) {
      require(on_same_device(first, experts[0]), "experts must be on one device within one scope, got two");
      require((dtype_of(first, "experts") == Dtype::f64) == wide,
              "experts must be all float64 or none within one scope, got both");
    } else {
      check_alike(experts[i], first, experts[0], "experts[" + std::to_string(i % num_tasks) + "]");
    }
  }
  for (size_t p = 0; p < base.size(); ++p) check_alike(base[p], experts[p * num_tasks], experts[0], "base");
}

void check_bits(const Tensor& t, const Tensor& first) {
  const int64_t bytes = (first.numel() + 7) / 8;
  require(on_same_device(t, first) && t.scalar_type() == ScalarType::Byte && has_shape(t, {bytes}) && t.is_contiguous(),
          "out must be contiguous uint8 [", bytes, "] on the device of experts[0] for bits, got another tensor");
}

// packed: of every output, whether it is bits.
void check_out(const std::vector<Tensor>& out, const std::vector<Tensor>& base, const std::vector<Tensor>& experts,
               size_t num_tasks, const std::vector<bool>& packed, bool in_place) {
  const size_t num_outputs = packed.size();
  const size_t parts = experts.size() / num_tasks;
  if (num_outputs == 1)
    require(out.size() == parts, "out must be one tensor for every merged tensor, got ", out.size());
  else
    require(out.size() == parts * num_outputs, "out must be ", num_outputs, " tensors for every merged tensor, got ",
            out.size(), " for ", parts);
  std::vector<Tensor> bits;
  for (size_t i = 0; i < out.size(); ++i) {
    const Tensor& first = experts[i / num_outputs * num_tasks];
    if (packed[i % num_outputs]) {
      check_bits(out[i], first);
      bits.push_back(out[i]);
    } else {
      check_alike(out[i], first, experts[0], "out");
    }
  }
  check_apart(bits, {&base, &experts});
  check_apart(out, {&base, &experts}, in_place, parts);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<int64_t>> addresses(
    std::vector<Tensor> base, std::vector<Tensor> experts, int64_t num_tasks_, std::optional<std::vector<Tensor>> out,
    int64_t num_outputs, bool stacked, std::vector<int64_t> places, std::vector<int64_t> packed_outputs,
    std::vector<double> numbers, int64_t chunk) {
  const size_t num_tasks = size_t(num_tasks_), outputs = out ? size_t(num_outputs) : 0;
  std::vector<bool> packed(outputs);
  for (const int64_t j : packed_outputs)
    if (!stacked && size_t(j) < outputs) packed[size_t(j)] = true;
  check_experts(base, experts, num_tasks);
  if (out && !stacked) check_out(*out, base, experts, num_tasks, packed, !places.empty());
  const size_t parts = experts.size() / num_tasks, num_places = places.size() / parts;
  Table table;
  for (const Tensor& t : out.value_or(std::vector<Tensor>())) {
    table.copied |= !t.is_contiguous();
    table.filled.push_back(t.is_contiguous() ? t : torch::stable::new_empty(t, t.sizes()));
  }
  std::vector<int64_t> written;
  for (const Tensor& t : table.filled)
    if (t.numel() > 0) written.push_back(int64_t(reinterpret_cast<intptr_t>(t.data_ptr())));
  std::sort(written.begin(), written.end());
  const auto add = [&](std::vector<int64_t>& row, int64_t address) {
    row.push_back(address);
    table.in_place |= std::binary_search(written.begin(), written.end(), address);
  };
  for (size_t p = 0; p < parts; ++p) {
    const Tensor& first = experts[p * num_tasks];
    Group& group = table.group_of(first.scalar_type());
    const int64_t numel = first.numel();
    std::vector<int64_t>& words = group.words;
    const size_t row = words.size();
    const auto output = [&](size_t j) {
      return int64_t(reinterpret_cast<intptr_t>(table.filled[p * outputs + j].data_ptr()));
    };
    words.insert(words.end(), {numel, table.numel, group.num_chunks, table.num_chunks, 1, outputs ? output(0) : 0});
    base.empty() ? words.push_back(0) : add(words, table.address(base[p]));
    for (size_t t = 0; t < num_tasks; ++t) add(words, table.address(experts[p * num_tasks + t]));
    int64_t low_bits = 0;
    for (size_t i = row + kHead - 1; i < words.size(); ++i) low_bits |= words[i];
    for (size_t j = 0; j < outputs; ++j) {
      if (!packed[j]) low_bits |= output(j);
      if (num_places) words.push_back(output(j));
    }
    words[row + kHead - 3] = low_bits % 16 == 0;
    words.insert(words.end(), places.begin() + p * num_places, places.begin() + (p + 1) * num_places);
    if ((words.size() - row) % 2) words.push_back(0);
    const int64_t chunks = (numel + chunk - 1) / chunk;
    table.numel += numel;
    table.num_chunks += chunks;
    group.num_chunks += chunks;
    ++group.num_parts;
  }
  std::vector<int64_t> words, layout = {table.numel, table.num_chunks, table.in_place};
  for (const Group& group : table.groups) {
    layout.insert(layout.end(), {group.num_parts, int64_t(group.words.size()), group.num_chunks});
    words.insert(words.end(), group.words.begin(), group.words.end());
  }
  const size_t first_number = words.size();
  words.resize(words.size() + numbers.size());
  if (!numbers.empty()) memcpy(words.data() + first_number, numbers.data(), numbers.size() * sizeof(double));
  const Tensor result = torch::stable::empty({int64_t(words.size())}, ScalarType::Long);
  memcpy(result.data_ptr(), words.data(), words.size() * sizeof(int64_t));
  if (!table.copied) table.filled.clear();
  return {result, table.alive, table.filled, layout};
}

}  // namespace

STABLE_TORCH_LIBRARY(surgery_kernels_lists, m) {
  // tensors: every model's first, then every model's second, ... For each name the first one whose tensors lie in the
  // same memory in all models; empty where a tensor has not the shape, dtype and device of the first model's.
  m.def("first_of_tied(Tensor[] tensors, int num_models) -> int[]");

  // What surgery_kernels/triton/addresses.py calls words: the rows of all tensors, those of a dtype together, and
  // `numbers` behind them; copies of inputs that are not contiguous; the tensors to fill, where those are not all of
  // `out`; and elements and chunks of the scope, whether an output is an input, and of every dtype its tensors, the
  // words of their rows and their chunks. places: as many words of each tensor, for kernels of several outputs;
  // packed: those that are bits. stacked: out is one tensor of any shape and dtype, and num_outputs 1.
  m.def(
      "addresses(Tensor[] base, Tensor[] experts, int num_tasks, Tensor[]? out, int num_outputs, bool stacked, "
      "int[] places, int[] packed, float[] numbers, int chunk) -> (Tensor, Tensor[], Tensor[], int[])");
}

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels_lists, CompositeExplicitAutograd, m) {
  m.impl("first_of_tied", TORCH_BOX(&first_of_tied));
  m.impl("addresses", TORCH_BOX(&addresses));
}

}  // namespace sk
