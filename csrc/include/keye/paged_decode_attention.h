// Launch of attention of one new token per sequence over a paged key/value cache.
#pragma once

#include <cstdint>

#include "keye/shapes.h"

namespace keye {

// T is bf16 or fp16. Strides count elements. Addresses, and strides in bytes, are multiples of 16.
struct PagedDecodeAttentionParams {
    const void* q;             // [batch_size, num_kv_heads * group, head_dim] T
    const void* k_cache;       // [num_pages, page_size, num_kv_heads, head_dim] T
    const void* v_cache;       // like k_cache
    const int* block_table;    // [batch_size, max_pages]
    const int* cache_seqlens;  // [batch_size]
    void* out;                 // like q
    float* lse;                // [num_kv_heads * group, batch_size], natural logarithm; or null
    float* partial_out;        // [blocks of heads, num_splits, 16, head_dim]; unused with one split
    float* partial_lse;        // [blocks of heads, num_splits, 16], base 2
    unsigned* counters;        // [blocks of heads], 0 before and after; unused with one split
    HeadStrides q_strides;
    CacheStrides k_strides, v_strides;
    int64_t stride_table;
    HeadStrides out_strides;
    int64_t stride_lse;
    int batch_size, num_kv_heads, group;
    int page_size;  // a multiple of 16
    int max_seqlen_k;
    int num_splits;
    float scale;  // softmax_scale * log2(e)
};

using DecodeHeadDims = HeadDims<64, 72, 80, 128>;
constexpr int kMaxSplits = 128;

// `overlap`: see launch.cuh. Throws std::runtime_error if the launch fails.
void paged_decode_attention(int dtype, int head_dim, const PagedDecodeAttentionParams& params,
                            bool overlap, void* stream);

}  // namespace keye
