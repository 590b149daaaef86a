#include "keye/qk_norm_mrope_store.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "keye/launch.cuh"

namespace keye {
namespace {

template <class T, int kHeadDim>
void launch_store(QkNormMropeStoreParams& params, int num_sms, bool overlap, void* stream) {
    using Tile = StoreTile<kHeadDim>;
    // Up to 16 warps per multiprocessor share tokens, since a short chain of instructions decides
    // then; beyond that a warp per token computes the angles once.
    const int num_rows = params.num_heads + 2 * params.num_kv_heads;
    const int groups = (num_rows + Tile::kHeads - 1) / Tile::kHeads;
    params.num_splits = std::clamp(16 * num_sms / params.num_tokens, 1, groups);
    const int64_t warps = static_cast<int64_t>(params.num_tokens) * params.num_splits;
    const auto num_blocks = static_cast<unsigned>((warps + Tile::kWarps - 1) / Tile::kWarps);
    launch<qk_norm_mrope_store_kernel<T, kHeadDim>>(
        "qk_norm_mrope_store", {num_blocks, Tile::kThreads, 0}, overlap, stream, params);
}

template <class T>
void launch_by_head_dim(int head_dim, QkNormMropeStoreParams& params, int num_sms, bool overlap,
                        void* stream) {
    switch (head_dim) {
        case 64: return launch_store<T, 64>(params, num_sms, overlap, stream);
        case 80: return launch_store<T, 80>(params, num_sms, overlap, stream);
        case 128: return launch_store<T, 128>(params, num_sms, overlap, stream);
    }
    throw std::runtime_error("qk_norm_mrope_store: no kernel for head_dim " +
                             std::to_string(head_dim));
}

}  // namespace

void qk_norm_mrope_store(int dtype, int head_dim, QkNormMropeStoreParams params, int num_sms,
                         bool overlap, void* stream) {
    if (static_cast<Dtype>(dtype) == Dtype::kBf16) {
        launch_by_head_dim<bf16>(head_dim, params, num_sms, overlap, stream);
    } else {
        launch_by_head_dim<fp16>(head_dim, params, num_sms, overlap, stream);
    }
}

}  // namespace keye
