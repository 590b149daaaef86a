// QK-norm, 3D rotary embedding and paged cache write: every byte is read once and written once.
//
// A lane holds 8 channels of the first half of a head and their partners in the second half. So it
// accesses 16 bytes at a time and rotates by itself; the norm is a sum over the few lanes of a
// head. A warp takes several heads of one token at a time, then the next ones with the same angles.
// With few tokens, several warps share a token.
#pragma once

#include "keye/qk_norm_mrope_store.h"
#include "keye/rotation.cuh"
#include "keye/types.cuh"

namespace keye {

template <int kHeadDim>
struct StoreTile {
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 512);
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kUsedLanes = kHeadDim / 16;  // lanes per head that hold channels
    static constexpr int kLanes = kUsedLanes <= 1   ? 1
                                  : kUsedLanes <= 2 ? 2
                                  : kUsedLanes <= 4 ? 4
                                  : kUsedLanes <= 8 ? 8
                                                    : 16;
    static constexpr int kHeads = kWarpSize / kLanes;  // heads that a warp takes at a time
    static constexpr int kBatch = 4;                   // times kHeads: heads loaded at once
};

// 8 pairs of channels of a head, packed as in memory.
struct Pairs {
    uint4 low, high;
};

template <int kHeadDim, class T>
__device__ __forceinline__ Pairs load_pairs(const T* head) {
    return {load_16(head), load_16(head + kHeadDim / 2)};
}

template <int kHeadDim, class T>
__device__ __forceinline__ void store_pairs(T* head, const Pairs& pairs) {
    store_16(head, pairs.low);
    store_16(head + kHeadDim / 2, pairs.high);
}

// Word by word: `?:` on a struct selects between addresses, which puts both structs on the stack.
__device__ __forceinline__ uint4 select(bool first, const uint4& a, const uint4& b) {
    return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}
__device__ __forceinline__ Pairs select(bool first, const Pairs& a, const Pairs& b) {
    return {select(first, a.low, b.low), select(first, a.high, b.high)};
}

// RMSNorm, rounded twice, then the rotation, rounded once. Lanes without channels hold zeros.
template <int kHeadDim, class T>
__device__ __forceinline__ Pairs normalise_and_turn(const Pairs& pairs, const Pairs& weight,
                                                    const float2 (&turns)[8], float eps) {
    float low[8], high[8], squares = 0.0f;
    unpack_8<T>(low, pairs.low);
    unpack_8<T>(high, pairs.high);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        squares += low[i] * low[i] + high[i] * high[i];
    }
#pragma unroll
    for (int bits = StoreTile<kHeadDim>::kLanes / 2; bits > 0; bits /= 2) {
        squares += __shfl_xor_sync(~0u, squares, bits);
    }
    const float scale = __frsqrt_rn(squares / kHeadDim + eps);
    float weight_low[8], weight_high[8];
    unpack_8<T>(weight_low, weight.low);
    unpack_8<T>(weight_high, weight.high);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float x = rounded<T>(rounded<T>(low[i] * scale) * weight_low[i]);
        const float y = rounded<T>(rounded<T>(high[i] * scale) * weight_high[i]);
        // Without fused multiply-add: the definition rounds each product and sum.
        const float cos = turns[i].x, sin = turns[i].y;
        low[i] = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
        high[i] = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
    }
    return {pack_8<T>(low), pack_8<T>(high)};
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(StoreTile<kHeadDim>::kThreads)
    qk_norm_mrope_store_kernel(const __grid_constant__ QkNormMropeStoreParams params) {
    using Tile = StoreTile<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * Tile::kWarps + warp;
    const int64_t token = item / params.num_splits;
    const int split = static_cast<int>(item % params.num_splits);
    if (token >= params.num_tokens) {
        return;
    }
    const int head_in_warp = lane / Tile::kLanes, first_pair = lane % Tile::kLanes * 8;
    const bool used = lane % Tile::kLanes < Tile::kUsedLanes;
    const int first_k = params.num_heads, first_v = first_k + params.num_kv_heads;
    const int num_rows = first_v + params.num_kv_heads;

    wait_for_previous_kernel();
    let_next_kernel_start();

    const T* qkv = static_cast<const T*>(params.qkv) + token * params.stride_qkv + first_pair;
    const int step = params.num_splits * Tile::kHeads;  // heads from one iteration to the next
    const int first = split * Tile::kHeads + head_in_warp;
    Pairs q_weight{}, k_weight{};
    if (used) {
        q_weight = load_pairs<kHeadDim>(static_cast<const T*>(params.q_weight) + first_pair);
        k_weight = load_pairs<kHeadDim>(static_cast<const T*>(params.k_weight) + first_pair);
    }
    const int64_t slot = params.slots[token];
    const float t = static_cast<float>(params.positions[token]);
    const float h = static_cast<float>(params.positions[token + params.stride_axis]);
    const float w = static_cast<float>(params.positions[token + 2 * params.stride_axis]);
    float2 turns[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int pair = first_pair + i;
        const float position = pair < params.section_t                      ? t
                               : pair < params.section_t + params.section_h ? h
                                                                            : w;
        turns[i] = cos_sin(__fmul_rn(position, used ? params.frequencies[pair] : 0.0f));
    }
    const int64_t page = slot / params.page_size, row = slot % params.page_size;
    T* out = static_cast<T*>(params.out) + token * params.out_strides.token + first_pair;
    T* k_row = static_cast<T*>(params.k_cache) + page * params.k_strides.page +
               row * params.k_strides.row + first_pair;
    T* v_row = static_cast<T*>(params.v_cache) + page * params.v_strides.page +
               row * params.v_strides.row + first_pair;

    // Lanes past the last head stay in the loop: the shuffles need all lanes of the warp.
    for (int start = first; start - head_in_warp < num_rows; start += Tile::kBatch * step) {
        Pairs pairs[Tile::kBatch];
#pragma unroll
        for (int i = 0; i < Tile::kBatch; ++i) {
            const int head = start + i * step;
            pairs[i] =
                used && head < num_rows ? load_pairs<kHeadDim>(qkv + head * kHeadDim) : Pairs{};
        }
#pragma unroll
        for (int i = 0; i < Tile::kBatch; ++i) {
            const int head = start + i * step;
            // The same for the whole warp. A warp with v heads only needs no norm.
            if (head - head_in_warp < first_v) {
                const Pairs turned = normalise_and_turn<kHeadDim, T>(
                    pairs[i], select(head < first_k, q_weight, k_weight), turns, params.eps);
                pairs[i] = select(head < first_v, turned, pairs[i]);
            }
            if (used && head < first_k) {
                store_pairs<kHeadDim>(out + head * params.out_strides.head, pairs[i]);
            } else if (used && slot >= 0 && head < first_v) {
                store_pairs<kHeadDim>(k_row + (head - first_k) * params.k_strides.head, pairs[i]);
            } else if (used && slot >= 0 && head < num_rows) {
                store_pairs<kHeadDim>(v_row + (head - first_v) * params.v_strides.head, pairs[i]);
            }
        }
    }
}

}  // namespace keye
