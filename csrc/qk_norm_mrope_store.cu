#include "keye/qk_norm_mrope_store.cuh"

#include <algorithm>

#include "keye/launch.cuh"

namespace keye {
namespace {

template <class T, int kHeadDim>
void launch_store(QkNormMropeStoreParams& params, int num_sms, bool overlap, void* stream) {
    using Tile = StoreTile<kHeadDim>;
    // With few tokens, up to 16 warps per multiprocessor share them: a short chain of instructions
    // is what counts then. With more, each token has one warp, which computes its angles once.
    const int num_rows = params.num_heads + 2 * params.num_kv_heads;
    const int groups = (num_rows + Tile::kHeads - 1) / Tile::kHeads;
    params.num_splits = std::clamp(16 * num_sms / params.num_tokens, 1, groups);
    const int64_t warps = static_cast<int64_t>(params.num_tokens) * params.num_splits;
    const auto num_blocks = static_cast<unsigned>((warps + Tile::kWarps - 1) / Tile::kWarps);
    launch<qk_norm_mrope_store_kernel<T, kHeadDim>>(
        "qk_norm_mrope_store", {num_blocks, Tile::kThreads, 0}, overlap, stream, params);
}

}  // namespace

void qk_norm_mrope_store(int dtype, int head_dim, QkNormMropeStoreParams params, int num_sms,
                         bool overlap, void* stream) {
    with_dtype(dtype, [&](auto zero) {
        StoreHeadDims::with("qk_norm_mrope_store", head_dim, [&](auto size) {
            launch_store<decltype(zero), decltype(size)::value>(params, num_sms, overlap, stream);
        });
    });
}

}  // namespace keye
