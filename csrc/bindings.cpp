// keye_kernels._C: the launchers of csrc, with addresses and the stream as integers.
//
// Arguments come by position, in the order of the params structs; keye_kernels checks them before.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "keye/capture.h"
#include "keye/paged_decode_attention.h"

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void paged_decode_attention(int dtype, int head_dim, Address q, Address k_cache, Address v_cache,
                            Address block_table, Address cache_seqlens, Address out,
                            Address partial_out, Address partial_lse, Address counters,
                            int64_t stride_q, int64_t stride_q_head, int64_t stride_k_page,
                            int64_t stride_k_row, int64_t stride_k_head, int64_t stride_v_page,
                            int64_t stride_v_row, int64_t stride_v_head, int64_t stride_table,
                            int64_t stride_out, int64_t stride_out_head, int batch_size,
                            int num_kv_heads, int group, int page_size, int max_seqlen_k,
                            int num_splits, float scale, bool overlap, Address stream) {
    const keye::PagedDecodeAttentionParams params{
        pointer<const void>(q),         pointer<const void>(k_cache),
        pointer<const void>(v_cache),   pointer<const int>(block_table),
        pointer<const int>(cache_seqlens), pointer<void>(out),
        pointer<float>(partial_out),    pointer<float>(partial_lse),
        pointer<unsigned>(counters),    stride_q,
        stride_q_head,                  stride_k_page,
        stride_k_row,                   stride_k_head,
        stride_v_page,                  stride_v_row,
        stride_v_head,                  stride_table,
        stride_out,                     stride_out_head,
        batch_size,                     num_kv_heads,
        group,                          page_size,
        max_seqlen_k,                   num_splits,
        scale};
    keye::paged_decode_attention(dtype, head_dim, params, overlap, pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of keye_kernels";
    module.attr("architectures") = KEYE_ARCHITECTURES;
    module.def("capture_id", [](Address stream) { return keye::capture_id(pointer<void>(stream)); });
    module.def("paged_decode_attention", &paged_decode_attention);
}
