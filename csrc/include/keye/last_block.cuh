// How the blocks of a launch that share a result find out which of them finishes it.
#pragma once

#include "keye/intrinsics.cuh"

namespace keye {

// For all threads of each of `num_blocks` blocks, after they wrote their parts to global memory.
// True in the block that calls it last: it sees what the others wrote, by load_shared_by_blocks.
// `counter` in global memory is 0 before and after; `ticket` lies in shared memory.
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
