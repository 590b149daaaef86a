// Launch of a few rows times a large matrix.
#pragma once

#include <cstdint>

namespace keye {

constexpr int kMaxLinearRows = 16;  // two MMA tiles of 8 columns

// T is bf16 or fp16. Strides count elements. Addresses, and strides, in_features and width in
// bytes, are multiples of 16.
struct LinearParams {
    const void* x;            // [num_rows, in_features] T, up to kMaxLinearRows
    const void* weight;       // [width, in_features] T, with swiglu [2 * width, in_features]
    const void* bias;         // [rows of weight] T, or null
    const void* norm_weight;  // [in_features] T, or null: x is normalised before
    const void* residual;     // [num_rows, width] T, or null
    void* out;                // [num_rows, width] T; may be residual
    float* partial;           // [tiles, num_splits, num_rows, 64]; unused with one split
    unsigned* counters;       // [tiles], 0 before and after; unused with one split
    int64_t stride_x, stride_weight, stride_residual, stride_out;
    int num_rows, in_features, width;
    int num_splits;
    float eps;
    bool swiglu;
};

// `overlap`: see launch.cuh. Throws std::runtime_error if the launch fails.
void linear(int dtype, const LinearParams& params, bool overlap, void* stream);

}  // namespace keye
