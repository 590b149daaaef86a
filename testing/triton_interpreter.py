"""Repairs Triton's interpreter, 3.6 to 3.9, so that kernels run on a CPU as on a GPU.

The interpreter stores bfloat16 as the uint16 of its bits and computes on those. The repair widens
such operands to fp32, which is exact, and rounds results to nearest even. It also checks every
access to memory against the tensors that the kernel was given.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """Values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray, *, truncate: bool = False) -> np.ndarray:
    """Bits (uint16) of the nearest bfloat16, ties to even; NaN becomes 0x7FFF, as on a GPU."""
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    if not truncate:
        # Add half a unit of the last bit kept, less one if that bit is 0; NaN may wrap.
        bits = bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> 16).astype(np.uint16))


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: object) -> object:
    return TensorHandle(to_fp32(value.data), tl.float32) if _is_bf16(value) else value


def _narrow(value: TensorHandle) -> TensorHandle:
    return TensorHandle(to_bf16(value.data), tl.bfloat16)


def _on_values(name: str) -> None:
    """Let a builder's arithmetic operation work on values, not bits, of bfloat16 operands."""
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
        if op is np.where or not _is_bf16(other):  # np.where is right on bits too
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
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar.primitive_bitwidth > 8:
            if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
                values = _widen(src).data
                return TensorHandle(to_bf16(values, truncate=True), tl.bfloat16)
            return cast(self, src, dst_type)
        if _is_bf16(src) and dst_type.scalar.primitive_bitwidth > 8:
            return cast(self, src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    # Called for constants of this type; only 3.9 has its own.
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))


def _ordered_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[m, k] times [k, n] in fp32, summed from the first k to the last.

    The order of BLAS's sums depends on the shape and the CPU, so the same row in a small and in a
    large tile would differ in its last bit, which it does not on a GPU.
    """
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    term = np.empty_like(total)
    for k in range(a.shape[1]):
        np.multiply(a[:, k, None], b[k], out=term, dtype=np.float32)
        total += term
    return total


def _repair_dot() -> None:
    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *precision):
        a, b = _widen(a), _widen(b)
        if d.data.dtype != np.float32 or any(x.data.dtype.itemsize == 1 for x in (a, b)):
            return original(self, a, b, d, *precision)  # integers, fp16 sums, fp8
        return TensorHandle(_ordered_dot(a.data, b.data) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _repair_reductions() -> None:
    """Run reductions and scans of bfloat16 in fp32 and round once, at the end."""
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
    """Convert a tensor of one element to an int; NumPy 2.4 refuses how 3.6 does it."""
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_splat() -> None:
    """Keep a comparison of fp32 scalars bool when broadcast: it became fp32, where `&` fails."""
    original = InterpreterBuilder.create_splat

    def create_splat(self, ret_ty, arg):
        if arg.data.dtype == np.bool_:
            arg = TensorHandle(arg.data, tl.int1)
        return original(self, ret_ty, arg)

    InterpreterBuilder.create_splat = create_splat


def _repair_fma() -> None:
    """Compute in fp64, where the product is exact: before 3.9 it was rounded before the sum."""
    original = InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return original(self, x, y, z)
        total = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


@dataclass
class Traffic:
    """Bytes that kernels loaded and stored. There is no cache: a second read counts again."""

    loaded: int = 0
    stored: int = 0


@dataclass
class _Launch:
    """The running kernel: its name and the memory [start, end) of its arguments."""

    kernel: str = ""
    memory: list[tuple[int, int]] = field(default_factory=list)
    helpers: set[object] = field(default_factory=set)
    traffic: Traffic | None = None


_launch = _Launch()


def _repair_calls() -> None:
    """Silence NumPy's warnings, and set up each helper (5 ms) once per launch, not per call."""
    launch = GridExecutor.__call__

    def quiet_launch(self, *args, **kwargs):
        _launch.helpers.clear()
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    def call_helper(self, *args, **kwargs):
        if self.fn not in _launch.helpers:
            _launch.helpers.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    GridExecutor.__call__ = quiet_launch
    interpreter.InterpretedFunction.__call__ = call_helper


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "base"):  # a descriptor
            yield from _tensors((value.base,))


def _skip_copies() -> None:
    """Use CPU arguments without a copy, and record the memory they own."""
    to_host, to_device = GridExecutor._init_args_hst, GridExecutor._restore_args_dev

    def init_args_hst(self, args, kwargs):
        if any(tensor.is_cuda for tensor in _tensors((*args, *kwargs.values()))):
            args, kwargs = to_host(self, args, kwargs)
        _launch.kernel = self.fn.__name__
        storages = [tensor.untyped_storage() for tensor in _tensors((*args, *kwargs.values()))]
        _launch.memory = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return args, kwargs

    def restore_args_dev(self, args, args_host, kwargs, kwargs_host):
        if args_host is not args:
            to_device(self, args, args_host, kwargs, kwargs_host)

    GridExecutor._init_args_hst = init_args_hst
    GridExecutor._restore_args_dev = restore_args_dev


def _access(verb: str, pointers: TensorHandle, mask: object) -> int:
    """Check the addresses of one access and return its bytes."""
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
    if addresses.size == 0:
        return 0
    low, high = int(addresses.min()), int(addresses.max()) + size
    if not any(start <= low and high <= end for start, end in _launch.memory):
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in _launch.memory:
            inside |= (addresses >= start) & (addresses <= end - size)
        if not inside.all():
            count = int((~inside).sum())
            raise IndexError(f"{_launch.kernel} {verb} {count} elements outside of its tensors")
    return addresses.size * size


def _watch_memory() -> None:
    """Raise on accesses outside the arguments' memory, and count the bytes of the others."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def masked_load(self, pointers, mask, *rest, **options):
        num_bytes = _access("reads", pointers, mask)
        if _launch.traffic is not None:
            _launch.traffic.loaded += num_bytes
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self, pointers, value, mask, *rest, **options):
        num_bytes = _access("writes", pointers, mask)
        if _launch.traffic is not None:
            _launch.traffic.stored += num_bytes
        return store(self, pointers, value, mask, *rest, **options)

    def atomic_rmw(self, operation, pointers, value, mask, *rest):
        _access("updates", pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest)

    def atomic_cas(self, pointers, *rest):
        everywhere = TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
        _access("updates", pointers, everywhere)
        return cas(self, pointers, *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
    InterpreterBuilder.create_atomic_rmw = atomic_rmw
    InterpreterBuilder.create_atomic_cas = atomic_cas


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes that kernels load and store inside the ``with`` block."""
    _launch.traffic = Traffic()
    try:
        yield _launch.traffic
    finally:
        _launch.traffic = None


def install() -> None:
    """Repair the interpreter. Once per process, before the first kernel runs."""
    _repair_fma()
    for name in ("binary_op", "unary_op", "create_rsqrt", "create_erf", "create_fma"):
        _on_values(name)
    _repair_select()
    _repair_casts()
    _repair_dot()
    _repair_reductions()
    _repair_index()
    _repair_splat()
    _repair_calls()
    _skip_copies()
    _watch_memory()
