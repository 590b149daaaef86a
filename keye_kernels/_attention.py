"""One attention kernel for packed and for paged keys, and what its launches choose.

Online softmax over key tiles, in fp32 and base 2. A head_dim that is no power of two is taken in
two parts, 72 as 64 + 8: products over all of it need two dots, but no padding to 96 or 128.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels._combine import combine
from keye_kernels._device import Device, device_of
from keye_kernels._tuples import decode_all, encode


class LaunchConfig(NamedTuple):
    """Queries and keys per tile, warps, pipeline depth, bound on registers per thread or None.

    early: Values are loaded before the branch that masks scores: one barrier less per tile.
    polynomial: A quarter of the exponentials are computed by multiply-adds.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    early: bool = False
    polynomial: bool = False


@triton.constexpr_function
def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Split head_dim into two powers of two; the second is 0 if one is enough."""
    head = 1 << (head_dim.bit_length() - 1)
    tail = triton.next_power_of_2(head_dim - head) if head_dim > head else 0
    return (2 * head, 0) if tail == head else (head, tail)


def choose_block_m(num_tokens: int, num_heads: int, num_sms: int) -> int:
    """Queries per program.

    128 read half as much from the L2 cache per FLOP as 64, which fill the GPU where two programs
    of 128 per multiprocessor would not.
    """
    return 128 if num_tokens * num_heads >= 2 * 128 * num_sms else 64


def launch_config(
    num_tokens: int, num_heads: int, head_dim: int, itemsize: int, device: Device, block_m: int
) -> LaunchConfig:
    """Choose the launch; ``block_m`` is that of a schedule, 0 if there is none.

    ``block_n`` depends on the head alone, so that the order in which a query meets its keys, and
    with it every bit of its result, is the same whatever else is in the batch.
    """
    head, _ = split_head_dim(head_dim)
    major = device.capability[0]
    if head == 128 and major not in (9, 10):
        # One program per multiprocessor fits at either size, and the one of 64 queries spills. More
        # warps for it would change the order of sums.
        block_m = 128
    elif block_m == 0:
        block_m = choose_block_m(num_tokens, num_heads, device.num_sms)
    # Unbounded, ptxas spills so that a third 4-warp program fits; 255 prevents it. At 72 and 80
    # columns no bound is needed.
    fits = itemsize == 2 and 64 < head_dim <= 80
    max_registers = 255 if block_m == 64 and not fits else None
    if itemsize == 4:
        # More keys of 256 columns would not fit into the shared memory of sm_80.
        block_n, num_stages = 32 if head <= 128 else 16, 2 if head <= 64 else 1
    elif head <= 64:
        block_n, num_stages = 64, 3
        # Three programs of 4 warps per multiprocessor, and on sm_90 two of 8: one computes
        # exponentials while another multiplies. Elsewhere, and with more columns, it would spill;
        # on sm_80 causal calls and those with lse do, up to 32 bytes at 72 columns.
        if major == 9 and head_dim <= 80:
            max_registers = 128 if block_m == 128 else 168
        elif device.capability == (8, 0) and head_dim <= 72 and block_m == 64:
            max_registers = 168
    else:
        # One stage less where a program has 99 KB of shared memory at most.
        fewer = device.capability in ((8, 6), (8, 9)) or major == 12
        block_n, num_stages = (64, 3 - fewer) if head <= 128 else (32, 2 - fewer)
        max_registers = max_registers if head <= 128 else None
    return LaunchConfig(block_m, block_n, block_m // 16, num_stages, max_registers)


def choose_num_pieces(num_programs: int, max_seqlen_k: int, block_m: int, num_sms: int) -> int:
    """Pieces of the keys of each sequence, from shapes alone, so that a captured graph stays valid.

    ``num_programs`` would run if keys were not split. Pieces have at least 1024 keys as long as
    each program has a multiprocessor to itself; at least 2048 where two of 64 queries share one,
    since both are slower then. Fewer would not save what a second launch costs.
    """
    alone = num_sms // num_programs
    shared = 2 * num_sms // num_programs if block_m == 64 else 0
    return max(min(alone, max_seqlen_k // 1024), min(shared, max_seqlen_k // 2048), 1)


@triton.jit
def find_tile(cu_seqlens_ptr, tile, batch_size, BLOCK_M: tl.constexpr):
    """Sequence and first row of a tile. One load answers for 256 sequences.

    Sequence i begins at tile cu_seqlens[i] // BLOCK_M + i, which leaves room for all rows before.
    """
    count = 0
    for start in tl.range(0, batch_size, 256):
        i = start + tl.arange(0, 256)
        begins = tl.load(cu_seqlens_ptr + i, mask=i < batch_size, other=0) // BLOCK_M + i
        count += tl.sum(((i < batch_size) & (begins <= tile)).to(tl.int32))
    sequence = count - 1
    begin = tl.load(cu_seqlens_ptr + sequence) // BLOCK_M + sequence
    return sequence, (tile - begin) * BLOCK_M


@triton.jit
def _load(ptrs, mask, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns START to START + WIDTH of rows [BLOCK, 1]; 0 outside."""
    cols = START + tl.arange(0, WIDTH)[None, :]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (cols < HEAD_DIM)
    return tl.load(ptrs + cols, mask=mask, other=0.0)


@triton.jit
def _store(ptrs, x, mask, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    cols = START + tl.arange(0, WIDTH)[None, :]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (cols < HEAD_DIM)
    tl.store(ptrs + cols, x.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _pages(table_ptr, start_n, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the keys from start_n on: one for all of them where a tile lies within a page."""
    if PAGE_SIZE == 0:
        pages = tl.full((), 0, tl.int64)
    elif PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table_ptr + start_n // PAGE_SIZE, mask=start_n < end, other=0)
    else:
        keys = start_n + tl.arange(0, BLOCK_N)[:, None]
        pages = tl.load(table_ptr + keys // PAGE_SIZE, mask=keys < end, other=0)  # [BLOCK_N, 1]
    return pages.to(tl.int64)


@triton.jit
def _key_rows(
    ptr, pages, start_n, stride_page, stride,
    UNIT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pointers [BLOCK_N, 1] to the rows of the keys from start_n on, which lie in ``pages``."""
    # The order of these sums matters: others spill (Triton 3.7.1 on sm_80, 3.9.0 on sm_90).
    stride = stride.to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    if PAGE_SIZE % BLOCK_N > 0:  # a page for each key
        rows = (start_n + offs_n) % PAGE_SIZE
        return ptr + (pages * stride_page + rows * stride) * UNIT
    if PAGE_SIZE > 0:
        ptr += pages * stride_page * UNIT
        start_n %= PAGE_SIZE
    return ptr + start_n * (stride * UNIT) + offs_n * (stride * UNIT)


@triton.jit
def _exp2(x):
    """exp2 of x <= 0 by multiply-adds, with a relative error of 1.1e-4; 2^-126 below that.

    bf16 rounds by up to 3.9e-3, fp16 by 4.9e-4. 1.5 x 2^23 rounds x to an integer and leaves it in
    the lowest bits. The polynomial is the best of degree 3 between -0.5 and 0.5 that is 1 at 0.
    """
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0
    rest = x - (shifted - 12582912.0)
    y = tl.fma(rest, 0.0550090578, 0.242210975)
    y = tl.fma(tl.fma(y, rest, 0.693282898), rest, 1.0)
    bits = y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


# These change from call to call: a kernel for each divisibility would be compiled on the way.
@triton.jit(do_not_specialize=["stride_lse", "stride_table", "batch_size", "group"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, seqlens_k_ptr, table_ptr, tiles_ptr,
    strides_q, strides_out, strides_k, strides_v, stride_lse, stride_table,
    scale, batch_size, group,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, POLYNOMIAL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    HEAD: tl.constexpr = split_head_dim(HEAD_DIM)[0]
    TAIL: tl.constexpr = split_head_dim(HEAD_DIM)[1]
    stride_q, stride_q_head = decode_all(strides_q)
    stride_out, stride_out_head = decode_all(strides_out)
    stride_k_page, stride_k, stride_k_head = decode_all(strides_k)
    stride_v_page, stride_v, stride_v_head = decode_all(strides_v)
    # All tiles of a key/value head, then of the next one: what it reads stays in the L2 cache.
    kv_head = tl.program_id(1).to(tl.int64)
    head = kv_head * group + tl.program_id(0) % group
    tile = tl.program_id(0) // group
    if tiles_ptr is None:
        # Of causal tiles the last ones see the most keys: they start first.
        tile = tl.num_programs(0) // group - 1 - tile if CAUSAL else tile
        sequence, first = find_tile(cu_seqlens_q_ptr, tile, batch_size, BLOCK_M)
    else:
        sequence = tl.load(tiles_ptr + 2 * tile)
        first = tl.load(tiles_ptr + 2 * tile + 1)
    start_q = tl.load(cu_seqlens_q_ptr + sequence)
    len_q = tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q
    if first >= len_q:
        return
    if PAGE_SIZE > 0:
        len_k = tl.load(seqlens_k_ptr + sequence)
        table_ptr += sequence.to(tl.int64) * stride_table
    else:
        start_k = tl.load(seqlens_k_ptr + sequence)
        len_k = tl.load(seqlens_k_ptr + sequence + 1) - start_k
        k_ptr += start_k.to(tl.int64) * stride_k * UNIT
        v_ptr += start_k.to(tl.int64) * stride_v * UNIT
    k_ptr += kv_head * stride_k_head * UNIT
    v_ptr += kv_head * stride_v_head * UNIT
    q_ptr += (start_q.to(tl.int64) * stride_q + head * stride_q_head) * UNIT
    out_ptr += (start_q.to(tl.int64) * stride_out + head * stride_out_head) * UNIT

    # tl.dot needs K >= 16 but allows N = 8.
    HEAD_QK: tl.constexpr = 16 if HEAD == 8 else HEAD
    TAIL_QK: tl.constexpr = 16 if TAIL == 8 else TAIL
    rows = first + tl.arange(0, BLOCK_M)
    mask_m = (rows < len_q)[:, None]
    q_ptrs = q_ptr + rows[:, None].to(tl.int64) * (stride_q * UNIT)
    q = _load(q_ptrs, mask_m, 0, HEAD_QK, HEAD_DIM)  # [BLOCK_M, HEAD_QK]
    acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
    if TAIL > 0:
        q_tail = _load(q_ptrs, mask_m, HEAD, TAIL_QK, HEAD_DIM)  # [BLOCK_M, TAIL_QK]
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)

    # Every row sees all keys before `full`, none sees one from `end` on.
    full = len_k
    end = len_k
    if CAUSAL:
        shift = len_k - len_q
        full = tl.minimum(len_k, shift + first + 1)
        end = tl.minimum(len_k, shift + first + BLOCK_M)
    start = 0
    if SPLIT:  # into pieces of whole tiles; the first ``rest`` have one more than the others
        piece, num_pieces = tl.program_id(2), tl.num_programs(2)
        num_tiles = tl.cdiv(len_k, BLOCK_N)
        length, rest = num_tiles // num_pieces, num_tiles % num_pieces
        start = (piece * length + tl.minimum(piece, rest)) * BLOCK_N
        end = tl.minimum(end, start + (length + (piece < rest).to(tl.int32)) * BLOCK_N)
    # `scale` is softmax_scale * log2(e). `base` is the largest scaled score; its rounding cancels,
    # because all weights of a row use it, and lse adds it back.
    base = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    pages = _pages(table_ptr, start, end, PAGE_SIZE, BLOCK_N)
    for start_n in tl.range(start, end, BLOCK_N):
        k_ptrs = _key_rows(k_ptr, pages, start_n, stride_k_page, stride_k, UNIT, PAGE_SIZE, BLOCK_N)
        v_ptrs = _key_rows(v_ptr, pages, start_n, stride_v_page, stride_v, UNIT, PAGE_SIZE, BLOCK_N)
        # One tile ahead: addresses wait for it.
        pages = _pages(table_ptr, start_n + BLOCK_N, end, PAGE_SIZE, BLOCK_N)

        mask_n = (start_n + offs_n < end)[:, None]
        k = _load(k_ptrs, mask_n, 0, HEAD_QK, HEAD_DIM)  # [BLOCK_N, HEAD_QK]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if TAIL > 0:
            k_tail = _load(k_ptrs, mask_n, HEAD, TAIL_QK, HEAD_DIM)  # [BLOCK_N, TAIL_QK]
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        if EARLY:
            v = _load(v_ptrs, mask_n, 0, HEAD, HEAD_DIM)  # [BLOCK_N, HEAD]
            if TAIL > 0:
                v_tail = _load(v_ptrs, mask_n, HEAD, TAIL, HEAD_DIM)  # [BLOCK_N, TAIL]
        if start_n + BLOCK_N > full:
            keys = start_n + offs_n[None, :]
            seen = keys < len_k
            if CAUSAL:
                seen = keys < tl.minimum(len_k, shift + rows[:, None] + 1)
            scores = tl.where(seen, scores, float("-inf"))

        new = tl.maximum(base, tl.max(scores, axis=1) * scale)
        minus = -new
        if CAUSAL:
            minus = tl.where(new == float("-inf"), 0.0, minus)  # of rows that have seen no key yet
        scores = tl.fma(scores, scale, minus[:, None])
        weights = tl.exp2(scores)
        if POLYNOMIAL:  # the columns that are the same for all threads
            weights = tl.where(offs_n[None, :] // 8 % 4 == 3, _exp2(scores), weights)
        shrink = tl.exp2(base + minus)
        total = total * shrink + tl.sum(weights, axis=1)
        base = new
        weights = weights.to(v_ptr.dtype.element_ty)
        if not EARLY:
            v = _load(v_ptrs, mask_n, 0, HEAD, HEAD_DIM)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
        if TAIL > 0:
            if not EARLY:
                v_tail = _load(v_ptrs, mask_n, HEAD, TAIL, HEAD_DIM)
            acc_tail = tl.dot(weights, v_tail, acc_tail * shrink[:, None], input_precision="ieee")

    if SPLIT:  # out and lse are [num_tokens, num_heads, num_pieces, head_dim or 2]
        out_ptr += piece * HEAD_DIM
    else:
        total = tl.where(total == 0, 1.0, total)  # rows that saw no key: 0, and -inf for lse
        acc /= total[:, None]
        if TAIL > 0:
            acc_tail /= total[:, None]
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * (stride_out * UNIT)
    _store(out_ptrs, acc, mask_m, 0, HEAD, HEAD_DIM)
    if TAIL > 0:
        _store(out_ptrs, acc_tail, mask_m, HEAD, TAIL, HEAD_DIM)
    if SPLIT:
        num_heads = group * tl.num_programs(1)
        places = ((start_q + rows).to(tl.int64) * num_heads + head) * num_pieces + piece
        tl.store(lse_ptr + 2 * places, base, mask=rows < len_q)
        tl.store(lse_ptr + 2 * places + 1, total, mask=rows < len_q)
    elif lse_ptr is not None:
        lse = (base + tl.log2(total)) * 0.6931471805599453  # ln 2
        tl.store(lse_ptr + head * stride_lse + start_q + rows, lse, mask=rows < len_q)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    tiles: torch.Tensor | None = None,
    block_m: int = 0,
    max_seqlen_k: int = 0,
    changes: dict[str, int | None] | None = None,
) -> None:
    """Start the kernel.

    With ``block_table`` k and v are the pages of a cache and ``seqlens_k`` holds lengths; without,
    starts. Without ``tiles`` each program finds its own, of a number that is enough for any
    lengths; so it does where ``tiles`` are of a size that this GPU does not take. Keys are split
    where ``max_seqlen_k`` is long and queries are few. ``changes`` replace fields of the launch.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, batch_size = k.shape[-2], cu_seqlens_q.shape[0] - 1
    group = num_heads // num_kv_heads
    device = device_of(q)
    config = launch_config(num_tokens, num_heads, head_dim, q.itemsize, device, block_m)
    config = config._replace(**changes or {})
    if config.block_m != block_m:
        tiles = None
    num_tiles = num_tokens // config.block_m + batch_size if tiles is None else tiles.shape[0]
    used = min(batch_size, num_tokens)  # of sequences with queries, and then the most tiles
    num_programs = ((num_tokens - used) // config.block_m + used) * num_heads
    num_pieces = choose_num_pieces(num_programs, max_seqlen_k, config.block_m, device.num_sms)
    written, stats = out, lse
    if num_pieces > 1:
        rows = (num_tokens, num_heads, num_pieces)
        written = torch.empty((*rows, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((*rows, 2), dtype=torch.float32, device=q.device)
    paged = block_table is not None
    strides = [q.stride()[:2], written.stride()[:2]]
    strides += [x.stride()[:-1] if paged else (0, *x.stride()[:-1]) for x in (k, v)]
    # In units of 8 elements: so the compiler knows that a thread's 16 bytes are aligned.
    unit = 1 if any(stride % 8 for some in strides for stride in some) else 8
    _attention_kernel[(num_tiles * group, num_kv_heads, num_pieces)](
        q, k, v, written, stats, cu_seqlens_q, seqlens_k, block_table, tiles,
        *(encode([stride // unit for stride in some]) for some in strides),
        0 if lse is None else lse.stride(0), block_table.stride(0) if paged else 0,
        softmax_scale * 1.4426950408889634, batch_size, group,  # log2(e)
        HEAD_DIM=head_dim, PAGE_SIZE=k.shape[1] if paged else 0, CAUSAL=causal, UNIT=unit,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, EARLY=config.early,
        POLYNOMIAL=config.polynomial, SPLIT=num_pieces > 1, num_warps=config.num_warps,
        num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    if num_pieces > 1:
        combine(written, stats, out, lse)
