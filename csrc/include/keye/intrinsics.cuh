// Intrinsics: tensor cores, asynchronous copies, wide and cached accesses.
// Tests on a CPU replace only this file and launch.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace keye {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarpSize = 32;
// Shared memory that a block can have on every GPU we build for; sm_120 has the least.
constexpr int kMaxSharedBytes = 99 * 1024;

// The launch's dynamic shared memory. Kernels lay it out themselves and declare no __shared__.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}

// Wait until the previous kernel has ended. A kernel launched with `overlap` must not read or write
// global memory before this. Does nothing in other launches.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel, if launched with `overlap`, start once all blocks have called this.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Prefetch global memory to L2; later writes by other kernels are still seen. Address and size must
// be multiples of 16. Does nothing before sm_90.
__device__ __forceinline__ void prefetch_to_l2(const void* from, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

// Copy 16 bytes from global to shared memory, asynchronously and past L1. If not `valid`, write 16
// zeros and read nothing. Both addresses must be multiples of 16.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Close this thread's group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until all of this thread's groups but the kNewest newest are complete. Copies of other
// threads are visible only after they have waited too and a barrier follows.
template <int kNewest>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Load 2 or 4 matrices of 8 x 8 two-byte elements from shared memory. Lane 8 i + r passes the
// address of row r of matrix i; with 2 matrices, lanes from 16 on are ignored. From each matrix a
// lane gets elements 2 (lane % 4) and the next of row lane / 4 (transposed: of column lane / 4).
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
    }
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[2], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(out[0]), "=r"(out[1])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(out[0]), "=r"(out[1])
                     : "r"(address)
                     : "memory");
    }
}

// d += a b on tensor cores, in fp32. a [16, 16], b [16, 8], d [16, 8], T is bf16 or fp16. With
// r = lane / 4 and c = 2 (lane % 4) a lane holds, in a and b with the next element each:
//   a: (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8)    b: rows c and c + 8 of column r
//   d: (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<fp16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with a [16, 8] and b [8, 8]: a holds (r, c) and (r + 8, c), b row c of column r.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&d)[4], const uint32_t (&a)[2],
                                                   uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

template <>
__device__ __forceinline__ void multiply_add<fp16>(float (&d)[4], const uint32_t (&a)[2],
                                                   uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Load what another block of this launch wrote, from L2, since L1 may hold an older value.
__device__ __forceinline__ float load_shared_by_blocks(const float* from) {
    return __ldcg(from);
}
__device__ __forceinline__ float4 load_shared_by_blocks(const float4* from) {
    return __ldcg(from);
}

// 2^x, relative error 2^-22; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace keye
