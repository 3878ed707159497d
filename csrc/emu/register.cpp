#include "cuda/register.h"

#include "cuda/trim.h"
#include "machine.h"

SK_REGISTER_CUDA_OPS(surgery_kernels_emulated, CPU)

#define SK_EXPORT extern "C" __attribute__((visibility("default")))
SK_EXPORT void sk_shuffle_threads(unsigned seed) { sk::emu::shuffle_threads(seed); }
SK_EXPORT void sk_force_descent(bool on) { sk::cuda::force_descent(on); }
