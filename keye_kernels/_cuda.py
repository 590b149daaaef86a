"""Launches of the CUDA kernels of `csrc`: arguments, limits, scratch memory, registration."""

import itertools
import math
from collections.abc import Callable

import torch

from keye_kernels import _backends, _ext
from keye_kernels._device import device_of
from keye_kernels.rope import frequencies

_LOG2_E = 1.4426950408889634
_HEAD_DIMS = {"paged_decode_attention": (64, 72, 80, 128), "qk_norm_mrope_store": (64, 80, 128)}


def _why_not() -> str | None:
    if torch.cuda.is_available():
        return _ext.why_not_on(torch.cuda.get_device_capability())
    return _ext.why_not()


def register(op: str, run: Callable[..., None], refuses: Callable[..., str | None]) -> None:
    """Let the CUDA kernel of ``op`` serve, within the limits of the tables above."""
    _backends.register(
        op,
        "cuda",
        run,
        why_not=_why_not,
        refuses=refuses,
    )


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether a launch may begin while the kernel before it ends: from sm_90 on."""
    return tensor.is_cuda and device_of(tensor).capability >= (9, 0)


def check_dtype(tensor: torch.Tensor) -> str | None:
    """Why a kernel refuses the dtype, None if it takes it."""
    if tensor.dtype in _ext.DTYPES:
        return None
    return f"dtype must be torch.bfloat16 or torch.float16, got {tensor.dtype}"


def check_alignment(**tensors: torch.Tensor) -> str | None:
    """Why a kernel refuses these tensors: their rows must begin at multiples of 16 bytes."""
    for name, tensor in tensors.items():
        size = tensor.itemsize
        if math.gcd(tensor.data_ptr() // size, *tensor.stride()[:-1]) * size % 16:
            return (
                f"the rows of {name} must begin at multiples of 16 bytes, got address "
                f"{tensor.data_ptr():#x} and strides {tensor.stride()}"
            )
    return None


def _check_head_dim(op: str, head_dim: int) -> str | None:
    if head_dim in _HEAD_DIMS[op]:
        return None
    allowed = ", ".join(map(str, _HEAD_DIMS[op][:-1]))
    return f"head_dim must be {allowed} or {_HEAD_DIMS[op][-1]}, got {head_dim}"


class Counters:
    """Counters in device memory that are 0 between launches.

    The blocks of a launch count themselves, the last one does the rest and sets the counter back.
    So no launch clears anything, but launches that may run at the same time must not share
    counters. Each stream has its own, for ever; and so has each captured graph, since it may be
    replayed on any stream. All come out of one allocation, cleared before the first use.
    """

    SIZE = 512  # counters of one stream or graph; a launch that is split has few blocks of heads
    NUM_SLICES = 512  # 1 MiB per device

    def __init__(self) -> None:
        self._pools: dict[torch.device, list[torch.Tensor]] = {}
        self._slices: dict[tuple, torch.Tensor] = {}
        self._next: dict[torch.device, itertools.count] = {}

    def get(self, device: torch.device, stream: int, count: int) -> torch.Tensor:
        """``count`` counters or more, for launches on ``stream`` and, in a capture, its graph."""
        capture = _ext.extension().capture_id(stream)  # 0: none
        found = self._slices.get((device, stream, capture))
        if found is not None and count <= self.SIZE:
            return found
        if count <= self.SIZE and (device in self._pools or not capture):
            number = next(self._numbers(device))
            if number < self.NUM_SLICES:
                found = self._pools[device][number]
                return self._slices.setdefault((device, stream, capture), found)
        # Cleared by a launch of its own each time, in a graph at each replay.
        return torch.zeros(count, dtype=torch.int32, device=device)

    def _numbers(self, device: torch.device) -> itertools.count:
        if device not in self._pools:
            pool = torch.zeros((self.NUM_SLICES, self.SIZE), dtype=torch.int32, device=device)
            if device.type == "cuda":  # other streams use it too
                torch.cuda.current_stream(device).synchronize()
            self._next.setdefault(device, itertools.count())
            self._pools.setdefault(device, list(pool))
        return self._next[device]


counters = Counters()


def num_splits(batch_size: int, num_head_blocks: int, max_seqlen_k: int, num_sms: int) -> int:
    """Runs that a sequence is cut into, from shapes alone: a captured graph stays valid.

    Two blocks per multiprocessor keep enough bytes on their way. Past that a run is 2048 keys long,
    so that one long sequence among short ones is spread too. A run has 64 keys or more, a chunk for
    each warp.
    """
    blocks = batch_size * num_head_blocks
    fill = 2 * num_sms // blocks
    spread = min(-(-max_seqlen_k // 2048), 16 * num_sms // blocks)
    return max(min(max(fill, spread), -(-max_seqlen_k // 64), 128), 1)


def _paged_decode_attention_refuses(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,  # noqa: ARG001
    cache_seqlens: torch.Tensor,  # noqa: ARG001
    softmax_scale: float,  # noqa: ARG001
    max_seqlen_k: int,  # noqa: ARG001
    out: torch.Tensor,
    lse: torch.Tensor | None,  # noqa: ARG001
) -> str | None:
    return (
        check_dtype(q)
        or _check_head_dim("paged_decode_attention", q.shape[2])
        or check_alignment(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    )


def _paged_decode_attention_cuda(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    max_seqlen_k: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    batch_size, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    head_blocks = num_kv_heads * -(-group // 16)
    splits = num_splits(batch_size, head_blocks, max_seqlen_k, device_of(q).num_sms)
    stream = _ext.stream_of(q)
    partial_out = partial_lse = counts = None
    if splits > 1:
        rows = batch_size * head_blocks * splits * 16
        partial_out = torch.empty(rows * head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
        counts = counters.get(q.device, stream, batch_size * head_blocks)
    scratch = (0 if x is None else x.data_ptr() for x in (partial_out, partial_lse, counts))
    _ext.extension().paged_decode_attention(
        _ext.DTYPES[q.dtype], head_dim, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        block_table.data_ptr(), cache_seqlens.data_ptr(), out.data_ptr(),
        0 if lse is None else lse.data_ptr(), *scratch,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
        block_table.stride(0), out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        batch_size, num_kv_heads, group, page_size, max_seqlen_k, splits,
        softmax_scale * _LOG2_E, overlaps(q), stream,
    )  # fmt: skip


register("paged_decode_attention", _paged_decode_attention_cuda, _paged_decode_attention_refuses)


def _qk_norm_mrope_store_refuses(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,  # noqa: ARG001
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,  # noqa: ARG001
    num_heads: int,  # noqa: ARG001
    num_kv_heads: int,  # noqa: ARG001
    mrope_section: list[int],  # noqa: ARG001
    theta: float,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    out: torch.Tensor,
) -> str | None:
    tensors = {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "out": out}
    return (
        check_dtype(qkv)
        or _check_head_dim("qk_norm_mrope_store", q_weight.shape[0])
        or check_alignment(**tensors, k_cache=k_cache, v_cache=v_cache)
    )


def _qk_norm_mrope_store_cuda(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    mrope_section: list[int],
    theta: float,
    eps: float,
    out: torch.Tensor,
) -> None:
    head_dim = q_weight.shape[0]
    _ext.extension().qk_norm_mrope_store(
        _ext.DTYPES[qkv.dtype], head_dim, qkv.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(),
        positions.data_ptr(), frequencies(head_dim, theta, 1, qkv.device).data_ptr(),
        k_cache.data_ptr(), v_cache.data_ptr(), slot_mapping.data_ptr(), out.data_ptr(),
        qkv.stride(0), positions.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
        out.stride(0), out.stride(1), qkv.shape[0], num_heads, num_kv_heads, k_cache.shape[1],
        mrope_section[0], mrope_section[1], eps, device_of(qkv).num_sms, overlaps(qkv),
        _ext.stream_of(qkv),
    )  # fmt: skip


register("qk_norm_mrope_store", _qk_norm_mrope_store_cuda, _qk_norm_mrope_store_refuses)


def num_column_runs(tiles: int, in_features: int, num_sms: int) -> int:
    """Blocks that share a tile of 64 weight rows in linear, each with a run of its columns.

    To read at full rate, latency x bandwidth must be on its way: on an H200 some 1 µs x 4.3 TB/s,
    33 KB for each of 132 multiprocessors. A block keeps 32 KB on its way, and three fit: one reads
    while another starts or ends, and there are blocks for all three as far as a run has 1024
    columns, 128 KB or 4 µs of a multiprocessor's share. Shorter ones would begin and end more than
    read.

    At 4096 columns that is 256 blocks for 4096 rows, 384 for 6144 and for 2 x 12288, at 12288
    columns 384 for 4096 rows, of 396 at a time; the head's 2374 come one after the other.
    """
    return max(min(3 * num_sms // tiles, -(-in_features // 1024)), 1)


def _linear_refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float | None,  # noqa: ARG001
    residual: torch.Tensor | None,
    swiglu: bool,  # noqa: ARG001
    out: torch.Tensor,
) -> str | None:
    if x.shape[0] > 16:  # rows of one MMA
        return f"x must have at most 16 rows, got {x.shape[0]}"
    for name, size in (("in_features", x.shape[1]), ("the result's width", out.shape[1])):
        if size % 8:
            return f"{name} must be a multiple of 8, got {size}"
    optional = {"bias": bias, "norm_weight": norm_weight, "residual": residual}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    return check_dtype(x) or check_alignment(x=x, weight=weight, out=out, **given)


def _linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    swiglu: bool,
    out: torch.Tensor,
) -> None:
    num_rows, in_features = x.shape
    width = out.shape[1]
    tiles = -(-width // (32 if swiglu else 64))
    splits = num_column_runs(tiles, in_features, device_of(x).num_sms)
    stream = _ext.stream_of(x)
    partial = counts = None
    if splits > 1:
        size = tiles * splits * num_rows * 64
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counts = counters.get(x.device, stream, tiles)
    tensors = (x, weight, bias, norm_weight, residual, out, partial, counts)
    _ext.extension().linear(
        _ext.DTYPES[x.dtype], *(0 if t is None else t.data_ptr() for t in tensors),
        x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        out.stride(0), num_rows, in_features, width, splits, eps or 0.0, swiglu, overlaps(x),
        stream,
    )  # fmt: skip


register("linear", _linear_cuda, _linear_refuses)
