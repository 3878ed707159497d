#include "current.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

// Only torch built with CUDA has it: weak, so that the library loads on every torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace sk {
namespace cuda {

Current::Current(const Tensor& like) {
  require(like.is_cuda() && aoti_torch_get_current_cuda_stream != nullptr,
          "experts must be on a CUDA device of a torch built with CUDA, got another");
  const int32_t index = like.get_device_index();
  guard_ = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "CUDA must have a current stream, got none");
  device_.stream = static_cast<cudaStream_t>(stream);
  check(cudaDeviceGetAttribute(&device_.processors, cudaDevAttrMultiProcessorCount, index));
  device_.allocate = [this, like](int64_t bytes) {
    alive_.push_back(torch::stable::new_empty(like, std::vector<int64_t>{bytes}, ScalarType::Byte));
    return alive_.back().data_ptr();
  };
}

}  // namespace cuda
}  // namespace sk
