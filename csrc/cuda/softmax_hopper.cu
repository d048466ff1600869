// Softmax of rows that a cluster shares: the kernels of softmax.cuh that softmax.cu launches on Hopper.
#include "rows_hopper.cuh"
#include "softmax.cuh"

namespace fastformer::cuda {

template <typename T, int kPack, bool kMasked>
void launch_forward_clusters(const SoftmaxForward<T>& args, const Parts& parts, const OnDevice& device) {
  launch_clusters(softmax_forward_looped<T, kPack, kMasked, kCluster>, parts.blocks,
                  grid_of(args.row_count * parts.blocks), dim3(kLargeBlock),
                  kClusterSharedBytes + parts.kept * sizeof(T), device.stream, args, parts);
}

template <typename T, int kPack>
void launch_backward_clusters(const SoftmaxBackward<T>& args, const Parts& parts, const OnDevice& device) {
  launch_clusters(softmax_backward_looped<T, kPack, kCluster>, parts.blocks, grid_of(args.row_count * parts.blocks),
                  dim3(kLargeBlock), kClusterSharedBytes + 2 * parts.kept * sizeof(T), device.stream, args, parts);
}

#define FASTFORMER_SOFTMAX(T, pack)                                                                               \
  template void launch_forward_clusters<T, pack, false>(const SoftmaxForward<T>&, const Parts&, const OnDevice&); \
  template void launch_forward_clusters<T, pack, true>(const SoftmaxForward<T>&, const Parts&, const OnDevice&);  \
  template void launch_backward_clusters<T, pack>(const SoftmaxBackward<T>&, const Parts&, const OnDevice&);

FASTFORMER_SOFTMAX(float, 1)
FASTFORMER_SOFTMAX(float, kWidest<float>)
FASTFORMER_SOFTMAX(BFloat16, 1)
FASTFORMER_SOFTMAX(BFloat16, kWidest<BFloat16>)
FASTFORMER_SOFTMAX(Half, 1)
FASTFORMER_SOFTMAX(Half, kWidest<Half>)

}  // namespace fastformer::cuda
