// keye_kernels._C: the launchers of csrc, with addresses and the stream as integers.
//
// Arguments come by keyword, in order, named like the fields of the params structs; keye_kernels
// checks their values before.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <string>
#include <tuple>
#include <type_traits>

#include "keye/capture.h"
#include "keye/linear.h"
#include "keye/paged_decode_attention.h"
#include "keye/qk_norm_mrope_store.h"

namespace py = pybind11;

namespace {

// Strides are what Tensor.stride() returns, so the last one is among them.
template <class T>
T from_python(py::handle value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value.cast<std::uintptr_t>());
    } else if constexpr (std::is_same_v<T, keye::HeadStrides>) {
        const auto strides = value.cast<std::tuple<int64_t, int64_t, int64_t>>();
        return {std::get<0>(strides), std::get<1>(strides)};
    } else if constexpr (std::is_same_v<T, keye::CacheStrides>) {
        const auto strides = value.cast<std::tuple<int64_t, int64_t, int64_t, int64_t>>();
        return {std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
    } else {
        return value.cast<T>();
    }
}

// The arguments of a call as CPython hands them over: pybind11 looks up each keyword in a dict, 1
// to 3 µs per launch. More than 28 would cost a dict here too, which CPython's compiler makes then.
struct Keywords {
    PyObject* const* values;
    PyObject* names;
    Py_ssize_t count;

    // Fill `variable` with argument number `place`, which must have this name, the next variable
    // with the next argument, and so on.
    template <class T, class... Rest>
    void fill(Py_ssize_t place, const char* name, T& variable, Rest&&... rest) const {
        if (place == count ||
            PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, place), name) != 0) {
            throw py::type_error("argument " + std::to_string(place) + " must be " + name);
        }
        try {
            variable = from_python<T>(values[place]);
        } catch (const py::cast_error&) {
            throw py::type_error(std::string(name) + " cannot be " +
                                 py::repr(values[place]).cast<std::string>());
        }
        if constexpr (sizeof...(rest) > 0) {
            fill(place + 1, rest...);
        } else if (place + 1 < count) {
            throw py::type_error(std::string("no argument may follow ") + name);
        }
    }
};

// For Keywords::fill.
#define NAMED(variable) #variable, variable
#define FIELD(name) #name, params.name

void linear(const Keywords& given) {
    keye::LinearParams params{};
    int dtype = 0;
    bool overlap = false;
    void* stream = nullptr;
    given.fill(0, NAMED(dtype), FIELD(x), FIELD(weight), FIELD(bias), FIELD(norm_weight),
               FIELD(residual), FIELD(out), FIELD(partial), FIELD(counters), FIELD(stride_x),
               FIELD(stride_weight), FIELD(stride_residual), FIELD(stride_out), FIELD(num_rows),
               FIELD(in_features), FIELD(width), FIELD(num_splits), FIELD(eps), FIELD(swiglu),
               NAMED(overlap), NAMED(stream));
    keye::linear(dtype, params, overlap, stream);
}

void paged_decode_attention(const Keywords& given) {
    keye::PagedDecodeAttentionParams params{};
    int dtype = 0, head_dim = 0;
    bool overlap = false;
    void* stream = nullptr;
    given.fill(0, NAMED(dtype), NAMED(head_dim), FIELD(q), FIELD(k_cache), FIELD(v_cache),
               FIELD(block_table), FIELD(cache_seqlens), FIELD(out), FIELD(lse), FIELD(partial_out),
               FIELD(partial_lse), FIELD(counters), FIELD(q_strides), FIELD(k_strides),
               FIELD(v_strides), FIELD(out_strides), FIELD(stride_table), FIELD(stride_lse),
               FIELD(batch_size), FIELD(num_kv_heads), FIELD(group), FIELD(page_size),
               FIELD(max_seqlen_k), FIELD(num_splits), FIELD(scale), NAMED(overlap), NAMED(stream));
    keye::paged_decode_attention(dtype, head_dim, params, overlap, stream);
}

void qk_norm_mrope_store(const Keywords& given) {
    keye::QkNormMropeStoreParams params{};
    int dtype = 0, head_dim = 0, num_sms = 0;
    bool overlap = false;
    void* stream = nullptr;
    given.fill(0, NAMED(dtype), NAMED(head_dim), FIELD(qkv), FIELD(q_weight), FIELD(k_weight),
               FIELD(positions), FIELD(frequencies), FIELD(k_cache), FIELD(v_cache), FIELD(slots),
               FIELD(out), FIELD(k_strides), FIELD(v_strides), FIELD(out_strides),
               FIELD(stride_qkv), FIELD(stride_axis), FIELD(num_tokens), FIELD(num_heads),
               FIELD(num_kv_heads), FIELD(page_size), FIELD(section_t), FIELD(section_h),
               FIELD(eps), NAMED(num_sms), NAMED(overlap), NAMED(stream));
    keye::qk_norm_mrope_store(dtype, head_dim, params, num_sms, overlap, stream);
}

template <void (*run)(const Keywords&)>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t num_positional, PyObject* names) {
    try {
        if (num_positional > 0) {
            throw py::type_error("all arguments must come by keyword");
        }
        run({values, names, names == nullptr ? 0 : PyTuple_GET_SIZE(names)});
        Py_RETURN_NONE;
    } catch (const py::type_error& error) {
        error.set_error();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

template <void (*run)(const Keywords&)>
void define(py::module_& module, const char* name) {
    static PyMethodDef method{};
    method.ml_name = name;
    method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<run>));
    method.ml_flags = METH_FASTCALL | METH_KEYWORDS;
    module.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

template <int... kSizes>
py::tuple as_tuple(keye::HeadDims<kSizes...>) {
    return py::make_tuple(kSizes...);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of keye_kernels";
    module.attr("architectures") = KEYE_ARCHITECTURES;
    // What keye_kernels has to say without the extension too; tests/native compares both.
    module.attr("paged_decode_attention_head_dims") = as_tuple(keye::DecodeHeadDims{});
    module.attr("paged_decode_attention_max_splits") = keye::kMaxSplits;
    module.attr("qk_norm_mrope_store_head_dims") = as_tuple(keye::StoreHeadDims{});
    module.attr("linear_max_rows") = keye::kMaxLinearRows;
    module.def("capture_id", [](std::uintptr_t stream) {
        return keye::capture_id(reinterpret_cast<void*>(stream));
    });
    define<linear>(module, "linear");
    define<paged_decode_attention>(module, "paged_decode_attention");
    define<qk_norm_mrope_store>(module, "qk_norm_mrope_store");
}
