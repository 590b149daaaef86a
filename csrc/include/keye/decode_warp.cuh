// Sizes of a block of paged_decode_attention, and one warp's softmax over its chunks of keys.
#pragma once

#include "keye/paged_decode_attention.h"
#include "keye/types.cuh"

namespace keye {

template <class T, int kHeadDim>
struct DecodeTile {
    static constexpr int kChunk = 16;  // keys
    static constexpr int kRows = 16;   // query heads; rows past the group are zeros
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kStages = 2;
    // Two blocks have 70 KB in flight, more than a multiprocessor of an H200 needs to read at full
    // rate. With head_dim 128 three blocks would need 8 more registers.
    static constexpr int kBlocksPerSm = kHeadDim <= 80 ? 3 : 2;
    static constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row
    // An odd number of pieces, so that a piece from each of 8 rows covers all 32 banks.
    static constexpr int kStride = (kPieces | 1) * 8;
    static constexpr int kTileElements = kChunk * kStride;
    static constexpr int kWarpElements = kStages * 2 * kTileElements;  // keys and values
    // A warp's sums reuse the memory of its pipeline; their rows start 8 banks apart.
    static constexpr int kSumStride = kHeadDim + 8;
    static_assert(kRows * kSumStride * sizeof(float) <= kWarpElements * sizeof(T));
    // Shared memory: q, the pipelines, the warps' maxima and weights, a ticket.
    static constexpr int kQBytes = kRows * kStride * sizeof(T);
    static constexpr int kPipelineBytes = kWarps * kWarpElements * sizeof(T);
    static constexpr int kStatsBytes = kWarps * kRows * sizeof(float2);
    static constexpr int kSharedBytes = kQBytes + kPipelineBytes + kStatsBytes + 16;
    static_assert(kMaxSplits * kRows * sizeof(float) <= kPipelineBytes);
    static_assert(kSharedBytes <= kMaxSharedBytes);
};

// One warp's softmax over its chunks, in matrix fragments: a lane has rows lane / 4 and 8 below.
template <class T, int kHeadDim>
struct DecodeWarp {
    using Tile = DecodeTile<T, kHeadDim>;
    static constexpr int kSteps = kHeadDim / 16;
    static constexpr bool kHalfStep = kHeadDim % 16 != 0;

    uint32_t q[kSteps][4];
    uint32_t q_half[2];
    float sums[kHeadDim / 8][4];
    float peak[2];    // largest score so far
    float weight[2];  // this lane's part of the sum of exp2(score - peak)

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
            sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
        }
        peak[0] = peak[1] = -INFINITY;
        weight[0] = weight[1] = 0.0f;
    }

    __device__ __forceinline__ void load_q(const T* tile, int lane) {
        const T* row = tile + lane % 16 * Tile::kStride;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            load_matrices<false>(q[step], row + step * 16 + lane / 16 * 8);
        }
        if constexpr (kHalfStep) {
            load_matrices<false>(q_half, row + kSteps * 16);
        }
    }

    // Add a chunk of keys, of which the first `visible` (1 or more) count. Scores are in base 2.
    __device__ __forceinline__ void add_chunk(const T* k, const T* v, int visible, float scale,
                                              int lane) {
        float scores[2][4] = {};
        const T* k_row = k + (lane / 16 * 8 + lane % 8) * Tile::kStride;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t b[4];
            load_matrices<false>(b, k_row + step * 16 + lane / 8 % 2 * 8);
            multiply_add<T>(scores[0], q[step], {b[0], b[1]});
            multiply_add<T>(scores[1], q[step], {b[2], b[3]});
        }
        if constexpr (kHalfStep) {
            uint32_t b[2];
            load_matrices<false>(b, k + lane % 16 * Tile::kStride + kSteps * 16);
            multiply_add<T>(scores[0], q_half, b[0]);
            multiply_add<T>(scores[1], q_half, b[1]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int key = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            float& score = scores[i / 4][i % 4];
            score = key < visible ? score * scale : -INFINITY;
        }
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float above = peak[half];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                above = fmaxf(above, scores[i / 2][half * 2 + i % 2]);
            }
            above = fmaxf(above, __shfl_xor_sync(~0u, above, 1));
            above = fmaxf(above, __shfl_xor_sync(~0u, above, 2));
            shrink[half] = exp2_fast(peak[half] - above);
            peak[half] = above;
            weight[half] *= shrink[half];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = scores[i / 2][half * 2 + i % 2];
                score = exp2_fast(score - above);
                weight[half] += score;
            }
        }
        const uint32_t p[4] = {
            pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
            pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
        const T* v_row = v + lane % 16 * Tile::kStride;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
            sums[i][0] *= shrink[0];
            sums[i][1] *= shrink[0];
            sums[i][2] *= shrink[1];
            sums[i][3] *= shrink[1];
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t b[4];
            load_matrices<true>(b, v_row + step * 16 + lane / 16 * 8);
            multiply_add<T>(sums[2 * step], p, {b[0], b[1]});
            multiply_add<T>(sums[2 * step + 1], p, {b[2], b[3]});
        }
        if constexpr (kHalfStep) {
            uint32_t b[2];
            load_matrices<true>(b, v_row + kSteps * 16);
            multiply_add<T>(sums[2 * kSteps], p, b);
        }
    }

    // sums_out: [16, kSumStride], stats_out: [16] of (peak, weight).
    __device__ __forceinline__ void store(float* sums_out, float2* stats_out, int lane) {
        const int row = lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            weight[half] += __shfl_xor_sync(~0u, weight[half], 1);
            weight[half] += __shfl_xor_sync(~0u, weight[half], 2);
            if (lane % 4 == 0) {
                stats_out[row + half * 8] = make_float2(peak[half], weight[half]);
            }
            float* at = sums_out + (row + half * 8) * Tile::kSumStride + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < kHeadDim / 8; ++i) {
                *reinterpret_cast<float2*>(at + i * 8) =
                    make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
            }
        }
    }
};

}  // namespace keye
