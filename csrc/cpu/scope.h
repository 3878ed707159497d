// The tensors that share one threshold per expert, as one flat run of elements cut into chunks.
// A scope is one tensor or a whole model; chunks never span tensors, and results never depend on who runs which.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "../dtype.h"
#include "mapped.h"

namespace sk {

constexpr int64_t kChunk = 16384;  // elements; one chunk of the base stays in the first-level cache

struct Part {
  Dtype dtype;
  int64_t numel, offset, first_chunk;  // offset: elements of the scope before this tensor
  const char* base;                    // null: the experts are task vectors
  std::vector<const char*> experts;    // [num_tasks]

  const char* base_at(int64_t i) const { return base ? base + i * size_of(dtype) : nullptr; }
  const char* expert_at(int64_t task, int64_t i) const { return experts[task] + i * size_of(dtype); }
};

struct Chunk {
  const Part& part;
  size_t part_index;
  int64_t index, begin, count;  // begin: within the tensor
};

// Bytes of tensors that the main passes of every call went through so far, for progress bars.
inline std::atomic<int64_t> bytes_read{0};

struct FormedKeys;

struct Scope {
  std::vector<Part> parts;
  int64_t num_tasks = 0, numel = 0, num_chunks = 0;
  bool mixed = false;                  // tensors of several dtypes
  const FormedKeys* formed = nullptr;  // what a trim reads in place of the experts

  void add(Dtype dtype, int64_t numel_of_part, const char* base, std::vector<const char*> experts) {
    mixed |= !parts.empty() && parts[0].dtype != dtype;
    parts.push_back({dtype, numel_of_part, numel, num_chunks, base, std::move(experts)});
    numel += numel_of_part;
    num_chunks += (numel_of_part + kChunk - 1) / kChunk;
  }

  // The part that holds element `i` of the scope.
  const Part& part_of(int64_t i) const {
    return *(std::upper_bound(parts.begin(), parts.end(), i, [](int64_t e, const Part& p) { return e < p.offset; }) -
             1);
  }

  Chunk chunk(int64_t index) const {
    const auto after =
        std::upper_bound(parts.begin(), parts.end(), index, [](int64_t c, const Part& p) { return c < p.first_chunk; });
    const Part& part = *(after - 1);
    const int64_t begin = (index - part.first_chunk) * kChunk;
    return {part, size_t(after - 1 - parts.begin()), index, begin, std::min(kChunk, part.numel - begin)};
  }

  void report(const Chunk& chunk) const {
    const int64_t tensors = num_tasks + (chunk.part.base ? 1 : 0);
    const int64_t bytes = tensors * chunk.count * size_of(chunk.part.dtype);
    const int64_t before = bytes_read.fetch_add(bytes, std::memory_order_relaxed);
    if (before / kGiveBackBytes != (before + bytes) / kGiveBackBytes) give_back_mapped();
  }

  // Runs body(first, last) over contiguous ranges of chunks, one per thread.
  template <class Body>
  void parallel(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / (kChunk * std::max<int64_t>(1, num_tasks)));
    torch::stable::parallel_for(0, num_chunks, grain, body);
  }
};

// Runs body(first, last) over experts. On a busy machine waiting for a second thread costs more than a small tensor.
template <class Body>
void for_each_expert(const Scope& scope, int64_t count, const Body& body) {
  constexpr int64_t kWorthAThread = 1 << 12;  // elements from which the experts are shared out among threads
  torch::stable::parallel_for(0, count, scope.numel > kWorthAThread ? 1 : count, body);
}

}  // namespace sk
