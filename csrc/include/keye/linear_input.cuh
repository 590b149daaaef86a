// Sizes of a block of linear, and how it loads x into shared memory, with the norm if there is one.
#pragma once

#include "keye/linear.h"
#include "keye/types.cuh"

namespace keye {

// kTiles: number of MMA tiles of 8 rows of x.
template <int kTiles>
struct LinearTile {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kBlocksPerSm = 3;
    static constexpr int kColumns = 64;              // of the matrix, per warp and step
    static constexpr int kStep = kWarps * kColumns;  // columns per block and step
    static constexpr int kHalf = 32;                 // rows of the matrix in a stage
    static constexpr int kRows = 2 * kHalf;
    static constexpr int kStages = 3;  // two of them, 8 KB per warp, in flight
    static constexpr int kStageElements = kHalf * kColumns;
    static constexpr int kWarpElements = kStages * kStageElements;
    static constexpr int kWarpFloats = kWarpElements / 2;
    static constexpr int kPrefetched = 512;  // columns prefetched before the previous kernel ends
    // x, in two buffers of kChunk columns. Rows are padded by 64 bytes, so that 8 lanes read from
    // different banks.
    static constexpr int kXRows = 8 * kTiles;
    static constexpr int kChunk = 512 / kTiles;
    static constexpr int kStepsPerChunk = kChunk / kStep;
    static constexpr int kXStride = kChunk + 32;
    static constexpr int kXElements = kXRows * kXStride;
    static constexpr int kPieces = kChunk / 8;              // 16-byte pieces of a row
    static constexpr int kRowsAtOnce = kThreads / kPieces;  // rows of x the block loads at once
    static constexpr int kTurns = kXRows / kRowsAtOnce;
    // A warp's sums reuse the memory of its pipeline, [kXRows, kRows of the matrix].
    static constexpr int kSumStride = kRows + 4;
    static constexpr int kPipelineBytes = kWarps * kWarpElements * 2;
    static constexpr int kXBytes = 2 * kXElements * 2;
    static constexpr int kSharedBytes = kPipelineBytes + kXBytes + kXRows * sizeof(float) + 16;
    static_assert(kXRows * kSumStride * sizeof(float) <= kWarpElements * 2);
};

// A thread's share of each chunk of x: a 16-byte piece in each of kTurns rows; zeros past the end.
template <class T, int kTiles>
struct LinearInput {
    using Tile = LinearTile<kTiles>;
    uint4 x[Tile::kTurns], weight;
    float scale[Tile::kTurns];

    __device__ __forceinline__ void load(const LinearParams& params, int first_column) {
        const int row = threadIdx.x / Tile::kPieces;
        const int column = first_column + threadIdx.x % Tile::kPieces * 8;
        const T* at = static_cast<const T*>(params.x) + row * params.stride_x + column;
#pragma unroll
        for (int i = 0; i < Tile::kTurns; ++i) {
            const bool valid =
                column < params.in_features && row + i * Tile::kRowsAtOnce < params.num_rows;
            x[i] = valid ? load_16(at) : make_uint4(0, 0, 0, 0);
            at += Tile::kRowsAtOnce * params.stride_x;
        }
        weight = make_uint4(0, 0, 0, 0);  // past the end: 0 times an old value may be NaN
        if (params.norm_weight != nullptr && column < params.in_features) {
            weight = load_16(static_cast<const T*>(params.norm_weight) + column);
        }
    }

    __device__ __forceinline__ void store(const LinearParams& params, T* tile) {
        const int row = threadIdx.x / Tile::kPieces, piece = threadIdx.x % Tile::kPieces;
#pragma unroll
        for (int i = 0; i < Tile::kTurns; ++i) {
            uint4 value = x[i];
            if (params.norm_weight != nullptr && row + i * Tile::kRowsAtOnce < params.num_rows) {
                float y[8], factor[8];
                unpack_8<T>(y, value);
                unpack_8<T>(factor, weight);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    y[j] = rounded<T>(y[j] * scale[i]) * factor[j];
                }
                value = pack_8<T>(y);
            }
            store_16(tile + (row + i * Tile::kRowsAtOnce) * Tile::kXStride + piece * 8, value);
        }
    }
};

// 1 / RMS of each row of x; a warp computes each row.
template <class T, int kTiles>
__device__ __forceinline__ void row_scales(const LinearParams& params, float* scales) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int row = warp; row < params.num_rows; row += LinearTile<kTiles>::kWarps) {
        const T* x = static_cast<const T*>(params.x) + row * params.stride_x;
        float squares = 0.0f;
#pragma unroll 8
        for (int column = lane * 8; column < params.in_features; column += kWarpSize * 8) {
            float values[8];
            unpack_8<T>(values, load_16(x + column));
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                squares += values[i] * values[i];
            }
        }
#pragma unroll
        for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
            squares += __shfl_xor_sync(~0u, squares, bits);
        }
        if (lane == 0) {
            scales[row] =
                __frsqrt_rn(squares / static_cast<float>(params.in_features) + params.eps);
        }
    }
}

}  // namespace keye
