// Prints "kernel argument bytes" for each kernel of csrc: the dynamic shared memory of a block, by
// the number among the kernel's template arguments. The compiler's output does not tell it.
#include <cstdio>

#include "keye/linear.cuh"
#include "keye/paged_decode_attention.cuh"
#include "keye/qk_norm_mrope_store.h"

namespace {

template <int... kSizes>
void print_decode(keye::HeadDims<kSizes...>) {
    (std::printf("paged_decode_attention_kernel %d %d\n", kSizes,
                 keye::DecodeTile<keye::bf16, kSizes>::kSharedBytes),
     ...);
}

template <int... kSizes>
void print_store(keye::HeadDims<kSizes...>) {
    (std::printf("qk_norm_mrope_store_kernel %d 0\n", kSizes), ...);
}

}  // namespace

int main() {
    std::printf("linear_kernel 1 %d\n", keye::LinearTile<1>::kSharedBytes);
    std::printf("linear_kernel 2 %d\n", keye::LinearTile<2>::kSharedBytes);
    print_decode(keye::DecodeHeadDims{});
    print_store(keye::StoreHeadDims{});
}
