// Layer norm of rows that a cluster shares, forward: the kernel of layer_norm_forward.cuh that layer_norm.cu launches
// on Hopper.
#include "layer_norm_forward.cuh"
#include "rows_hopper.cuh"

namespace fastformer::cuda {

template <typename T, typename W, int kPack>
void launch_forward_clusters(const NormForward<T, W>& args, const Parts& parts, const OnDevice& device) {
  launch_clusters(layer_norm_forward_looped<T, W, kPack, kCluster>, parts.blocks,
                  grid_of(args.row_count * parts.blocks), dim3(kLargeBlock),
                  kClusterSharedBytes + parts.kept * sizeof(T), device.stream, args, parts);
}

#define FASTFORMER_NORM(T, W, pack) \
  template void launch_forward_clusters<T, W, pack>(const NormForward<T, W>&, const Parts&, const OnDevice&);
FASTFORMER_FOR_NORMS(FASTFORMER_NORM)

}  // namespace fastformer::cuda
