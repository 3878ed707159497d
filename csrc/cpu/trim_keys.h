// What the passes of a trim read as an expert: its tensors, or keys that a program forms a chunk at a time.
#pragma once
#include <memory>

#include "buffer.h"
#include "scope.h"
#include "trim_kernel.h"

namespace sk {

constexpr int64_t kFormedStride = kChunk + 32;  // keys from one task to the next

// Forms keys, in the compute type; one for every thread.
struct KeyFormer {
  virtual ~KeyFormer() = default;
  virtual void form(const Part& part, int64_t begin, int64_t n, void* keys) = 0;
};

// In place of the experts, whose number is then how many limits there are. Keys are taken by their magnitude and are
// never rounded: Scope::mixed is set.
struct FormedKeys {
  virtual ~FormedKeys() = default;
  virtual std::unique_ptr<KeyFormer> former() const = 0;
  virtual int64_t num_tasks() const { return 1; }  // whose keys are formed together
};

template <class Key>
class KeyReader {
 public:
  explicit KeyReader(const Scope& scope) {
    if (!scope.formed) return;
    former_ = scope.formed->former();
    formed_ = std::make_unique<Buffer<Key>>(scope.formed->num_tasks() * kFormedStride);
  }

  // Elements begin to begin + n of a tensor, at most a chunk.
  void move_to(const Part& part, int64_t begin, int64_t n) {
    part_ = &part, begin_ = begin;
    if (former_) former_->form(part, begin, n, formed_->get());
  }
  const TrimKernel<Key>& kernel() const {
    constexpr Dtype kFormed = sizeof(Key) == 8 ? Dtype::f64 : Dtype::f32;
    return SK_KERNELS(trim_kernels).template get<Key>(former_ ? kFormed : part_->dtype);
  }
  const void* base() const { return former_ ? nullptr : part_->base_at(begin_); }
  const void* expert(int64_t task) const {
    return former_ ? static_cast<const void*>(formed_->get() + task * kFormedStride) : part_->expert_at(task, begin_);
  }

 private:
  std::unique_ptr<KeyFormer> former_;
  std::unique_ptr<Buffer<Key>> formed_;
  const Part* part_ = nullptr;
  int64_t begin_ = 0;
};

}  // namespace sk
