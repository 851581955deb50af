// What the kernels need of CUDA beyond the language itself: number types, a shuffle, checked
// launches. The tests replace this file by a host version and run the same kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pemt {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float real(bf16 value) { return __bfloat162float(value); }
__device__ inline float real(f16 value) { return __half2float(value); }
__device__ inline float real(float value) { return value; }
__device__ inline double real(double value) { return value; }

template <class T>
__device__ inline T rounded(float value) {
  return T(value);
}
template <>
__device__ inline bf16 rounded<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline f16 rounded<f16>(float value) {
  return __float2half_rn(value);
}
template <class T>
__device__ inline T rounded(double value) {
  return T(value);
}

template <class R>
__device__ inline R shuffle_xor(R value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream,
    const Arguments&... arguments) {
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(
        std::string("pemt: a kernel did not start: ") + cudaGetErrorString(error));
}

}  // namespace pemt
