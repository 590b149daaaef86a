#include "keye/inspect.h"

#include "keye/linear.cuh"
#include "keye/paged_decode_attention.cuh"

namespace keye {

int shared_bytes(const std::string& kernel, int argument) {
    if (kernel == "linear_kernel") {
        return argument == 1 ? LinearTile<1>::kSharedBytes : LinearTile<2>::kSharedBytes;
    }
    if (kernel == "paged_decode_attention_kernel") {
        switch (argument) {
            case 64: return DecodeTile<bf16, 64>::kSharedBytes;
            case 72: return DecodeTile<bf16, 72>::kSharedBytes;
            case 80: return DecodeTile<bf16, 80>::kSharedBytes;
            default: return DecodeTile<bf16, 128>::kSharedBytes;
        }
    }
    return 0;
}

}  // namespace keye
