// Blocks of a launch that share a result: the last of them finishes it.
#pragma once

#include "keye/intrinsics.cuh"

namespace keye {

// Called by all threads of `num_blocks` blocks, after each block wrote its part to global memory.
// Returns true in the block that calls it last, which then sees the parts of all blocks when it
// reads them with load_shared_by_blocks. `counter` is in global memory and 0 before and after;
// `ticket` is in shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned num_blocks,
                                              unsigned* ticket) {
    __threadfence();
    __syncthreads();
    const unsigned last = num_blocks - 1;
    if (threadIdx.x == 0) {
        *ticket = atomicInc(counter, last);
    }
    __syncthreads();
    if (*ticket != last) {
        return false;
    }
    __threadfence();
    return true;
}

}  // namespace keye
