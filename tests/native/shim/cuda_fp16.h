// IEEE half precision with the conversions of CUDA's header.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};

inline float __half2float(__half h) {
    const unsigned sign = unsigned{h.bits} >> 15 << 31, rest = h.bits & 0x7fffu;
    if (rest >= 0x7c00) {  // infinity and NaN
        return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    }
    // Shifted into place the exponent lacks 112, which a product adds, for subnormals too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}
inline __half __float2half_rn(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000,
                   magnitude = bits & ~(1u << 31);
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    }
    if (magnitude >= 0x477ff000u) {  // 65520 and above
        return {static_cast<uint16_t>(sign | 0x7c00)};
    }
    if (magnitude < 0x38800000u) {  // subnormal: the sum leaves multiples of 2^-24 in the mantissa
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u))};
    }
    const unsigned even = magnitude >> 13 & 1;
    return {static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfff + even) >> 13)};
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 both) {
    return {__half2float(both.x), __half2float(both.y)};
}
