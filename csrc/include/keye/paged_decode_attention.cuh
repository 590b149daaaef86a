// Split-KV attention for decoding, with the splits added up in the same launch.
//
// The keys of a sequence are cut into chunks of 16, which never cross a page. A block computes one
// run of chunks for one key/value head; up to 16 query heads of its group are the rows of its
// matrix products. The warps take chunks in turn, each through a pipeline of its own, so that no
// warp waits for another before the end. Then the sums of the warps are added in shared memory. If
// the sequence has several runs, their blocks write results to global memory, and the last block
// combines them.
#pragma once

#include "keye/decode_warp.cuh"
#include "keye/last_block.cuh"
#include "keye/paged_decode_attention.h"
#include "keye/types.cuh"

namespace keye {

// Where the chunks of a warp lie. Lane i looks up chunk i of the next 32, so the block table is
// read once per 32 chunks. Entries past the run of this block are not read.
struct ChunkPlaces {
    int page, row;  // of the chunk that this lane looked up

    __device__ __forceinline__ void look_up(const int* table, int page_size, int chunk, int end) {
        const int key = chunk * 16;
        page = chunk < end ? table[key / page_size] : 0;
        row = key % page_size;
    }

    // (page, row in the page) of chunk i of those looked up.
    __device__ __forceinline__ int2 of(int i) const {
        return make_int2(__shfl_sync(~0u, page, i), __shfl_sync(~0u, row, i));
    }
};

// Copy 16 rows to a tile. Rows from `visible` on are not read; they become zeros.
template <class T, int kHeadDim>
__device__ __forceinline__ void copy_rows(T* tile, const T* from, int64_t stride, int visible,
                                          int lane) {
    using Tile = DecodeTile<T, kHeadDim>;
    constexpr int kPieces = Tile::kPieces, kAll = 16 * kPieces;
    constexpr bool kWholeRows = kWarpSize % kPieces == 0;  // a step of the warp copies whole rows
    const T* at = from + lane / kPieces * stride + lane % kPieces * 8;
#pragma unroll
    for (int i = 0; i < (kAll + kWarpSize - 1) / kWarpSize; ++i) {
        const int number = i * kWarpSize + lane;
        const int row = number / kPieces, piece = number % kPieces;
        if (kAll % kWarpSize == 0 || number < kAll) {
            if constexpr (!kWholeRows) {
                at = from + row * stride + piece * 8;
            }
            const bool valid = row < visible;
            copy_async_16(tile + row * Tile::kStride + piece * 8, valid ? at : from, valid);
        }
        at += kWarpSize / kPieces * stride;  // one register pair instead of an address per step
    }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(DecodeTile<T, kHeadDim>::kThreads,
                                  DecodeTile<T, kHeadDim>::kBlocksPerSm)
    paged_decode_attention_kernel(const __grid_constant__ PagedDecodeAttentionParams params) {
    using Tile = DecodeTile<T, kHeadDim>;
    unsigned char* shared = dynamic_shared();
    T* q_tile = reinterpret_cast<T*>(shared);
    T* pipelines = reinterpret_cast<T*>(shared + Tile::kQBytes);
    float2* stats = reinterpret_cast<float2*>(shared + Tile::kQBytes + Tile::kPipelineBytes);
    auto* ticket = reinterpret_cast<unsigned*>(stats + Tile::kWarps * Tile::kRows);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

    // Blocks with the same keys are neighbours, as the rows of their heads are in memory.
    const int head_blocks = (params.group + Tile::kRows - 1) / Tile::kRows;
    const int blocks_per_run = params.num_kv_heads * head_blocks;
    const int head_block = blockIdx.x % blocks_per_run;
    const int split = blockIdx.x / blocks_per_run % params.num_splits;
    const int64_t batch = blockIdx.x / blocks_per_run / params.num_splits;
    const int kv_head = head_block / head_blocks;
    const int first_in_group = head_block % head_blocks * Tile::kRows;
    const int num_rows = min(params.group - first_in_group, Tile::kRows);
    const int64_t first_head = kv_head * params.group + first_in_group;

    wait_for_previous_kernel();
    let_next_kernel_start();

    // The run of this block follows from the sequence's own length. No run is empty.
    const int length = max(min(params.cache_seqlens[batch], params.max_seqlen_k), 0);
    const int num_chunks = (length + Tile::kChunk - 1) / Tile::kChunk;
    const int num_runs = min(params.num_splits, (num_chunks + Tile::kWarps - 1) / Tile::kWarps);
    T* out = static_cast<T*>(params.out) + batch * params.out_strides.token +
             first_head * params.out_strides.head;
    // Write the log-sum-exp, given in base 2, if it is wanted.
    const auto store_lse = [&](int row, float value) {
        constexpr float kLn2 = 0.6931471805599453f;
        if (params.lse != nullptr) {
            params.lse[(first_head + row) * params.stride_lse + batch] = value * kLn2;
        }
    };
    if (split >= num_runs) {
        if (length == 0 && split == 0) {
            if (static_cast<int>(threadIdx.x) < num_rows) {
                store_lse(threadIdx.x, -INFINITY);
            }
            for (int i = threadIdx.x; i < num_rows * Tile::kPieces; i += Tile::kThreads) {
                store_16(out + i / Tile::kPieces * params.out_strides.head + i % Tile::kPieces * 8,
                         make_uint4(0, 0, 0, 0));
            }
        }
        return;
    }
    const int per_run = num_chunks / num_runs, rest = num_chunks % num_runs;
    const int start = split * per_run + min(split, rest);
    const int end = start + per_run + (split < rest ? 1 : 0);

    if (warp == 0) {
        const T* q = static_cast<const T*>(params.q) + batch * params.q_strides.token +
                     first_head * params.q_strides.head;
        copy_rows<T, kHeadDim>(q_tile, q, params.q_strides.head, num_rows, lane);
    }
    commit_copies();

    const T* k_cache = static_cast<const T*>(params.k_cache) + kv_head * params.k_strides.head;
    const T* v_cache = static_cast<const T*>(params.v_cache) + kv_head * params.v_strides.head;
    T* pipeline = pipelines + warp * Tile::kWarpElements;
    const int count = max(end - start - warp + Tile::kWarps - 1, 0) / Tile::kWarps;
    ChunkPlaces places{};
    auto place_of = [&](int i) {
        if (i % kWarpSize == 0) {
            const int* table = params.block_table + batch * params.stride_table;
            places.look_up(table, params.page_size, start + warp + (i + lane) * Tile::kWarps, end);
        }
        return places.of(i % kWarpSize);
    };
    auto visible_in = [&](int i) {
        return length - (start + warp + i * Tile::kWarps) * Tile::kChunk;
    };
    auto copy_chunk = [&](int i, int2 at) {
        T* tile = pipeline + i % Tile::kStages * 2 * Tile::kTileElements;
        const int64_t page = at.x, row = at.y;
        copy_rows<T, kHeadDim>(tile,
                               k_cache + page * params.k_strides.page + row * params.k_strides.row,
                               params.k_strides.row, visible_in(i), lane);
        copy_rows<T, kHeadDim>(tile + Tile::kTileElements,
                               v_cache + page * params.v_strides.page + row * params.v_strides.row,
                               params.v_strides.row, visible_in(i), lane);
    };
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) {
        if (i < count) {
            copy_chunk(i, place_of(i));
        }
        commit_copies();
    }
    wait_for_copies<Tile::kStages - 1>();
    __syncthreads();  // q is in shared memory, for all warps
    DecodeWarp<T, kHeadDim> softmax;
    softmax.start();
    softmax.load_q(q_tile, lane);
    for (int i = 0; i < count; ++i) {
        const int ahead = i + Tile::kStages - 1;
        const int2 at = ahead < count ? place_of(ahead) : make_int2(0, 0);
        wait_for_copies<Tile::kStages - 2>();
        __syncwarp();  // all lanes' copies of chunk i are there, and all are done with chunk i - 1
        if (ahead < count) {
            copy_chunk(ahead, at);
        }
        commit_copies();
        const T* tile = pipeline + i % Tile::kStages * 2 * Tile::kTileElements;
        softmax.add_chunk(tile, tile + Tile::kTileElements, visible_in(i), params.scale, lane);
    }
    softmax.store(reinterpret_cast<float*>(pipeline), stats + warp * Tile::kRows, lane);
    __syncthreads();

    // Add the sums of the warps, 8 channels of a row per thread.
    const bool whole = num_runs == 1;
    const int64_t block = batch * blocks_per_run + head_block;
    const int64_t first_partial = block * params.num_splits * Tile::kRows;
    for (int i = threadIdx.x; i < num_rows * Tile::kPieces; i += Tile::kThreads) {
        const int row = i / Tile::kPieces, piece = i % Tile::kPieces;
        float peak = -INFINITY;
#pragma unroll
        for (int other = 0; other < Tile::kWarps; ++other) {
            peak = fmaxf(peak, stats[other * Tile::kRows + row].x);
        }
        float weight = 0.0f, sums[8] = {};
#pragma unroll
        for (int other = 0; other < Tile::kWarps; ++other) {
            const float2 stat = stats[other * Tile::kRows + row];
            const float factor = exp2_fast(stat.x - peak);
            weight += stat.y * factor;
            const float* from =
                reinterpret_cast<const float*>(pipelines + other * Tile::kWarpElements) +
                row * Tile::kSumStride + piece * 8;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sums[j] += from[j] * factor;
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[j] /= weight;
        }
        if (whole) {
            store_16(out + row * params.out_strides.head + piece * 8, pack_8<T>(sums));
            if (piece == 0) {
                store_lse(row, peak + log2f(weight));
            }
        } else {
            const int64_t at = first_partial + split * Tile::kRows + row;
            auto* to = reinterpret_cast<float4*>(params.partial_out + at * kHeadDim + piece * 8);
            to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
            to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
            if (piece == 0) {
                params.partial_lse[at] = peak + log2f(weight);
            }
        }
    }
    if (whole) {
        return;
    }

    if (!is_last_block(params.counters + block, num_runs, ticket)) {
        return;
    }
    float* lse = reinterpret_cast<float*>(pipelines);  // [num_runs, 16]
    for (int i = threadIdx.x; i < num_runs * Tile::kRows; i += Tile::kThreads) {
        if (i % Tile::kRows < num_rows) {
            lse[i] = load_shared_by_blocks(params.partial_lse + first_partial + i);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_rows * Tile::kPieces; i += Tile::kThreads) {
        const int row = i / Tile::kPieces, piece = i % Tile::kPieces;
        float peak = -INFINITY;
        for (int run = 0; run < num_runs; ++run) {
            peak = fmaxf(peak, lse[run * Tile::kRows + row]);
        }
        const auto* from = reinterpret_cast<const float4*>(
            params.partial_out + (first_partial + row) * kHeadDim + piece * 8);
        float weight = 0.0f, sums[8] = {};
#pragma unroll 8
        for (int run = 0; run < num_runs; ++run) {
            const float4* at = from + run * (Tile::kRows * kHeadDim / 4);
            const float4 low = load_shared_by_blocks(at), high = load_shared_by_blocks(at + 1);
            const float factor = exp2_fast(lse[run * Tile::kRows + row] - peak);
            weight += factor;
            const float both[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sums[j] += both[j] * factor;
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            sums[j] /= weight;
        }
        store_16(out + row * params.out_strides.head + piece * 8, pack_8<T>(sums));
        if (piece == 0) {
            store_lse(row, peak + log2f(weight));
        }
    }
}

}  // namespace keye
