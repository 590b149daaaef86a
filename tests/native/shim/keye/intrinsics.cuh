// Stands in for csrc/include/keye/intrinsics.cuh, function by function.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace keye {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarpSize = 32;
constexpr int kMaxSharedBytes = shim::kMaxSharedBytes;

inline unsigned char* dynamic_shared() {
    return shim::block->shared;
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline void prefetch_to_l2(const void* from, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes == 0) {
        shim::fail("a prefetch whose address or size does not divide by 16");
    }
    // AddressSanitizer sees what is out of bounds.
    [[maybe_unused]] volatile char first = *static_cast<const char*>(from);
    [[maybe_unused]] volatile char last = static_cast<const char*>(from)[bytes - 1];
}

inline void copy_async_16(void* to, const void* from, bool valid = true) {
    shim::start_copy(to, valid ? from : nullptr);
}
inline void commit_copies() {
    ++shim::self().open_group;
}
template <int kNewest>
void wait_for_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!shim::is_disabled(file, line)) {
        shim::finish_copies(kNewest);
    }
}

// Each lane reads its row when it comes: a barrier that is missing before shows.
template <bool kTransposed, int kCount>
void load_matrices(uint32_t (&out)[kCount], const void* row) {
    struct Rows {
        uint16_t row[8];
        uint32_t* out;
        int lane;
    } rows{{}, out, shim::lane()};
    if (shim::lane() < 8 * kCount) {
        if (reinterpret_cast<uintptr_t>(row) % 16) {
            shim::fail("a matrix row whose address does not divide by 16");
        }
        std::memcpy(rows.row, row, 16);
    }
    shim::together(rows, [](void* const(&lanes)[32]) {
        auto element = [&](int matrix, int r, int c) -> uint32_t {
            return static_cast<Rows*>(lanes[8 * matrix + r])->row[c];
        };
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < kCount; ++i) {
                const int r = lane / 4, c = 2 * (lane % 4);
                const uint32_t low = kTransposed ? element(i, c, r) : element(i, r, c);
                const uint32_t high = kTransposed ? element(i, c + 1, r) : element(i, r, c + 1);
                static_cast<Rows*>(lanes[lane])->out[i] = low | high << 16;
            }
        }
    });
}

inline float element_of(bf16, uint32_t both, int i) {
    return __bfloat162float({static_cast<uint16_t>(both >> 16 * i)});
}
inline float element_of(fp16, uint32_t both, int i) {
    return __half2float({static_cast<uint16_t>(both >> 16 * i)});
}

// kDepth / 8 registers of b, twice as many of a.
template <class T, int kDepth>
void multiply_add_depth(float (&d)[4], const uint32_t* a, const uint32_t* b) {
    struct Operands {
        float* d;
        const uint32_t *a, *b;
    } operands{d, a, b};
    shim::together(operands, [](void* const(&lanes)[32]) {
        float left[16][kDepth], right[kDepth][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& own = *static_cast<Operands*>(lanes[lane]);
            const int r = lane / 4, c = 2 * (lane % 4);
            for (int i = 0; i < 2; ++i) {
                for (int k = 0; k < kDepth; k += 8) {
                    left[r][c + k + i] = element_of(T{}, own.a[k / 4], i);
                    left[r + 8][c + k + i] = element_of(T{}, own.a[k / 4 + 1], i);
                    right[c + k + i][r] = element_of(T{}, own.b[k / 8], i);
                }
            }
        }
        float sums[16][8] = {};
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < kDepth; ++k) {
                for (int column = 0; column < 8; ++column) {
                    sums[row][column] += left[row][k] * right[k][column];
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                static_cast<Operands*>(lanes[lane])->d[i] +=
                    sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
            }
        }
    });
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_add_depth<T, 16>(d, a, b);
}
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    multiply_add_depth<T, 8>(d, a, &b);
}

inline float load_shared_by_blocks(const float* from) {
    return *from;
}
inline float4 load_shared_by_blocks(const float4* from) {
    return *from;
}

inline float exp2_fast(float x) {
    return std::exp2(x);
}

}  // namespace keye
