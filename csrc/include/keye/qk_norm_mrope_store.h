// QK-norm, 3D rotary embedding and paged cache write in one pass: what a launch is given.
#pragma once

#include <cstdint>

namespace keye {

// T is bf16 or fp16. Strides count elements, and like all addresses they divide by 16 bytes.
struct QkNormMropeStoreParams {
    const void* qkv;           // [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] T
    const void* q_weight;      // [head_dim] T
    const void* k_weight;      // [head_dim] T
    const int64_t* positions;  // [3, num_tokens], axes apart by stride_axis
    const float* frequencies;  // [head_dim / 2]
    void* k_cache;             // [num_pages, page_size, num_kv_heads, head_dim] T
    void* v_cache;             // like k_cache
    const int64_t* slots;      // [num_tokens], negative: not stored
    void* out;                 // [num_tokens, num_heads, head_dim] T
    int64_t stride_qkv, stride_axis;
    int64_t stride_k_page, stride_k_row, stride_k_head;
    int64_t stride_v_page, stride_v_row, stride_v_head;
    int64_t stride_out, stride_out_head;
    int num_tokens, num_heads, num_kv_heads;
    int page_size;
    int section_t, section_h;  // pairs turned by t and by h, the rest by w
    int num_splits;            // warps that share a token; set by the launcher
    float eps;
};

// `num_sms` of the device; `overlap`: see launch.cuh. Throws std::runtime_error if the launch
// fails.
void qk_norm_mrope_store(int dtype, int head_dim, QkNormMropeStoreParams params, int num_sms,
                         bool overlap, void* stream);

}  // namespace keye
