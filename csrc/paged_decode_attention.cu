#include "keye/paged_decode_attention.cuh"

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

}  // namespace

void paged_decode_attention(int dtype, int head_dim, const PagedDecodeAttentionParams& params,
                            bool overlap, void* stream) {
    with_dtype(dtype, [&](auto zero) {
        DecodeHeadDims::with("paged_decode_attention", head_dim, [&](auto size) {
            launch_decode<decltype(zero), decltype(size)::value>(params, overlap, stream);
        });
    });
}

}  // namespace keye
