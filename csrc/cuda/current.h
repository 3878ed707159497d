// The device, stream and memory that torch would use now for a tensor.
#pragma once
#include <memory>
#include <vector>

#include "../check.h"
#include "scope.h"

namespace sk {
namespace cuda {

// Allocations live as long as this; the caching allocator hands their memory to later work of the same stream only.
class Current {
 public:
  explicit Current(const Tensor& like);
  Current(const Current&) = delete;
  const Device& device() const { return device_; }

 private:
  std::shared_ptr<void> guard_;
  std::vector<Tensor> alive_;
  Device device_;
};

}  // namespace cuda
}  // namespace sk
