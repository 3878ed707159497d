// Aligned memory that nobody has filled yet.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace sk {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : at_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), kAlignment))) {}
  T* get() const { return at_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> at_;
};

}  // namespace sk
