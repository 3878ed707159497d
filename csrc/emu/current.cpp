#include "cuda/current.h"

#include <torch/csrc/stable/ops.h>

namespace sk {
namespace cuda {

// So few that blocks of every test go through several chunks.
constexpr int kProcessors = 1;

Current::Current(const Tensor& like) {
  require(like.is_cpu(), "experts must be on the CPU under the emulator, got another device");
  device_.stream = nullptr;
  device_.processors = kProcessors;
  device_.allocate = [this, like](int64_t bytes) {
    alive_.push_back(torch::stable::new_empty(like, std::vector<int64_t>{bytes}, ScalarType::Byte));
    return alive_.back().data_ptr();
  };
}

}  // namespace cuda
}  // namespace sk
