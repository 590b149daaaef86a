// Strides of tensors, and the head sizes of an op.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace keye {

// Strides count elements; the last dim is contiguous.
struct HeadStrides {  // of [num_tokens, num_heads, head_dim]
    int64_t token, head;
};
struct CacheStrides {  // of [num_pages, page_size, num_kv_heads, head_dim]
    int64_t page, row, head;
};

// Head sizes that an op has kernels for.
template <int... kSizes>
struct HeadDims {
    // Call `run` with `head_dim` as a std::integral_constant.
    template <class Run>
    static void with(const char* op, int head_dim, const Run& run) {
        const bool found =
            ((head_dim == kSizes && (run(std::integral_constant<int, kSizes>{}), true)) || ...);
        if (!found) {
            throw std::runtime_error(std::string(op) + ": no kernel for head_dim " +
                                     std::to_string(head_dim));
        }
    }
};

}  // namespace keye
