"""Attention of one new token per sequence over a paged key/value cache.

The keys of a sequence are cut into pieces of whole tiles. A program of the Triton kernel computes
one piece for one key/value head; the query heads of its group are the rows of its matrix products.
A second launch combines the pieces; where there is one piece, the first writes the result. The CUDA
kernel of `csrc` calls pieces runs and combines them in the same launch, in the last block.

The number of pieces follows from shapes, so a captured graph stays valid. Where they start follows
from the sequence's own length, read on the device: pieces are equal to within a tile, and the
result of a sequence depends on its neighbours only by the number of pieces.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, _cuda, _ext, reference
from keye_kernels._checks import check_paged
from keye_kernels._combine import ROUND, combine
from keye_kernels._device import device_of
from keye_kernels._ops import define_op

_paged_decode_attention_op = define_op(
    "paged_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor cache_seqlens, float softmax_scale, SymInt max_seqlen_k, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()",
    reference=reference.paged_decode_attention,
    tuples={"out": ("out", "lse")},
)

_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
# With 5 stages Triton loads entries of the block table four tiles ahead, so that keys and values
# are loaded two tiles ahead. With 3 or 4 it buffers one tile of keys and values only, and if the
# loop carries a page number from tile to tile, it does not pipeline at all.
_STAGES = 5
_MAX_RUNS = 128  # of the CUDA kernel: kMaxSplits of csrc


class LaunchConfig(NamedTuple):
    """Pieces of a sequence, query heads of a program, and keys of a tile."""

    num_splits: int
    heads: int
    keys: int
    num_warps: int = 4
    num_stages: int = _STAGES


def launch_config(
    batch_size: int,
    group: int,
    num_kv_heads: int,
    block: int,
    itemsize: int,
    max_seqlen_k: int,
    num_sms: int,
) -> LaunchConfig:
    """Choose the launch for ``group`` query heads per key/value head.

    ``block`` is head_dim with padding.

    Two programs per multiprocessor have enough bytes in flight. With more, pieces have 2048 keys,
    so that a program writes only 0.2 % of what it reads. There are up to 16 programs per
    multiprocessor, so that one long sequence among short ones is spread too.
    """
    if itemsize == 4:  # no tensor cores: larger tiles do not fit into registers
        heads = keys = 16
    else:
        heads = max(triton.next_power_of_2(group), 16)  # tl.dot needs M >= 16
        heads = min(heads, 8192 // block, 64)  # 16 KB of queries
        keys = min(8192 // block, 64)  # 16 KB of keys, and of values
    programs = batch_size * num_kv_heads * triton.cdiv(group, heads)  # per piece
    fill = 2 * num_sms // programs
    if fill > ROUND:
        fill -= fill % ROUND
    spread = min(triton.cdiv(max_seqlen_k, 2048), 16 * num_sms // programs)
    num_splits = min(max(fill, spread), triton.cdiv(max_seqlen_k, keys))
    return LaunchConfig(max(num_splits, 1), heads, keys)


@triton.jit
def _length(seqlens_ptr, row, max_seqlen_k, KEYS: tl.constexpr):
    """Keys of a sequence, at most max_seqlen_k, and the number of their tiles."""
    seqlen = tl.minimum(tl.load(seqlens_ptr + row), max_seqlen_k)
    return seqlen, tl.cdiv(seqlen, KEYS)


@triton.jit
def _page_and_row(table_ptr, start, end, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Pages of the KEYS keys from ``start`` on, one for all if it holds them, and rows in them."""
    if PAGE_SIZE % KEYS == 0:
        page = tl.load(table_ptr + start // PAGE_SIZE)
        row = (start % PAGE_SIZE + tl.arange(0, KEYS))[:, None]
    else:
        keys = start + tl.arange(0, KEYS)
        page = tl.load(table_ptr + keys // PAGE_SIZE, mask=keys < end, other=0)[:, None]
        row = (keys % PAGE_SIZE)[:, None]
    return page.to(tl.int64), row.to(tl.int64)


@triton.jit(do_not_specialize=["stride_table", "stride_lse", "max_seqlen_k"])
def _paged_decode_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, seqlens_ptr, out_ptr, lse_ptr, sums_ptr, stats_ptr,
    stride_q, stride_k_page, stride_v_page, stride_table, stride_out, stride_lse,
    num_kv_heads, max_seqlen_k, scale,
    # Constants, so that Triton knows that heads of 72 elements start at multiples of 16 bytes.
    stride_q_head: tl.constexpr, stride_k_row: tl.constexpr, stride_k_head: tl.constexpr,
    stride_v_row: tl.constexpr, stride_v_head: tl.constexpr, stride_out_head: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, NUM_STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    PRECISION: tl.constexpr = "ieee" if k_cache_ptr.dtype.element_ty == tl.float32 else "tf32"
    # Programs of one piece are neighbours, as the rows of their key/value heads are in memory.
    pid, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = (pid // (num_kv_heads * BLOCKS)).to(tl.int64)
    kv_head = pid // BLOCKS % num_kv_heads
    in_group = pid % BLOCKS * HEADS + tl.arange(0, HEADS)
    head = (kv_head * GROUP + in_group).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask_head, mask_cols = (in_group < GROUP)[:, None], (cols < HEAD_DIM)[None, :]

    seqlen, num_tiles = _length(seqlens_ptr, row, max_seqlen_k, KEYS)
    q_ptrs = q_ptr + row * stride_q + head[:, None] * stride_q_head + cols[None, :]
    q = tl.load(q_ptrs, mask=mask_head & mask_cols, other=0.0)  # [HEADS, BLOCK]
    # The first ``rest`` pieces have one tile more than the others.
    length, rest = num_tiles // num_splits, num_tiles % num_splits
    start = (split * length + tl.minimum(split, rest)) * KEYS
    end = tl.minimum(start + (length + (split < rest).to(tl.int32)) * KEYS, seqlen)

    table_ptr += row * stride_table
    k_ptrs = k_cache_ptr + kv_head.to(tl.int64) * stride_k_head + cols[None, :]
    v_ptrs = v_cache_ptr + kv_head.to(tl.int64) * stride_v_head + cols[None, :]
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    weights = tl.zeros((HEADS, KEYS), tl.float32)  # summed after the loop: no reduction per tile
    acc = tl.zeros((HEADS, BLOCK), tl.float32)
    for first in tl.range(start, end, KEYS, num_stages=NUM_STAGES):
        page, row_in_page = _page_and_row(table_ptr, first, end, PAGE_SIZE, KEYS)
        visible = first + tl.arange(0, KEYS) < end
        mask = visible[:, None] & mask_cols
        k = tl.load(k_ptrs + (page * stride_k_page + row_in_page * stride_k_row), mask, other=0.0)
        v = tl.load(v_ptrs + (page * stride_v_page + row_in_page * stride_v_row), mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # in powers of 2
        scores = tl.where(visible[None, :], scores, float("-inf"))  # [HEADS, KEYS]
        above = tl.maximum(peak, tl.max(scores, axis=1))
        p = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(peak - above)[:, None]
        weights = weights * shrink + p
        acc = tl.dot(p.to(v.dtype), v, acc * shrink, input_precision=PRECISION)
        peak = above
    total = tl.sum(weights, axis=1)

    if SPLIT:
        if start < end:  # the second launch skips pieces without keys
            rows = (row * num_kv_heads * GROUP + head) * num_splits + split
            sums_ptrs = sums_ptr + rows[:, None] * HEAD_DIM + cols[None, :]
            tl.store(sums_ptrs, acc, mask_head & mask_cols)
            tl.store(stats_ptr + 2 * rows, peak, in_group < GROUP)
            tl.store(stats_ptr + 2 * rows + 1, total, in_group < GROUP)
    else:
        if lse_ptr is not None:
            lse_ptrs = lse_ptr + head * stride_lse + row
            tl.store(lse_ptrs, (peak + tl.log2(total)) * _LN_2, in_group < GROUP)
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        out_ptrs = out_ptr + row * stride_out + head[:, None] * stride_out_head + cols[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask_head & mask_cols)


def _paged_decode_attention_triton(
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
    group, block = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    num_sms = device_of(q).num_sms
    config = launch_config(
        batch_size, group, num_kv_heads, block, q.itemsize, max_seqlen_k, num_sms
    )
    split = config.num_splits > 1
    stride_lse = 0 if lse is None else lse.stride(0)
    sums = stats = None
    if split:
        rows = (batch_size, num_heads, config.num_splits)
        sums = torch.empty((*rows, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((*rows, 2), dtype=torch.float32, device=q.device)
    programs = batch_size * num_kv_heads * triton.cdiv(group, config.heads)
    _paged_decode_attention_kernel[(programs, config.num_splits)](
        q, k_cache, v_cache, block_table, cache_seqlens, out, lse, sums, stats,
        q.stride(0), k_cache.stride(0), v_cache.stride(0), block_table.stride(0), out.stride(0),
        stride_lse, num_kv_heads, max_seqlen_k, softmax_scale * _LOG2_E,
        q.stride(1), *k_cache.stride()[1:3], *v_cache.stride()[1:3], out.stride(1),
        GROUP=group, PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK=block, HEADS=config.heads,
        KEYS=config.keys, NUM_STAGES=config.num_stages, SPLIT=split, num_warps=config.num_warps,
    )  # fmt: skip
    if split:
        combine(
            sums, stats, out, lse,
            cache_seqlens=cache_seqlens, max_seqlen_k=max_seqlen_k, keys=config.keys,
        )  # fmt: skip


_backends.register("paged_decode_attention", "triton", _paged_decode_attention_triton)
_backends.register_class(
    "paged_decode_attention", lambda q, *args: ((q.shape[2],), (q.shape[0], args[5]))
)


def _num_runs(batch_size: int, num_head_blocks: int, max_seqlen_k: int, num_sms: int) -> int:
    """Runs that the CUDA kernel cuts a sequence into.

    Two blocks per multiprocessor have enough bytes in flight. With more, a run has 2048 keys, so
    that one long sequence among short ones is spread too. A run has 64 keys or more, a chunk of 16
    for each warp.
    """
    blocks = batch_size * num_head_blocks
    fill = 2 * num_sms // blocks
    spread = min(-(-max_seqlen_k // 2048), 16 * num_sms // blocks)
    return max(min(max(fill, spread), -(-max_seqlen_k // 64), _MAX_RUNS), 1)


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
    num_splits = _num_runs(batch_size, head_blocks, max_seqlen_k, device_of(q).num_sms)
    stream = _ext.stream_of(q)
    partial_out = partial_lse = counts = None
    if num_splits > 1:
        rows = batch_size * head_blocks * num_splits * 16
        partial_out = torch.empty(rows * head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
        counts = _cuda.counters.get(q.device, stream, batch_size * head_blocks)
    _ext.extension().paged_decode_attention(
        dtype=_ext.DTYPES[q.dtype], head_dim=head_dim, q=q.data_ptr(), k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(), block_table=block_table.data_ptr(),
        cache_seqlens=cache_seqlens.data_ptr(), out=out.data_ptr(), lse=_cuda.address(lse),
        partial_out=_cuda.address(partial_out), partial_lse=_cuda.address(partial_lse),
        counters=_cuda.address(counts), q_strides=q.stride(), k_strides=k_cache.stride(),
        v_strides=v_cache.stride(), out_strides=out.stride(), stride_table=block_table.stride(0),
        stride_lse=0 if lse is None else lse.stride(0), batch_size=batch_size,
        num_kv_heads=num_kv_heads, group=group, page_size=page_size, max_seqlen_k=max_seqlen_k,
        num_splits=num_splits, scale=softmax_scale * _LOG2_E, overlap=_cuda.overlaps(q),
        stream=stream,
    )  # fmt: skip


_LIMITS = _cuda.CudaLimits(
    aligned=("q", "k_cache", "v_cache", "out"), head_dims=(64, 72, 80, 128), head_dim_of="q"
)
_cuda.register("paged_decode_attention", _paged_decode_attention_cuda, _LIMITS)


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    max_seqlen_k: int,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from one new token per sequence to all of the sequence, read from the cache.

    Args:
        q: [batch_size, num_heads, head_dim], fp32 / fp16 / bf16, head_dim a multiple of 8 up to
            256. Any strides with a contiguous last dim.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], dtype of ``q``, pages in
            any order, page_size a multiple of 16. Rows past cache_seqlens are never read.
        block_table: [batch_size, max_pages] int32, pages of each sequence in order. Entries past
            the last page in use are never read.
        cache_seqlens: [batch_size] int32, tokens in the cache, the new one included. A row with 0
            (padding of a batch) gives 0.
        softmax_scale: Factor on q k^T, default head_dim ** -0.5.
        max_seqlen_k: Longest in cached tokens, or more, also more than block_table can name.
        return_lse: Also return the log-sum-exp of the scaled scores.
        out: Like ``q``.

    Returns:
        out [batch_size, num_heads, head_dim], dtype of ``q``, contiguous; with ``return_lse`` the
        pair (out, lse), lse [num_heads, batch_size] fp32, natural logarithm, -inf where no token is
        in the cache. Scores and softmax in fp32. Results over parts of a cache combine by their
        lse. With the same batch_size and max_seqlen_k a sequence gets the same bits whatever its
        neighbours hold; another value of either may change the number of pieces, and so the order
        of sums.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, the
            contents of cache_seqlens or the part of block_table in use do.
    """
    scale, max_seqlen_k = check_paged(
        q, k_cache, v_cache, block_table, cache_seqlens, max_seqlen_k, softmax_scale, out
    )
    if q.shape[0] != block_table.shape[0]:
        raise ValueError(
            f"q must have one row per row of block_table ({block_table.shape[0]}), got {q.shape[0]}"
        )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32) if return_lse else None
    if q.shape[0] > 0:
        _paged_decode_attention_op(
            q, k_cache, v_cache, block_table, cache_seqlens, scale, max_seqlen_k, out, lse
        )
    return out if lse is None else (out, lse)
