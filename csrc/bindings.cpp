// keye_kernels._C: the launchers of csrc, with addresses and the stream as integers.
//
// Arguments come by position, in the order of the params structs; keye_kernels checks them before.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "keye/capture.h"
#include "keye/inspect.h"
#include "keye/linear.h"
#include "keye/paged_decode_attention.h"
#include "keye/qk_norm_mrope_store.h"

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void linear(int dtype, Address x, Address weight, Address bias, Address norm_weight,
            Address residual, Address out, Address partial, Address counters, int64_t stride_x,
            int64_t stride_weight, int64_t stride_residual, int64_t stride_out, int num_rows,
            int in_features, int width, int num_splits, float eps, bool swiglu, bool overlap,
            Address stream) {
    const keye::LinearParams params{pointer<const void>(x),
                                    pointer<const void>(weight),
                                    pointer<const void>(bias),
                                    pointer<const void>(norm_weight),
                                    pointer<const void>(residual),
                                    pointer<void>(out),
                                    pointer<float>(partial),
                                    pointer<unsigned>(counters),
                                    stride_x,
                                    stride_weight,
                                    stride_residual,
                                    stride_out,
                                    num_rows,
                                    in_features,
                                    width,
                                    num_splits,
                                    eps,
                                    swiglu};
    keye::linear(dtype, params, overlap, pointer<void>(stream));
}

void paged_decode_attention(int dtype, int head_dim, Address q, Address k_cache, Address v_cache,
                            Address block_table, Address cache_seqlens, Address out, Address lse,
                            Address partial_out, Address partial_lse, Address counters,
                            int64_t stride_q, int64_t stride_q_head, int64_t stride_k_page,
                            int64_t stride_k_row, int64_t stride_k_head, int64_t stride_v_page,
                            int64_t stride_v_row, int64_t stride_v_head, int64_t stride_table,
                            int64_t stride_out, int64_t stride_out_head, int64_t stride_lse,
                            int batch_size, int num_kv_heads, int group, int page_size,
                            int max_seqlen_k, int num_splits, float scale, bool overlap,
                            Address stream) {
    const keye::PagedDecodeAttentionParams params{pointer<const void>(q),
                                                  pointer<const void>(k_cache),
                                                  pointer<const void>(v_cache),
                                                  pointer<const int>(block_table),
                                                  pointer<const int>(cache_seqlens),
                                                  pointer<void>(out),
                                                  pointer<float>(lse),
                                                  pointer<float>(partial_out),
                                                  pointer<float>(partial_lse),
                                                  pointer<unsigned>(counters),
                                                  stride_q,
                                                  stride_q_head,
                                                  stride_k_page,
                                                  stride_k_row,
                                                  stride_k_head,
                                                  stride_v_page,
                                                  stride_v_row,
                                                  stride_v_head,
                                                  stride_table,
                                                  stride_out,
                                                  stride_out_head,
                                                  stride_lse,
                                                  batch_size,
                                                  num_kv_heads,
                                                  group,
                                                  page_size,
                                                  max_seqlen_k,
                                                  num_splits,
                                                  scale};
    keye::paged_decode_attention(dtype, head_dim, params, overlap, pointer<void>(stream));
}

void qk_norm_mrope_store(int dtype, int head_dim, Address qkv, Address q_weight, Address k_weight,
                         Address positions, Address frequencies, Address k_cache, Address v_cache,
                         Address slots, Address out, int64_t stride_qkv, int64_t stride_axis,
                         int64_t stride_k_page, int64_t stride_k_row, int64_t stride_k_head,
                         int64_t stride_v_page, int64_t stride_v_row, int64_t stride_v_head,
                         int64_t stride_out, int64_t stride_out_head, int num_tokens, int num_heads,
                         int num_kv_heads, int page_size, int section_t, int section_h, float eps,
                         int num_sms, bool overlap, Address stream) {
    const keye::QkNormMropeStoreParams params{pointer<const void>(qkv),
                                              pointer<const void>(q_weight),
                                              pointer<const void>(k_weight),
                                              pointer<const int64_t>(positions),
                                              pointer<const float>(frequencies),
                                              pointer<void>(k_cache),
                                              pointer<void>(v_cache),
                                              pointer<const int64_t>(slots),
                                              pointer<void>(out),
                                              stride_qkv,
                                              stride_axis,
                                              stride_k_page,
                                              stride_k_row,
                                              stride_k_head,
                                              stride_v_page,
                                              stride_v_row,
                                              stride_v_head,
                                              stride_out,
                                              stride_out_head,
                                              num_tokens,
                                              num_heads,
                                              num_kv_heads,
                                              page_size,
                                              section_t,
                                              section_h,
                                              0,
                                              eps};
    keye::qk_norm_mrope_store(dtype, head_dim, params, num_sms, overlap, pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of keye_kernels";
    module.attr("architectures") = KEYE_ARCHITECTURES;
    module.def("capture_id",
               [](Address stream) { return keye::capture_id(pointer<void>(stream)); });
    module.def("linear", &linear);
    module.def("paged_decode_attention", &paged_decode_attention);
    module.def("qk_norm_mrope_store", &qk_norm_mrope_store);
    module.def("shared_bytes", &keye::shared_bytes);
}
