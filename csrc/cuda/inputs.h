// The tensors of a call on one CUDA device, checked, contiguous and alive, as the list the kernels' scope is made of.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "current.h"
#include "trim.h"

namespace sk {
namespace cuda {

// base: one tensor per merged tensor, or none. experts: all experts of the first tensor, then of the second, ...
// out: one per merged tensor, or none; what is not contiguous is filled through a copy. stacked: [num_tasks, *shape].
class Inputs {
 public:
  Inputs(const std::vector<Tensor>& base, const std::vector<Tensor>& experts, size_t num_tasks,
         const std::vector<Tensor>& out, bool stacked = false);

  const Device& device() const { return current_.device(); }
  const ScopeBuilder& tensors() const { return tensors_; }
  const Scope& scope() const { return scope_; }
  void deliver();

  // Puts `nonfinite` on the device into `found`, int64 [1], where the caller looks later. Without that, or with outputs
  // to deliver, the host waits for the device: raises unless it is 0, naming the first tensor with NaN or infinity.
  void check_finite(const int* nonfinite, const std::vector<std::string>& names,
                    const std::optional<Tensor>& found) const;
  // It cannot wait for a graph that is being captured.
  void check_may_raise() const;

 private:
  const void* pointer(const Tensor& t);

  Current current_;
  ScopeBuilder tensors_;
  std::vector<Tensor> alive_, wanted_, filled_;
  Scope scope_;
};

}  // namespace cuda
}  // namespace sk
