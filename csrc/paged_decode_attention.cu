#include "keye/paged_decode_attention.cuh"

#include <stdexcept>
#include <string>

#include "keye/launch.cuh"

namespace keye {
namespace {

template <class T, int kHeadDim>
void launch_decode(const PagedDecodeAttentionParams& params, bool overlap, void* stream) {
    using Tile = DecodeTile<T, kHeadDim>;
    const int head_blocks = (params.group + Tile::kRows - 1) / Tile::kRows;
    const unsigned num_blocks =
        static_cast<unsigned>(params.batch_size * params.num_kv_heads * head_blocks) *
        params.num_splits;
    launch<paged_decode_attention_kernel<T, kHeadDim>>(
        "paged_decode_attention", {num_blocks, Tile::kThreads, Tile::kSharedBytes}, overlap, stream,
        params);
}

template <class T>
void launch_by_head_dim(int head_dim, const PagedDecodeAttentionParams& params, bool overlap,
                        void* stream) {
    switch (head_dim) {
        case 64: return launch_decode<T, 64>(params, overlap, stream);
        case 72: return launch_decode<T, 72>(params, overlap, stream);
        case 80: return launch_decode<T, 80>(params, overlap, stream);
        case 128: return launch_decode<T, 128>(params, overlap, stream);
    }
    throw std::runtime_error("paged_decode_attention: no kernel for head_dim " +
                             std::to_string(head_dim));
}

}  // namespace

void paged_decode_attention(int dtype, int head_dim, const PagedDecodeAttentionParams& params,
                            bool overlap, void* stream) {
    if (static_cast<Dtype>(dtype) == Dtype::kBf16) {
        launch_by_head_dim<bf16>(head_dim, params, overlap, stream);
    } else {
        launch_by_head_dim<fp16>(head_dim, params, overlap, stream);
    }
}

}  // namespace keye
