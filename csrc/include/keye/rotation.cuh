// cos and sin of rotary angles.
#pragma once

#include "keye/intrinsics.cuh"

namespace keye {

// cos and sin of fp32 angles up to 2^17 rad, within one unit in the last place of 1. cosf and sinf
// are as accurate, but reduce large angles through stack memory; __cosf fails beyond a few turns.
__device__ __forceinline__ float2 cos_sin(float angle) {
    // Adding 1.5 * 2^23 rounds to an integer, whose low bits are then those of the mantissa.
    const float shifted = __fadd_rn(__fmul_rn(angle, 0.6366197723675814f), 12582912.0f);  // 2 / pi
    const float turns = __fsub_rn(shifted, 12582912.0f);  // quarter turns
    const int quadrant = __float_as_int(shifted);
    // pi / 2 in four parts. The first three have 7 bits, so their products with up to 2^17 quarter
    // turns are exact.
    float r = fmaf(turns, -1.578125f, angle);
    r = fmaf(turns, 0.00732421875f, r);
    r = fmaf(turns, 4.470348358154297e-06f, r);
    r = fmaf(turns, -1.5893254712295857e-08f, r);
    // Minimax polynomials on [-pi/4, pi/4], with errors of at most 4e-9 and 5e-10.
    const float z = r * r;
    const float sin = r + r * z * (-0.16666651f + z * (0.0083319675f + z * -0.00019494264f));
    const float cos =
        1.0f - 0.5f * z + z * z * (0.041666646f + z * (-0.0013887355f + z * 2.4437008e-05f));
    const bool odd = (quadrant & 1) != 0;
    const float turned_cos = odd ? sin : cos, turned_sin = odd ? cos : sin;
    return make_float2((quadrant + 1) & 2 ? -turned_cos : turned_cos,
                       quadrant & 2 ? -turned_sin : turned_sin);
}

}  // namespace keye
