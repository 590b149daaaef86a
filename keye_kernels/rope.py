"""Rotary position embedding: 2D for the vision tower, 3D (t, h, w) for the text decoder.

One kernel serves both: 2D is 3D with an empty third axis, and both its axes use one frequency set.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, reference
from keye_kernels._checks import (
    FLOAT_DTYPES,
    check_divides,
    check_finite,
    check_length,
    check_tensor,
)
from keye_kernels._device import device_of
from keye_kernels._ops import define_op
from keye_kernels.reference.rope import inverse_frequencies

_rope_2d_op = define_op(
    "rope_2d_(Tensor(a!) q, Tensor(b!) k, Tensor positions, float theta) -> ()",
    reference=reference.rope_2d_,
)
_mrope_op = define_op(
    "mrope_(Tensor(a!) q, Tensor(b!) k, Tensor positions, int[] mrope_section, float theta, "
    "bool interleaved) -> ()",
    reference=reference.mrope_,
)


class LaunchConfig(NamedTuple):
    """One program rotates ``pairs`` channel pairs of consecutive tokens, ``heads`` heads at a time.

    One load covers ``width`` pairs. The head blocks of the same pairs are split over ``num_splits``
    programs.
    """

    width: int
    pairs: int
    heads: int
    num_splits: int


def launch_config(
    num_tokens: int, heads: tuple[int, int], half: int, itemsize: int, num_sms: int
) -> LaunchConfig:
    """Choose programs of one warp; ``heads``: heads of q and of k, ``half``: pairs per head.

    An access is as wide as the start of a head's second half is aligned: in 16-bit types 16 bytes
    for head_dim 128, and 8 for 72, where it starts at byte 72. A wider access would load channels
    whose partners are in another thread.

    Many tokens: a thread has 128 bytes in flight and rotates up to four head blocks, which reuse
    its angles. Few tokens: one access per half, and a program for each head block.
    """
    width = math.gcd(half, 16 // itemsize)
    pairs, block = 32 * width, 64 // (width * itemsize)
    num_blocks = triton.cdiv(num_tokens * half, pairs)
    head_blocks = sum(triton.cdiv(n, block) for n in heads)
    if num_blocks * head_blocks >= 4 * num_sms:
        splits = max(triton.cdiv(head_blocks, 4), 16 * num_sms // num_blocks)
        return LaunchConfig(width, pairs, block, min(splits, head_blocks))
    pairs = min(pairs, triton.next_power_of_2(half))
    block = 32 * width // pairs
    return LaunchConfig(width, pairs, block, sum(triton.cdiv(n, block) for n in heads))


@functools.cache
def frequencies(dim: int, theta: float, repeats: int, device: torch.device) -> torch.Tensor:
    """theta^(-2k / dim) for k < dim / 2, ``repeats`` times over: fp32 on ``device``.

    A table, because angles must match the reference: at position 1e5 one unit in the last place of
    a frequency near 1 rotates the pair by 0.006 rad. The reference's values, computed on the CPU as
    in the published code, are copied once. Later calls copy nothing, so a CUDA graph can capture
    them.
    """
    table = inverse_frequencies(dim, theta, torch.device("cpu"))
    return table.repeat(repeats).to(device)


@triton.jit
def cos_sin(angle):
    """cos and sin of fp32 angles up to 2^20 rad, within one unit in the last place of 1.

    tl.cos and tl.sin are as accurate, but each reduces the angle anew, and large ones on the stack.
    """
    # Adding 1.5 * 2^23 rounds to an integer, whose low bits are then those of the mantissa.
    shifted = angle * 0.6366197723675814 + 12582912.0  # 2 / pi
    turns = shifted - 12582912.0  # quarter turns
    quadrant = shifted.to(tl.int32, bitcast=True)
    # pi / 2 in four parts. The first three have 7 bits, so their products with up to 2^17 quarter
    # turns are exact even where fma rounds twice, as in Triton's interpreter before 3.9.
    r = tl.fma(turns, -1.578125, angle)
    r = tl.fma(turns, 0.00732421875, r)
    r = tl.fma(turns, 4.470348358154297e-06, r)
    r = tl.fma(turns, -1.5893254712295857e-08, r)
    # Minimax polynomials on [-pi/4, pi/4], with errors of at most 4e-9 and 5e-10.
    z = r * r
    sin = r + r * z * (-0.16666651 + z * (0.0083319675 + z * -0.00019494264))
    cos = 1 - 0.5 * z + z * z * (0.041666646 + z * (-0.0013887355 + z * 2.4437008e-05))
    odd = (quadrant & 1) != 0
    turned_cos = tl.where(odd, sin, cos)
    turned_sin = tl.where(odd, cos, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -turned_cos, turned_cos)
    sin = tl.where((quadrant & 2) != 0, -turned_sin, turned_sin)
    return cos, sin


@triton.jit
def axis_of(
    pair, SECTION_T: tl.constexpr, SECTION_H: tl.constexpr, SECTION_W: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Axis of each pair: 0 (t), 1 (h) or 2 (w)."""
    if INTERLEAVED:
        axis = pair % 3
        size = tl.where(axis == 1, SECTION_H, SECTION_W)
        return tl.where(pair < 3 * size, axis, 0)
    return tl.where(pair < SECTION_T, 0, tl.where(pair < SECTION_T + SECTION_H, 1, 2))


@triton.jit
def rotate(low, high, cos, sin):
    """Rotate the pairs (low, high) in fp32. low, high: [heads, pairs] of any float type."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


# These change with every request: specialising would compile a kernel for each divisibility.
@triton.jit(do_not_specialize=["stride_axis", "num_tokens"])
def _rope_kernel(
    q_ptr, k_ptr, positions_ptr, frequencies_ptr,
    stride_q, stride_k, stride_position, stride_axis, num_tokens, num_heads, num_kv_heads,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, HALF: tl.constexpr,
    SECTION_T: tl.constexpr, SECTION_H: tl.constexpr, SECTION_W: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # Pairs are numbered across tokens, so that no lane is idle if HALF is not a power of two.
    first_pair = tl.program_id(0).to(tl.int64) * PAIRS
    start = tl.multiple_of((first_pair % HALF).to(tl.int32), WIDTH)
    pair = start + tl.arange(0, PAIRS)
    token = first_pair // HALF + pair // HALF  # [PAIRS] int64
    pair = pair % HALF
    mask = token < num_tokens

    axis = axis_of(pair, SECTION_T, SECTION_H, SECTION_W, INTERLEAVED)
    offs_position = token * stride_position + axis.to(tl.int64) * stride_axis
    position = tl.load(positions_ptr + offs_position, mask=mask, other=0)
    # Rounded to fp32 as in the reference: no addition follows that could fuse with the product.
    cos, sin = cos_sin(position.to(tl.float32) * tl.load(frequencies_ptr + pair))

    q_blocks = tl.cdiv(num_heads, HEADS)
    k_blocks = tl.cdiv(num_kv_heads, HEADS)
    for block in range(tl.program_id(1), q_blocks + k_blocks, tl.num_programs(1)):
        is_q = block < q_blocks
        head = tl.where(is_q, block, block - q_blocks) * HEADS + tl.arange(0, HEADS)[:, None]
        mask_head = (head < tl.where(is_q, num_heads, num_kv_heads)) & mask[None, :]
        stride_head = tl.where(is_q, STRIDE_Q_HEAD, STRIDE_K_HEAD)
        offs = token * tl.where(is_q, stride_q, stride_k) + pair
        ptrs = tl.where(is_q, q_ptr, k_ptr) + head.to(tl.int64) * stride_head + offs[None, :]
        low = tl.load(ptrs, mask=mask_head, other=0.0)  # [HEADS, PAIRS]
        high = tl.load(ptrs + HALF, mask=mask_head, other=0.0)
        turned_low, turned_high = rotate(low, high, cos[None, :], sin[None, :])
        tl.store(ptrs, turned_low.to(low.dtype), mask=mask_head)
        tl.store(ptrs + HALF, turned_high.to(low.dtype), mask=mask_head)


def _rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    strides: tuple[int, int],
    table: torch.Tensor,
    section: Sequence[int],
    interleaved: bool,
) -> None:
    """strides: those of ``positions``, per token and per axis."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], head_dim // 2
    heads = num_heads, num_kv_heads
    config = launch_config(num_tokens, heads, half, q.itemsize, device_of(q).num_sms)
    num_blocks = triton.cdiv(num_tokens * half, config.pairs)
    _rope_kernel[(num_blocks, config.num_splits)](
        q, k, positions, table, q.stride(0), k.stride(0), *strides,
        num_tokens, num_heads, num_kv_heads,
        STRIDE_Q_HEAD=q.stride(1), STRIDE_K_HEAD=k.stride(1), HALF=half,
        SECTION_T=section[0], SECTION_H=section[1], SECTION_W=section[2], INTERLEAVED=interleaved,
        WIDTH=config.width, PAIRS=config.pairs, HEADS=config.heads, num_warps=1,
    )  # fmt: skip


def _rope_2d_triton(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, theta: float
) -> None:
    half = q.shape[2] // 2
    table = frequencies(half, theta, 2, q.device)
    strides = positions.stride(0), positions.stride(1)
    _rope(q, k, positions, strides, table, (half // 2, half // 2, 0), False)


def _mrope_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    mrope_section: list[int],
    theta: float,
    interleaved: bool,
) -> None:
    table = frequencies(q.shape[2], theta, 1, q.device)
    strides = positions.stride(1), positions.stride(0)
    _rope(q, k, positions, strides, table, mrope_section, interleaved)


_backends.register("rope_2d_", "triton", _rope_2d_triton)
_backends.register("mrope_", "triton", _mrope_triton)


def _check_pair(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Check q and k [num_tokens, heads, head_dim]; returns num_tokens and head_dim."""
    check_tensor("q", q, (None, None, None), FLOAT_DTYPES)
    num_tokens, _, head_dim = q.shape
    check_tensor("k", k, (num_tokens, None, head_dim), q.dtype, q.device)
    return num_tokens, head_dim


def check_mrope(
    mrope_section: Sequence[int], theta: float, head_dim: int
) -> tuple[list[int], float]:
    """Check and return the pairs per axis, and theta."""
    section = [
        size if isinstance(size, int) else check_length("each size in mrope_section", size)
        for size in mrope_section
    ]
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != head_dim:
        raise ValueError(
            f"mrope_section must hold 3 sizes that add up to head_dim / 2 = {head_dim / 2:g}, "
            f"got {section}"
        )
    return section, _check_theta(theta)


def _check_theta(theta: float) -> float:
    theta = check_finite("theta", theta)
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")
    return theta


def rope_2d_(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, theta: float = 10000.0
) -> None:
    """Rotate ``q`` and ``k`` in place by their patch's row and column.

    With d = head_dim, channel j pairs with channel j + d/2. The first d/4 pairs turn by
    ``row * theta^(-4j/d)``, the next d/4 by ``column`` at the same frequencies.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16, head_dim a multiple of 4. Any
            strides with a contiguous last dim, so views of a packed qkv work.
        k: [num_tokens, num_kv_heads, head_dim], dtype of ``q``.
        positions: [num_tokens, 2] int64, (row, column) of each patch in its own frame.
        theta: Base of the frequencies.

    fp32 inside, rounded once at the store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: SigLIPRotaryEmbedding and apply_rotary_pos_emb_flashatt, modeling_keye.py of
    Keye-VL-8B-Preview.
    """
    num_tokens, head_dim = _check_pair(q, k)
    check_divides("head_dim", head_dim, 4)
    check_tensor("positions", positions, (num_tokens, 2), torch.int64, q.device)
    theta = _check_theta(theta)
    if num_tokens > 0:
        _rope_2d_op(q, k, positions, theta)


def mrope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    mrope_section: Sequence[int],
    theta: float,
    interleaved: bool = False,
) -> None:
    """Rotate ``q`` and ``k`` in place by their token's 3D position.

    With d = head_dim, channel j pairs with channel j + d/2 and the pair turns by
    ``positions[axis(j)] * theta^(-2j/d)``.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16. Any strides with a contiguous
            last dim.
        k: [num_tokens, num_kv_heads, head_dim], dtype of ``q``.
        positions: [3, num_tokens] int64: t, h, w.
        mrope_section: Pairs per axis, three sizes that add up to head_dim / 2.
        theta: Base of the frequencies.
        interleaved: False: the axes take contiguous blocks of pairs (Keye-VL, Qwen2-VL). True: pair
            j belongs to axis j % 3 as long as j < 3 * mrope_section[axis], then to t (Qwen3-VL).

    fp32 inside, rounded once at the store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: apply_multimodal_rotary_pos_emb in modeling_keye.py of Keye-VL-8B-Preview;
    Qwen3VLTextRotaryEmbedding in transformers for the interleaved form.
    """
    num_tokens, head_dim = _check_pair(q, k)
    section, theta = check_mrope(mrope_section, theta, head_dim)
    check_tensor("positions", positions, (3, num_tokens), torch.int64, q.device)
    if num_tokens > 0:
        _mrope_op(q, k, positions, section, theta, interleaved)
