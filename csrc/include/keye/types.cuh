// bf16 and fp16: conversions, and accesses of 8 elements, 16 bytes, at once.
#pragma once

#include "keye/intrinsics.cuh"

namespace keye {

// Values of the launchers' `dtype` argument.
enum class Dtype : int { kBf16 = 0, kFp16 = 1 };

// Call `run` with a zero of the type that `dtype` names.
template <class Run>
void with_dtype(int dtype, const Run& run) {
    if (static_cast<Dtype>(dtype) == Dtype::kBf16) {
        run(bf16{});
    } else {
        run(fp16{});
    }
}

__device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(fp16 x) {
    return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
    return __float2half_rn(x);
}

// Round to T and convert back.
template <class T>
__device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

// Two elements of T in a register, the first in the low half, as tensor cores take them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack<bf16>(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<fp16>(uint32_t both) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// Convert 8 elements of T, packed in 16 bytes, to and from fp32.
template <class T>
__device__ __forceinline__ void unpack_8(float (&out)[8], uint4 packed) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 both = unpack<T>(words[i]);
        out[2 * i] = both.x;
        out[2 * i + 1] = both.y;
    }
}

template <class T>
__device__ __forceinline__ uint4 pack_8(const float (&x)[8]) {
    return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                      pack<T>(x[6], x[7]));
}

__device__ __forceinline__ uint4 load_16(const void* from) {
    return *static_cast<const uint4*>(from);
}
__device__ __forceinline__ void store_16(void* to, uint4 value) {
    *static_cast<uint4*>(to) = value;
}

}  // namespace keye
