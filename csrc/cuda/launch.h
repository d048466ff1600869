// The one way a kernel is started.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "device.cuh"

namespace fastformer::cuda {

// So many blocks along x.
inline dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "CUDA: ", blocks, " blocks are more than a grid can have");
  return dim3(static_cast<unsigned>(blocks));
}

// Starts `kernel` on `stream`, with `shared_bytes` of dynamic shared memory, and raises if it can't be started. Nothing
// waits for it. Of the grid, `cluster` neighbours along x (1 to 8, which it is a multiple of) are a cluster.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef FASTFORMER_SIMT
  static_cast<void>(stream);
  simt::launch(kernel, cluster, grid, block, shared_bytes, static_cast<Parameters>(arguments)...);
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking) {
    // All that the device has, each time: another thread may be about to launch the same kernel with more than this.
    int device = 0, limit = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute of_cluster{};
    of_cluster.id = cudaLaunchAttributeClusterDimension;
    of_cluster.val.clusterDim.x = cluster;
    of_cluster.val.clusterDim.y = of_cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &of_cluster;
    config.numAttrs = cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error), " (grid ", grid.x, " x ", grid.y, " x ",
                  grid.z, ", block ", block.x, ", cluster ", cluster, ", shared memory ", shared_bytes, ")");
#endif
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  launch_clusters(kernel, 1, grid, block, shared_bytes, stream, static_cast<Arguments&&>(arguments)...);
}

}  // namespace fastformer::cuda
