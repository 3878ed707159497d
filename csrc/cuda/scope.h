// The tensors that share one threshold per expert, as the kernels see them: one flat run of elements cut into chunks,
// found through tables on the device. A scope is one launch however many tensors it has.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../dtype.h"
#include "toolkit.h"

namespace sk {
namespace cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;   // elements a block takes at once
constexpr int64_t kSlice = 16384;  // elements whose norms are summed in one order, on the CPU too
constexpr int kMaxTasks = 1024;    // their table fits into shared memory

struct Part {
  const void* base;  // null: the experts are task vectors
  void* out;         // null where nothing is merged
  int64_t numel, offset, first_chunk, first_slice;
  Dtype dtype;
  bool aligned;  // every tensor begins at a multiple of 16 bytes
};

struct Chunk {
  int part;
  int64_t begin;  // within the tensor
  int count;
};

struct Scope {
  const Part* parts;
  const void* const* experts;  // [num_parts, num_tasks]
  int num_parts, num_tasks;
  int64_t numel, num_chunks, num_slices;

  // The last part whose `first` is at most i: an empty part never holds anything.
  __device__ int find(int64_t Part::* first, int64_t i) const {
    int lo = 0, hi = num_parts;
    while (hi - lo > 1) {
      const int middle = (lo + hi) / 2;
      if (parts[middle].*first <= i)
        lo = middle;
      else
        hi = middle;
    }
    return lo;
  }

  __device__ Chunk run(int64_t Part::* first, int64_t index, int64_t size) const {
    const int part = find(first, index);
    const int64_t begin = (index - parts[part].*first) * size, left = parts[part].numel - begin;
    return {part, begin, int(left < size ? left : size)};
  }
  __device__ Chunk chunk(int64_t index) const { return run(&Part::first_chunk, index, kChunk); }
  __device__ Chunk slice(int64_t index) const { return run(&Part::first_slice, index, kSlice); }

  __device__ const void* expert(int part, int task) const { return experts[int64_t(part) * num_tasks + task]; }
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA must run, got ") + cudaGetErrorString(error));
}

// Where kernels run and what their memory comes from.
struct Device {
  std::function<void*(int64_t bytes)> allocate;  // alive until the kernels have run
  cudaStream_t stream;
  int processors;

  template <class T>
  T* array(int64_t size) const {
    return static_cast<T*>(allocate(std::max<int64_t>(1, size) * int64_t(sizeof(T))));
  }
  template <class T>
  T* zeros(int64_t size) const {
    T* const data = array<T>(size);
    check(cudaMemsetAsync(data, 0, size_t(std::max<int64_t>(1, size)) * sizeof(T), stream));
    return data;
  }
  template <class T>
  T* upload(const std::vector<T>& values) const {
    T* const data = array<T>(int64_t(values.size()));
    copy(data, values.data(), values.size() * sizeof(T));
    return data;
  }
  template <class T>
  std::vector<T> fetch(const T* data, int64_t size) const {
    std::vector<T> values(static_cast<size_t>(size));
    check(cudaMemcpyAsync(values.data(), data, size_t(size) * sizeof(T), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    return values;
  }
  void add(const int* number, int64_t* to) const;
  bool is_capturing() const {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
  }
  // Blocks for `work` pieces, as many as run at once at most.
  unsigned blocks(int64_t work, int per_processor) const {
    return unsigned(std::clamp<int64_t>(work, 1, int64_t(processors) * per_processor));
  }

 private:
  // The bytes travel as arguments of kernels: a captured graph keeps them, and nothing has to outlive the call.
  void copy(void* data, const void* bytes, size_t count) const;
};

// Lists the tensors of a call.
class ScopeBuilder {
 public:
  explicit ScopeBuilder(int num_tasks) : num_tasks_(num_tasks) {
    if (num_tasks > kMaxTasks)
      throw std::runtime_error("experts must be at most " + std::to_string(kMaxTasks) + " on CUDA, got " +
                               std::to_string(num_tasks));
  }

  void add(Dtype dtype, int64_t numel, const void* base, const std::vector<const void*>& experts, void* out) {
    bool aligned = is_aligned(base) && is_aligned(out);
    for (const void* expert : experts) {
      aligned &= is_aligned(expert);
      experts_.push_back(expert);
    }
    parts_.push_back({base, out, numel, numel_, num_chunks_, num_slices_, dtype, aligned});
    numel_ += numel;
    num_chunks_ += (numel + kChunk - 1) / kChunk;
    num_slices_ += (numel + kSlice - 1) / kSlice;
  }

  const std::vector<Part>& parts() const { return parts_; }
  int num_tasks() const { return num_tasks_; }
  int64_t numel() const { return numel_; }
  bool is_wide() const { return parts_[0].dtype == Dtype::f64; }
  bool has(Dtype dtype) const {
    return std::any_of(parts_.begin(), parts_.end(), [&](const Part& part) { return part.dtype == dtype; });
  }
  // All of one 16-bit dtype.
  bool is_narrow() const {
    return size_of(parts_[0].dtype) == 2 &&
           std::all_of(parts_.begin(), parts_.end(), [&](const Part& part) { return part.dtype == parts_[0].dtype; });
  }
  bool has_base() const { return parts_[0].base != nullptr; }

  Scope upload(const Device& device) const {
    return {device.upload(parts_),
            device.upload(experts_),
            int(parts_.size()),
            num_tasks_,
            numel_,
            num_chunks_,
            num_slices_};
  }

 private:
  static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

  int num_tasks_;
  std::vector<Part> parts_;
  std::vector<const void*> experts_;
  int64_t numel_ = 0, num_chunks_ = 0, num_slices_ = 0;
};

}  // namespace cuda
}  // namespace sk
