#include "register.h"

SK_REGISTER_CUDA_OPS(surgery_kernels_cuda, CUDA)
