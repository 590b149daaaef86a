"""QK-norm, 3D rotary embedding and paged cache write, in one pass over packed qkv."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, _cuda, _ext, reference
from keye_kernels._checks import (
    FLOAT_DTYPES,
    check_divides,
    check_eps,
    check_heads,
    check_length,
    check_tensor,
)
from keye_kernels._device import device_of
from keye_kernels._ops import define_op
from keye_kernels.rope import axis_of, check_mrope, cos_sin, frequencies, rotate

_qk_norm_mrope_store_op = define_op(
    "qk_norm_mrope_store(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor positions, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, int num_heads, "
    "int num_kv_heads, int[] mrope_section, float theta, float eps, Tensor(c!) out) -> ()",
    reference=reference.qk_norm_mrope_store,
)


class LaunchConfig(NamedTuple):
    """``num_splits`` programs share a token; each has ``q_heads`` and ``kv_heads`` of its heads."""

    num_splits: int
    q_heads: int
    kv_heads: int
    num_warps: int


def launch_config(
    num_tokens: int, num_heads: int, num_kv_heads: int, row_bytes: int, num_sms: int
) -> LaunchConfig:
    """Choose the launch for heads of ``row_bytes`` bytes.

    Many tokens: one program per token computes cos and sin once, one angle per thread, with 192
    bytes in flight per thread. Few tokens, as in decoding: up to 32 programs share the heads of a
    token, since the time is that of one short chain of dependent instructions.
    """
    num_splits = 1
    for splits in (8, 32):
        if num_tokens * splits <= 8 * num_sms:
            num_splits = splits
    q_heads = triton.next_power_of_2(triton.cdiv(num_heads, num_splits))
    kv_heads = triton.next_power_of_2(triton.cdiv(num_kv_heads, num_splits))
    num_bytes = (q_heads + 2 * kv_heads) * row_bytes
    num_warps = min(triton.next_power_of_2(triton.cdiv(num_bytes, 32 * 192)), 16)
    num_splits = max(triton.cdiv(num_heads, q_heads), triton.cdiv(num_kv_heads, kv_heads))
    return LaunchConfig(num_splits, q_heads, kv_heads, num_warps)


@triton.jit
def _normalise(low, high, weight_low, weight_high, eps, HEAD_DIM: tl.constexpr):
    """rms_norm of heads given as two halves [heads, HALF], rounded twice as there."""
    x, y = low.to(tl.float32), high.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x + y * y, axis=1, keep_dims=True) / HEAD_DIM + eps)
    x, y = (x * scale).to(low.dtype).to(tl.float32), (y * scale).to(low.dtype).to(tl.float32)
    low = (x * weight_low.to(tl.float32)[None, :]).to(low.dtype)
    high = (y * weight_high.to(tl.float32)[None, :]).to(low.dtype)
    return low, high


@triton.jit
def _load_halves(ptrs, mask, HALF: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + HALF, mask=mask, other=0.0)


@triton.jit
def _load_weight(ptr, pair, mask, HALF: tl.constexpr):
    """Both halves of a weight [head_dim] by one load; by two, each thread would load 2 bytes."""
    offs = tl.arange(0, 2)[:, None] * HALF + pair[None, :]
    weight = tl.load(ptr + offs, mask=mask[None, :], other=0.0)  # [2, BLOCK]
    return tl.split(tl.trans(weight))


@triton.jit
def _store_halves(ptrs, low, high, mask, HALF: tl.constexpr):
    tl.store(ptrs, low.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + HALF, high.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_axis"])
def _qk_norm_mrope_store_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, frequencies_ptr, k_cache_ptr, v_cache_ptr,
    slots_ptr, out_ptr,
    stride_qkv, stride_axis, stride_k_page, stride_k_row, stride_k_head,
    stride_v_page, stride_v_row, stride_v_head, stride_out, stride_out_head,
    num_heads, num_kv_heads, eps,
    PAGE_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    SECTION_T: tl.constexpr, SECTION_H: tl.constexpr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    mask = pair < HALF
    q_head = split * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]
    kv_head = split * KV_HEADS + tl.arange(0, KV_HEADS)[:, None]
    mask_q = (q_head < num_heads) & mask[None, :]
    mask_kv = (kv_head < num_kv_heads) & mask[None, :]

    # All loads come first and none depends on another: a token costs one memory latency.
    t = tl.load(positions_ptr + token)
    h = tl.load(positions_ptr + token + stride_axis)
    w = tl.load(positions_ptr + token + 2 * stride_axis)
    slot = tl.load(slots_ptr + token)
    row_ptr = qkv_ptr + token * stride_qkv
    q_low, q_high = _load_halves(row_ptr + q_head * (2 * HALF) + pair[None, :], mask_q, HALF)
    kv_ptrs = row_ptr + (num_heads + kv_head) * (2 * HALF) + pair[None, :]
    k_low, k_high = _load_halves(kv_ptrs, mask_kv, HALF)
    v_low, v_high = _load_halves(kv_ptrs + num_kv_heads * (2 * HALF), mask_kv, HALF)
    frequency = tl.load(frequencies_ptr + pair, mask=mask, other=0.0)
    q_weight_low, q_weight_high = _load_weight(q_weight_ptr, pair, mask, HALF)
    k_weight_low, k_weight_high = _load_weight(k_weight_ptr, pair, mask, HALF)

    t, h, w = t.to(tl.float32), h.to(tl.float32), w.to(tl.float32)
    axis = axis_of(pair, SECTION_T, SECTION_H, 0, False)
    position = tl.where(axis == 0, t, tl.where(axis == 1, h, w))
    cos, sin = cos_sin(position * frequency)
    cos, sin = cos[None, :], sin[None, :]

    q_low, q_high = _normalise(q_low, q_high, q_weight_low, q_weight_high, eps, 2 * HALF)
    q_low, q_high = rotate(q_low, q_high, cos, sin)
    out_ptrs = out_ptr + token * stride_out + q_head.to(tl.int64) * stride_out_head + pair[None, :]
    _store_halves(out_ptrs, q_low, q_high, mask_q, HALF)

    page, row = slot // PAGE_SIZE, slot % PAGE_SIZE
    # A bound instead of `& (slot >= 0)`: Triton's interpreter takes no broadcast scalar as a mask.
    mask_kv = (kv_head < tl.where(slot >= 0, num_kv_heads, 0)) & mask[None, :]
    k_ptr = k_cache_ptr + page * stride_k_page + row * stride_k_row
    v_ptr = v_cache_ptr + page * stride_v_page + row * stride_v_row
    v_ptrs = v_ptr + kv_head.to(tl.int64) * stride_v_head + pair[None, :]
    _store_halves(v_ptrs, v_low, v_high, mask_kv, HALF)
    k_low, k_high = _normalise(k_low, k_high, k_weight_low, k_weight_high, eps, 2 * HALF)
    k_low, k_high = rotate(k_low, k_high, cos, sin)
    k_ptrs = k_ptr + kv_head.to(tl.int64) * stride_k_head + pair[None, :]
    _store_halves(k_ptrs, k_low, k_high, mask_kv, HALF)


def _qk_norm_mrope_store_triton(
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
    num_tokens, head_dim = qkv.shape[0], q_weight.shape[0]
    row_bytes = head_dim * qkv.itemsize
    config = launch_config(num_tokens, num_heads, num_kv_heads, row_bytes, device_of(qkv).num_sms)
    _qk_norm_mrope_store_kernel[(num_tokens, config.num_splits)](
        qkv, q_weight, k_weight, positions, frequencies(head_dim, theta, 1, qkv.device),
        k_cache, v_cache, slot_mapping, out,
        qkv.stride(0), positions.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
        out.stride(0), out.stride(1), num_heads, num_kv_heads, eps,
        PAGE_SIZE=k_cache.shape[1], HALF=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim // 2),
        SECTION_T=mrope_section[0], SECTION_H=mrope_section[1],
        Q_HEADS=config.q_heads, KV_HEADS=config.kv_heads, num_warps=config.num_warps,
    )  # fmt: skip


_backends.register("qk_norm_mrope_store", "triton", _qk_norm_mrope_store_triton)


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
        dtype=_ext.DTYPES[qkv.dtype], head_dim=head_dim, qkv=qkv.data_ptr(),
        q_weight=q_weight.data_ptr(), k_weight=k_weight.data_ptr(), positions=positions.data_ptr(),
        frequencies=frequencies(head_dim, theta, 1, qkv.device).data_ptr(),
        k_cache=k_cache.data_ptr(), v_cache=v_cache.data_ptr(), slots=slot_mapping.data_ptr(),
        out=out.data_ptr(), k_strides=k_cache.stride(), v_strides=v_cache.stride(),
        out_strides=out.stride(), stride_qkv=qkv.stride(0), stride_axis=positions.stride(0),
        num_tokens=qkv.shape[0], num_heads=num_heads, num_kv_heads=num_kv_heads,
        page_size=k_cache.shape[1], section_t=mrope_section[0], section_h=mrope_section[1], eps=eps,
        num_sms=device_of(qkv).num_sms, overlap=_cuda.overlaps(qkv), stream=_ext.stream_of(qkv),
    )  # fmt: skip


_LIMITS = _cuda.CudaLimits(
    aligned=("qkv", "q_weight", "k_weight", "out", "k_cache", "v_cache"),
    head_dims=(64, 80, 128),
    head_dim_of="q_weight",
)
_cuda.register("qk_norm_mrope_store", _qk_norm_mrope_store_cuda, _LIMITS)


def qk_norm_mrope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    mrope_section: Sequence[int],
    theta: float,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise and rotate q and k of a packed qkv, and write k and v to the paged cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], fp32 / fp16 / bf16: q heads,
            k heads, v heads. Rows may be strided.
        q_weight, k_weight: [head_dim], dtype of ``qkv``: RMSNorm weights shared by all heads.
        positions: [3, num_tokens] int64: t, h, w.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], dtype of ``qkv``,
            page_size a multiple of 16. Rows that no slot names keep their content.
        slot_mapping: [num_tokens] int64, ``page * page_size + row`` of each token; -1: k and v of
            this token are not stored. No slot may occur twice.
        mrope_section, theta: As in ``mrope_`` (contiguous sections).
        eps: Added to the mean square of a head.
        out: [num_tokens, num_heads, head_dim], dtype of ``qkv``. Must not overlap ``qkv``.

    Returns:
        q: [num_tokens, num_heads, head_dim], normalised and rotated. The norm is that of
        ``rms_norm`` with its two roundings; rotation in fp32, rounded once; v is copied bit by bit.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, a slot
            lies outside the cache.

    Source: KeyeAttention in modeling_keye.py of Keye-VL-8B-Preview.
    """
    check_tensor("q_weight", q_weight, (None,), FLOAT_DTYPES)
    head_dim, dtype, device = q_weight.shape[0], q_weight.dtype, q_weight.device
    num_heads = check_length("num_heads", num_heads, least=1)
    num_kv_heads = check_length("num_kv_heads", num_kv_heads, least=1)
    check_heads(num_heads, num_kv_heads)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    check_tensor("qkv", qkv, (None, width), dtype, device)
    num_tokens = qkv.shape[0]
    check_tensor("k_weight", k_weight, (head_dim,), dtype, device)
    section, theta = check_mrope(mrope_section, theta, head_dim)
    eps = check_eps("eps", eps)
    check_tensor("positions", positions, (3, num_tokens), torch.int64, device)
    check_tensor("k_cache", k_cache, (None, None, num_kv_heads, head_dim), dtype, device)
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, device)
    check_divides("page_size", k_cache.shape[1], 16)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), torch.int64, device)
    shape = (num_tokens, num_heads, head_dim)
    if out is None:
        out = qkv.new_empty(shape)
    else:
        check_tensor("out", out, shape, dtype, device)
    if num_tokens > 0:
        _qk_norm_mrope_store_op(
            qkv,
            q_weight,
            k_weight,
            positions,
            k_cache,
            v_cache,
            slot_mapping,
            num_heads,
            num_kv_heads,
            section,
            theta,
            eps,
            out,
        )
    return out
