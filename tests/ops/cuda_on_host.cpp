// The CUDA kernels as host code: the same source, over cuda_emulation.h.
#define PEMT_EMULATE_CUDA
#include "cuda_mixture.cu"
#include "cuda_sparsity.cu"
