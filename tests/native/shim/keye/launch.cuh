// Stands in for csrc/include/keye/launch.cuh: runs the kernel here and now.
#pragma once

#include <cuda_runtime.h>

// Nothing is captured here.
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline int cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*) {
    return 0;
}

namespace keye {

inline void check(const char*, int) {}

struct LaunchShape {
    unsigned num_blocks;
    unsigned num_threads;
    size_t shared_bytes;
};

template <auto kernel, class Params>
void launch(const char* op, LaunchShape shape, bool, void*, const Params& params) {
    try {
        shim::launch(shape.num_blocks, shape.num_threads, shape.shared_bytes,
                     [&] { kernel(params); });
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(std::string(op) + ": " + error.what());
    }
}

}  // namespace keye

// For the tests, through ctypes.
extern "C" {
inline __attribute__((used, visibility("default"))) void shim_configure(int order, int early_copies,
                                                                        const char* disabled) {
    shim::order = order;
    shim::early_copies = early_copies != 0;
    shim::disabled = disabled;
}
inline __attribute__((used, visibility("default"))) const char* shim_places() {
    static std::string names;
    names.clear();
    for (const shim::Place& place : shim::places) {
        names += place.name + "\n";
    }
    return names.c_str();
}
}
