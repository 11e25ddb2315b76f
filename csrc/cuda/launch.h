// How kernels are started. nvcc gives the real launch with its check; with SODFAST_CUDA_ON_HOST a header of the tests
// runs the same kernel bodies on the host, block after block. All grids and blocks are one-dimensional.
#pragma once

#ifdef SODFAST_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace sodfast::cuda {

#if defined(SODFAST_CUDA_ON_HOST) || defined(__CUDACC__)  // the bindings know the runtime's types, and start nothing
// Starts `blocks` blocks of `threads` threads; none is no launch. Parameters travel by value (32 KB at most).
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, [[maybe_unused]] cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
#ifdef SODFAST_CUDA_ON_HOST
  on_host::run_grid(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), arguments...);
  return cudaSuccess;
#else
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(arguments...);
  return cudaGetLastError();
#endif
}
#endif

}  // namespace sodfast::cuda
