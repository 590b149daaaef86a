// Launches kernels: one template for all ops, which checks every CUDA error.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace keye {

struct LaunchShape {
    unsigned num_blocks;
    unsigned num_threads;
    size_t shared_bytes;
};

inline void check(const char* op, cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
    }
}

// Kernels must ask for more than 48 KB of shared memory, once per kernel and device.
template <auto kernel>
void allow_shared_memory(const char* op, size_t shared_bytes) {
    static std::atomic<uint64_t> asked{0};  // a bit per device
    if (shared_bytes <= 48 * 1024) {
        return;
    }
    int device = 0;
    check(op, cudaGetDevice(&device));
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (device < 64 && (asked.load(std::memory_order_relaxed) & bit)) {
        return;
    }
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
    asked.fetch_or(bit, std::memory_order_relaxed);
}

// Launch `kernel` on the current device. With `overlap`, which needs sm_90, blocks may start while
// the previous kernel still runs, which hides the launch; the kernel must then call
// wait_for_previous_kernel() before it touches global memory. shared_bytes must be the same in all
// launches of a kernel.
template <auto kernel, class Params>
void launch(const char* op, LaunchShape shape, bool overlap, void* stream, const Params& params) {
    allow_shared_memory<kernel>(op, shape.shared_bytes);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(shape.num_blocks);
    config.blockDim = dim3(shape.num_threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    check(op, cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace keye
