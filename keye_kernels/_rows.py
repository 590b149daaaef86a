"""Whole rows in registers, for Triton kernels that normalise over the last dim.

A row is a tuple of adjacent chunks [ROWS, CHUNK], so its width need not be a power of two: 1152
takes five chunks of 256, 40 registers per thread, where one block of 2048 takes 64. All chunks have
the same layout, so they are added element by element and reduced once.
"""

import triton
import triton.language as tl


def power_of_2(value: int, low: int, high: int) -> int:
    """Largest power of 2 up to ``value``, inside [low, high]."""
    return min(max(1 << max(value, 1).bit_length() - 1, low), high)


@triton.jit
def _columns(mask_row, START: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Columns and mask of the chunk at START; only the last, partial chunk is masked."""
    cols = tl.arange(START, START + CHUNK)[None, :]
    if START + CHUNK > WIDTH:
        mask_row = mask_row & (cols < WIDTH)
    return cols, mask_row


@triton.jit
def load_rows(ptr, offs_row, mask_row, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Load rows at ``ptr + offs_row`` ([ROWS, 1]); 0 outside ``mask_row`` ([ROWS, 1], or True)."""
    chunks = ()
    for start in tl.static_range(0, WIDTH, CHUNK):
        cols, mask = _columns(mask_row, start, WIDTH, CHUNK)
        chunks += (tl.load(ptr + offs_row + cols, mask=mask, other=0.0),)  # [ROWS, CHUNK]
    return chunks


@triton.jit
def store_rows(ptr, offs_row, mask_row, chunks, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Round rows to the dtype of ``ptr`` and write them at ``ptr + offs_row``."""
    for i in tl.static_range(len(chunks)):
        cols, mask = _columns(mask_row, i * CHUNK, WIDTH, CHUNK)
        tl.store(ptr + offs_row + cols, chunks[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def round_rows(chunks, dtype: tl.constexpr):
    """Cast the chunks to ``dtype``."""
    rounded = ()
    for i in tl.static_range(len(chunks)):
        rounded += (chunks[i].to(dtype),)
    return rounded


@triton.jit
def add_rows(chunks, others):
    """Add in fp32 and round to the dtype of ``chunks``."""
    total = ()
    for i in tl.static_range(len(chunks)):
        x = chunks[i].to(tl.float32) + others[i].to(tl.float32)
        total += (x.to(chunks[i].dtype),)
    return total


@triton.jit
def mean_square(chunks, WIDTH: tl.constexpr):
    """Mean of the squares of each row, fp32 [ROWS, 1]."""
    total = 0.0
    for i in tl.static_range(len(chunks)):
        x = chunks[i].to(tl.float32)
        total += x * x
    return tl.sum(total, axis=1, keep_dims=True) / WIDTH


@triton.jit
def _sum(total, JOINT: tl.constexpr):
    sums = tl.sum(total, axis=1, keep_dims=True)
    return tl.sum(sums, axis=0, keep_dims=True) if JOINT else sums


@triton.jit
def layer_norm_rows(
    chunks, weights, biases, eps, mask_row,
    NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """LayerNorm of each row, or of NUM_ROWS > 1 rows taken as one; fp32, not rounded.

    The variance is computed from centred values in registers: no cancellation, no second read.
    """
    JOINT: tl.constexpr = NUM_ROWS > 1
    total = 0.0
    for i in tl.static_range(len(chunks)):
        total += chunks[i].to(tl.float32)
    mean = _sum(total, JOINT) / (NUM_ROWS * WIDTH)
    squares = 0.0
    for i in tl.static_range(len(chunks)):
        centred = chunks[i].to(tl.float32) - mean
        if JOINT or (i + 1) * CHUNK > WIDTH:
            _, mask = _columns(mask_row, i * CHUNK, WIDTH, CHUNK)
            centred = tl.where(mask, centred, 0.0)
        squares += centred * centred
    scale = tl.rsqrt(_sum(squares, JOINT) / (NUM_ROWS * WIDTH) + eps)
    y = ()
    for i in tl.static_range(len(chunks)):
        scaled = (chunks[i].to(tl.float32) - mean) * scale
        y += (scaled * weights[i].to(tl.float32) + biases[i].to(tl.float32),)
    return y
