// Layer norm of rows that a cluster shares, backward: the kernel of layer_norm_backward.cuh that layer_norm_backward.cu
// launches on Hopper.
#include "layer_norm_backward.cuh"
#include "rows_hopper.cuh"

namespace fastformer::cuda {

template <typename T, typename W, int kPack>
void launch_backward_clusters(const NormBackward<T, W>& args, const Parts& parts, const OnDevice& device) {
  launch_clusters(layer_norm_backward_looped<T, W, kPack, kCluster>, parts.blocks,
                  grid_of(args.row_count * parts.blocks), dim3(kLargeBlock),
                  kClusterSharedBytes + 2 * parts.kept * sizeof(T), device.stream, args, parts);
}

#define FASTFORMER_NORM(T, W, pack) \
  template void launch_backward_clusters<T, W, pack>(const NormBackward<T, W>&, const Parts&, const OnDevice&);
FASTFORMER_FOR_NORMS(FASTFORMER_NORM)

}  // namespace fastformer::cuda
