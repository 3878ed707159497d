// CUDA, from its toolkit or, for tests, from the emulator that runs the same kernels on the CPU.
#pragma once
#if defined(SK_EMULATED)
#include "emu/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define SK_DYNAMIC_SHARED(T, name)                   \
  extern __shared__ __align__(16) char name##_raw[]; \
  T* const name = reinterpret_cast<T*>(name##_raw)
#endif
