#include "keye/capture.h"

#include "keye/launch.cuh"

namespace keye {

unsigned long long capture_id(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check("capture_id", cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id));
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace keye
