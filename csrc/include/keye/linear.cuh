// A few rows times a large matrix, bound by reading the matrix once.
//
// A block multiplies 64 rows of the matrix (with swiglu 32 of gate and the same 32 of up) by a run
// of columns. In each step its four warps read 128 bytes of each row each, side by side. The matrix
// is the 16-row operand of the tensor cores, x the 8-column one, taken once or twice: 1 to 8 rows
// of x cost the same. Each warp loads the matrix through a pipeline of its own; the block loads x
// into shared memory, normalised where there is a norm. Then the sums of the warps are added in
// shared memory. If several blocks share the columns, they write their sums to global memory, and
// the last block adds them in a fixed order.
#pragma once

#include "keye/last_block.cuh"
#include "keye/linear_input.cuh"

namespace keye {

// The part of the matrix that a block reads. Half 1 follows half 0; with swiglu half 0 is in gate
// and half 1 in up.
struct LinearPart {
    int64_t first_row[2];
    int num_rows[2];        // rows of each half that exist, up to 32
    int first_step, count;  // steps of kStep columns
};

// Copy a stage: 32 rows, of which `visible` exist, zeros for the others and for columns that do not
// exist. Odd rows have their two halves of 64 bytes swapped, so that the 4 pieces of two rows that
// 8 lanes read at once lie in different banks.
template <int kTiles, class T>
__device__ __forceinline__ void copy_weights(T* stage, const T* at, int64_t stride, int visible,
                                             bool columns_exist, int lane) {
    using Tile = LinearTile<kTiles>;
    const int row = lane / 8, piece = (lane % 8) ^ (row % 2 * 4);
    const T* first = at;
#pragma unroll
    for (int i = 0; i < Tile::kHalf / 4; ++i) {
        const bool valid = columns_exist && row + 4 * i < visible;
        copy_async_16(stage + (row + 4 * i) * Tile::kColumns + piece * 8, valid ? at : first,
                      valid);
        at += 4 * stride;
    }
}

// A dot product may take its columns in any order, the same for both operands. So a lane reads 16
// neighbouring bytes of each operand and uses them as its columns of two MMAs.
template <int kTiles>
struct LinearSums {
    using Tile = LinearTile<kTiles>;
    float sums[4][kTiles][4];  // [tile of 16 rows of the matrix][tile of 8 rows of x]
    uint4 x[kTiles][2];

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < 16 * kTiles; ++i) {
            sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = 0.0f;
        }
    }

    // `tile` begins at the columns of the warp.
    template <class T>
    __device__ __forceinline__ void load_x(const T* tile, int lane) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
            const int row = i / 2 * 8 + lane / 4, column = i % 2 * 32 + lane % 4 * 8;
            x[i / 2][i % 2] = load_16(tile + row * Tile::kXStride + column);
        }
    }

    // Add the products of a stage, which holds rows 32 half to 32 half + 31.
    template <class T>
    __device__ __forceinline__ void add_stage(const T* stage, int half, int lane) {
        const T* from = stage + lane / 4 * Tile::kColumns;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int group = i / 2, rows = i % 2 * 16;
            const int column = ((group * 4 + lane % 4) ^ (lane / 4 % 2 * 4)) * 8;
            const uint4 top = load_16(from + rows * Tile::kColumns + column);
            const uint4 bottom = load_16(from + (rows + 8) * Tile::kColumns + column);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint4 b = x[tile][group];
                float (&d)[4] = sums[half * 2 + i % 2][tile];
                multiply_add<T>(d, {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
                multiply_add<T>(d, {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
            }
        }
    }

    // out: [kXRows, kSumStride].
    __device__ __forceinline__ void store(float* out, int lane) {
#pragma unroll
        for (int i = 0; i < 16 * kTiles; ++i) {
            const int row = i / 4 % kTiles * 8 + lane % 4 * 2 + i % 2;
            const int channel = i / 4 / kTiles * 16 + i / 2 % 2 * 8 + lane / 4;
            out[row * Tile::kSumStride + channel] = sums[i / 4 / kTiles][i / 4 % kTiles][i % 4];
        }
    }
};

__device__ __forceinline__ void clear(float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        y[i] = 0.0f;
    }
}
__device__ __forceinline__ void add(float (&y)[8], const float4& low, const float4& high) {
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        y[i] += x[i];
    }
}

// y + bias, rounded to T.
template <class T>
__device__ __forceinline__ void add_bias(float (&y)[8], const LinearParams& params,
                                         int64_t channel) {
    float bias[8] = {};
    if (params.bias != nullptr) {
        unpack_8<T>(bias, load_16(static_cast<const T*>(params.bias) + channel));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        y[i] = rounded<T>(y[i] + bias[i]);
    }
}

// Finish the product and write it, 8 channels of a row per thread. `sums(y, row, channel)` sets y
// to the sums of 8 channels; `channel` counts within the tile.
template <int kTiles, class T, class Sums>
__device__ __forceinline__ void write_rows(const LinearParams& params, int64_t tile,
                                           const Sums& sums) {
    using Tile = LinearTile<kTiles>;
    const int pieces = (params.swiglu ? Tile::kHalf : Tile::kRows) / 8;
    for (int i = threadIdx.x; i < params.num_rows * pieces; i += Tile::kThreads) {
        const int row = i / pieces, piece = i % pieces;
        const int64_t channel = (tile * pieces + piece) * 8;
        if (channel >= params.width) {
            continue;
        }
        float y[8];
        sums(y, row, piece * 8);
        add_bias<T>(y, params, channel);
        if (params.swiglu) {
            float up[8];
            sums(up, row, Tile::kHalf + piece * 8);
            add_bias<T>(up, params, params.width + channel);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                y[j] = rounded<T>(y[j] / (1.0f + __expf(-y[j]))) * up[j];
            }
        } else if (params.residual != nullptr) {
            float residual[8];
            unpack_8<T>(residual, load_16(static_cast<const T*>(params.residual) +
                                          row * params.stride_residual + channel));
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                y[j] += residual[j];
            }
        }
        store_16(static_cast<T*>(params.out) + row * params.stride_out + channel, pack_8<T>(y));
    }
}

template <int kTiles>
__device__ __forceinline__ LinearPart part_of(const LinearParams& params, int64_t tile, int split) {
    using Tile = LinearTile<kTiles>;
    LinearPart part;
    const int64_t width = params.width;
    const int64_t first = tile * (params.swiglu ? Tile::kHalf : Tile::kRows);
    part.first_row[0] = first;
    part.first_row[1] = params.swiglu ? width + first : first + Tile::kHalf;
    const int64_t end[2] = {width, params.swiglu ? 2 * width : width};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t left = end[half] - part.first_row[half];
        part.num_rows[half] = static_cast<int>(left < Tile::kHalf ? left : Tile::kHalf);
    }
    const int steps = (params.in_features + Tile::kStep - 1) / Tile::kStep;
    const int per_split = steps / params.num_splits, rest = steps % params.num_splits;
    part.first_step = split * per_split + min(split, rest);
    part.count = per_split + (split < rest ? 1 : 0);
    return part;
}

template <class T, int kTiles>
__global__ void __launch_bounds__(LinearTile<kTiles>::kThreads, LinearTile<kTiles>::kBlocksPerSm)
    linear_kernel(const __grid_constant__ LinearParams params) {
    using Tile = LinearTile<kTiles>;
    unsigned char* shared = dynamic_shared();
    T* pipelines = reinterpret_cast<T*>(shared);
    T* x_tiles = reinterpret_cast<T*>(shared + Tile::kPipelineBytes);
    auto* scales = reinterpret_cast<float*>(shared + Tile::kPipelineBytes + Tile::kXBytes);
    auto* ticket = reinterpret_cast<unsigned*>(scales + Tile::kXRows);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t tile = blockIdx.x / params.num_splits;
    const int split = blockIdx.x % params.num_splits;
    const LinearPart part = part_of<kTiles>(params, tile, split);
    const T* weight = static_cast<const T*>(params.weight);

    // Prefetch the first columns to L2 while the previous kernel ends. If that kernel writes the
    // matrix, L2 gets its writes too; a read into registers or shared memory would be stale. A
    // warp's lanes issue their prefetches one after the other, so all warps share them.
    if (lane < Tile::kRows / Tile::kWarps) {
        const int row = warp % 2 * (Tile::kHalf / 2) + lane, half = warp / 2;
        const int first = part.first_step * Tile::kStep;
        const int columns =
            min(min(part.count * Tile::kStep, Tile::kPrefetched), params.in_features - first);
        // Indexing by `half` would put the arrays on the stack.
        const int64_t first_row = half == 0 ? part.first_row[0] : part.first_row[1];
        if (row < (half == 0 ? part.num_rows[0] : part.num_rows[1]) && columns > 0) {
            prefetch_to_l2(weight + (first_row + row) * params.stride_weight + first,
                           columns * sizeof(T));
        }
    }
    wait_for_previous_kernel();
    let_next_kernel_start();

    T* pipeline = pipelines + warp * Tile::kWarpElements;
    const int first_column = part.first_step * Tile::kStep;
    const int lane_column = first_column + warp * Tile::kColumns + lane % 8 * 8;
    const T* lane_rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        lane_rows[half] =
            weight + (part.first_row[half] + lane / 8) * params.stride_weight + lane_column;
    }
    // Unit number `unit` is half unit % 2 of step unit / 2. `slot`: the stage that holds it.
    auto copy_unit = [&](int unit, int half, int slot) {
        const int step = unit / 2;
        if (step < part.count) {
            copy_weights<kTiles>(pipeline + slot * Tile::kStageElements,
                                 lane_rows[half] + step * Tile::kStep, params.stride_weight,
                                 part.num_rows[half],
                                 lane_column + step * Tile::kStep < params.in_features, lane);
        }
        commit_copies();
    };
#pragma unroll
    for (int unit = 0; unit < Tile::kStages - 1; ++unit) {
        copy_unit(unit, unit % 2, unit);
    }

    LinearInput<T, kTiles> input;
    input.load(params, first_column);
    if (params.norm_weight != nullptr) {
        row_scales<T, kTiles>(params, scales);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Tile::kTurns; ++i) {
            input.scale[i] = scales[threadIdx.x / Tile::kPieces + i * Tile::kRowsAtOnce];
        }
    }
    LinearSums<kTiles> sums;
    sums.start();
    int slot = 0;  // the stage to add next
    for (int step = 0; step < part.count; ++step) {
        T* x_tile = x_tiles + step / Tile::kStepsPerChunk % 2 * Tile::kXElements;
        if (step % Tile::kStepsPerChunk == 0) {
            input.store(params, x_tile);
            __syncthreads();  // x is stored, and all warps are done with the previous chunk
            if (step + Tile::kStepsPerChunk < part.count) {
                input.load(params, first_column + (step + Tile::kStepsPerChunk) * Tile::kStep);
            }
        }
        sums.load_x(x_tile + step % Tile::kStepsPerChunk * Tile::kStep + warp * Tile::kColumns,
                    lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            constexpr int kAhead = Tile::kStages - 1;
            wait_for_copies<kAhead - 1>();
            __syncwarp();  // all lanes' copies are there, and all are done with the stage before
            copy_unit(2 * step + half + kAhead, (half + kAhead) % 2, slot == 0 ? kAhead : slot - 1);
            sums.add_stage(pipeline + slot * Tile::kStageElements, half, lane);
            slot = slot == kAhead ? 0 : slot + 1;
        }
    }
    sums.store(reinterpret_cast<float*>(pipeline), lane);
    __syncthreads();

    auto sums_of_warps = [&](float (&y)[8], int row, int channel) {
        const auto* from =
            reinterpret_cast<const float*>(pipelines) + row * Tile::kSumStride + channel;
        clear(y);
#pragma unroll
        for (int other = 0; other < Tile::kWarps; ++other) {
            const auto* at = reinterpret_cast<const float4*>(from + other * Tile::kWarpFloats);
            add(y, at[0], at[1]);
        }
    };
    if (params.num_splits == 1) {
        write_rows<kTiles, T>(params, tile, sums_of_warps);
        return;
    }
    const int elements = params.num_rows * Tile::kRows;  // sums of a split
    float* partial = params.partial + tile * params.num_splits * elements;
    for (int i = threadIdx.x; i < elements / 8; i += Tile::kThreads) {
        float y[8];
        sums_of_warps(y, i * 8 / Tile::kRows, i * 8 % Tile::kRows);
        auto* to = reinterpret_cast<float4*>(partial + split * elements + i * 8);
        to[0] = make_float4(y[0], y[1], y[2], y[3]);
        to[1] = make_float4(y[4], y[5], y[6], y[7]);
    }

    if (!is_last_block(params.counters + tile, params.num_splits, ticket)) {
        return;
    }
    write_rows<kTiles, T>(params, tile, [&](float (&y)[8], int row, int channel) {
        const auto* from = reinterpret_cast<const float4*>(partial + row * Tile::kRows + channel);
        clear(y);
#pragma unroll 4
        for (int other = 0; other < params.num_splits; ++other) {
            const float4* at = from + other * (elements / 4);
            add(y, load_shared_by_blocks(at), load_shared_by_blocks(at + 1));
        }
    });
}

}  // namespace keye
