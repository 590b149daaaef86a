"""Repairs of Triton's interpreter, 3.6 to 3.9, so that kernels run on a CPU as on a GPU.

The interpreter keeps a bfloat16 as the uint16 of its bits and computes on those. Here every
operation widens such values to fp32 first, which is exact, and rounds its result to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """Values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray, *, truncate: bool = False) -> np.ndarray:
    """Bits (uint16) of the nearest bfloat16, ties to even; NaN becomes 0x7FFF, as on a GPU."""
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    if not truncate:
        # Half a unit of the last place kept, less one where that place is even; NaN may wrap.
        bits = bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> 16).astype(np.uint16))


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: object) -> object:
    return TensorHandle(to_fp32(value.data), tl.float32) if _is_bf16(value) else value


def _narrow(value: TensorHandle) -> TensorHandle:
    return TensorHandle(to_bf16(value.data), tl.bfloat16)


def _on_values(name: str) -> None:
    """Let a builder's arithmetic operation see the values, not the bits, of bfloat16 operands."""
    original = getattr(InterpreterBuilder, name)

    def operation(self, *operands):
        if not any(map(_is_bf16, operands)):
            return original(self, *operands)
        result = original(self, *map(_widen, operands))
        return result if result.data.dtype == np.bool_ else _narrow(result)

    setattr(InterpreterBuilder, name, operation)


def _repair_select() -> None:
    original = InterpreterBuilder.ternary_op

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bf16(other):  # a choice is right on bits too
            return original(self, lhs, rhs, other, op)
        return _narrow(original(self, _widen(lhs), _widen(rhs), _widen(other), op))

    InterpreterBuilder.ternary_op = ternary_op


def _repair_casts() -> None:
    cast_impl, create_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _narrow(src)
        src = _widen(src)
        return src if src.dtype.scalar == dst_type.scalar else cast_impl(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.bfloat16 and src.dtype.primitive_bitwidth > 8:
            if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
                values = _widen(src).data
                return TensorHandle(to_bf16(values, truncate=True), tl.bfloat16)
            return cast(self, src, dst_type)
        if _is_bf16(src) and dst_type.primitive_bitwidth > 8:
            return cast(self, src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    # Named by constants of this type; only 3.9 has its own.
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))


def _repair_dot() -> None:
    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *precision):
        a, b = _widen(a), _widen(b)
        if d.data.dtype == np.float32 and a.data.dtype == b.data.dtype == np.float16:
            # The same products and sums, through BLAS, which knows no fp16.
            a, b = (TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return original(self, a, b, d, *precision)

    InterpreterBuilder.create_dot = create_dot


def _repair_reductions() -> None:
    """Reductions and scans of bfloat16 run in fp32 and round once, at the end."""
    original = interpreter.ReduceScanOpInterface.apply

    def apply(self, inputs):
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        narrow = [value.dtype == tl.bfloat16 for value in inputs]
        widened = tuple(
            self.to_tensor(to_fp32(value.handle.data), tl.float32) if is_narrow else value
            for value, is_narrow in zip(inputs, narrow, strict=True)
        )
        results = original(self, widened)
        return tuple(
            self.to_tensor(to_bf16(result.handle.data), tl.bfloat16)
            if narrow[min(i, len(narrow) - 1)] and result.dtype == tl.float32
            else result
            for i, result in enumerate(results)
        )

    interpreter.ReduceScanOpInterface.apply = apply


def _repair_index() -> None:
    """3.6 turns a tensor of one element into an int in a way NumPy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_umulhi() -> None:
    """Before 3.9 signed operands were widened with their sign."""
    original = InterpreterBuilder.create_umulhi

    def create_umulhi(self, lhs, rhs):
        if lhs.data.dtype != np.int32:
            return original(self, lhs, rhs)
        wide = [np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64) for x in (lhs, rhs)]
        high = (wide[0] * wide[1] >> np.uint64(32)).astype(np.uint32).view(np.int32)
        return TensorHandle(high, lhs.dtype.scalar)

    InterpreterBuilder.create_umulhi = create_umulhi


def _repair_calls() -> None:
    """No NumPy warnings where a GPU overflows silently; helpers without 5 ms of set-up per call."""
    launch = interpreter.GridExecutor.__call__

    def quiet_launch(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    def call_helper(self, *args, **kwargs):  # the kernel that calls has set up the language
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = quiet_launch
    interpreter.InterpretedFunction.__call__ = call_helper


def install() -> None:
    """Repair the interpreter. Once per process, before the first kernel runs."""
    for name in ("binary_op", "unary_op", "create_rsqrt", "create_erf", "create_fma"):
        _on_values(name)
    _repair_select()
    _repair_casts()
    _repair_dot()
    _repair_reductions()
    _repair_index()
    _repair_umulhi()
    _repair_calls()
