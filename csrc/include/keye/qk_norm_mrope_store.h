// Launch of QK-norm, 3D rotary embedding and paged cache write in one pass.
#pragma once

#include <cstdint>

#include "keye/shapes.h"

namespace keye {

// T is bf16 or fp16. Strides count elements. Addresses, and strides in bytes, are multiples of 16.
struct QkNormMropeStoreParams {
    const void* qkv;           // [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] T
    const void* q_weight;      // [head_dim] T
    const void* k_weight;      // [head_dim] T
    const int64_t* positions;  // [3, num_tokens], stride_axis from axis to axis
    const float* frequencies;  // [head_dim / 2]
    void* k_cache;             // [num_pages, page_size, num_kv_heads, head_dim] T
    void* v_cache;             // like k_cache
    const int64_t* slots;      // [num_tokens], negative: not stored
    void* out;                 // [num_tokens, num_heads, head_dim] T
    int64_t stride_qkv, stride_axis;
    CacheStrides k_strides, v_strides;
    HeadStrides out_strides;
    int num_tokens, num_heads, num_kv_heads;
    int page_size;
    int section_t, section_h;  // pairs rotated by t and by h; w rotates the rest
    int num_splits;            // warps that share a token; set by the launcher
    float eps;
};

using StoreHeadDims = HeadDims<64, 80, 128>;

// `num_sms` of the device; `overlap`: see launch.cuh. Throws std::runtime_error if the launch
// fails.
void qk_norm_mrope_store(int dtype, int head_dim, QkNormMropeStoreParams params, int num_sms,
                         bool overlap, void* stream);

}  // namespace keye
