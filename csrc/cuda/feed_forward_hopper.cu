// The feed-forward layer's products on Hopper: the kernels of gemm_hopper.cuh that feed_forward_fused.cu launches.
#include "feed_forward_epilogues.cuh"
#include "gemm_hopper.cuh"

namespace fastformer::cuda {

#define FASTFORMER_PRODUCT(T, rows_of_a, rows_of_b, ...)                                      \
  template void launch_gemm_hopper<T, TileRows::rows_of_a, TileRows::rows_of_b, __VA_ARGS__>( \
      const HopperGemmOperands<T>&, const HopperGemmShape&, const GemmResults&, const __VA_ARGS__&, const OnDevice&);
#define FASTFORMER_PRODUCTS(T)                            \
  FASTFORMER_PRODUCT(T, outer, outer, Activate<T, false>) \
  FASTFORMER_PRODUCT(T, outer, outer, Activate<T, true>)  \
  FASTFORMER_PRODUCT(T, outer, outer, Store<T>)           \
  FASTFORMER_PRODUCT(T, outer, depth, Derive<T, false>)   \
  FASTFORMER_PRODUCT(T, outer, depth, Derive<T, true>)    \
  FASTFORMER_PRODUCT(T, outer, depth, Store<T>)           \
  FASTFORMER_PRODUCT(T, depth, depth, Store<T>)

FASTFORMER_PRODUCTS(BFloat16)
FASTFORMER_PRODUCTS(Half)

}  // namespace fastformer::cuda
