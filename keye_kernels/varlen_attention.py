"""Attention over packed sequences of different lengths, each attending to itself alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from keye_kernels import _backends, reference
from keye_kernels._attention import attend, choose_block_m
from keye_kernels._checks import (
    FLOAT_DTYPES,
    check_finite,
    check_head_dim,
    check_heads,
    check_length,
    check_tensor,
)
from keye_kernels._device import device_of
from keye_kernels._ops import define_op

_varlen_attention_op = define_op(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal, Tensor(a!) out, "
    "Tensor(b!)? lse, Tensor? tiles, int block_m) -> ()",
    reference=reference.varlen_attention,
    tuples={"out": ("out", "lse"), "schedule": ("tiles", "block_m")},
)


class AttentionSchedule(NamedTuple):
    """The programs of one attention over sequences of known lengths, from ``attention_schedule``.

    Attributes:
        tiles: [num_tiles, 2], int32: sequence and first query of each, those with most keys first.
        block_m: Queries of a tile.
        num_tokens, num_keys: Of all sequences together.
        batch_size: Number of sequences.
    """

    tiles: torch.Tensor
    block_m: int
    num_tokens: int
    num_keys: int
    batch_size: int


def attention_schedule(
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int] | None = None,
    *,
    num_heads: int,
    causal: bool = False,
    device: torch.device | str,
) -> AttentionSchedule:
    """Plan ``varlen_attention`` from lengths that the host knows, once for all layers.

    Args:
        seqlens_q, seqlens_k: Queries and keys of each sequence; by default as many keys as queries.
        num_heads: Of the queries.
        causal: As in the calls to come. It decides the order of the tiles, not the result.
        device: Of the tensors to come.

    Returns:
        Exactly as many tiles as there is work for, the longest first. A call without a schedule
        starts one program more per sequence and head, each of which looks for its tile, in the
        order of the sequences. The result is the same, bit by bit.

    Raises:
        ValueError: Lengths are no ints or negative, their numbers differ, or there is no head.
    """
    len_q = _lengths("seqlens_q", seqlens_q)
    len_k = len_q if seqlens_k is None else _lengths("seqlens_k", seqlens_k)
    if len_k.shape != len_q.shape:
        raise ValueError(
            f"seqlens_k must have one length for each of {len(len_q)} sequences, got {len(len_k)}"
        )
    num_heads = check_length("num_heads", num_heads, least=1)
    num_sms = device_of(torch.empty(0, device=device)).num_sms
    block_m = choose_block_m(int(len_q.sum()), num_heads, num_sms)
    counts = -(-len_q // block_m)
    sequence = np.repeat(np.arange(len(len_q)), counts)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)) * block_m
    keys = len_k[sequence]
    if causal:
        keys = np.minimum(keys, keys - len_q[sequence] + first + block_m)
    tiles = np.stack((sequence, first), axis=1)[np.argsort(-keys, kind="stable")]
    tiles = torch.from_numpy(tiles.astype(np.int32))
    if torch.device(device).type == "cuda":
        tiles = tiles.pin_memory().to(device, non_blocking=True)
    return AttentionSchedule(
        tiles.to(device), block_m, int(len_q.sum()), int(len_k.sum()), len(len_q)
    )


def _lengths(name: str, seqlens: Sequence[int]) -> np.ndarray:
    lengths = np.asarray(seqlens)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a sequence of ints, got {seqlens!r}")
    if lengths.min(initial=0) < 0:
        raise ValueError(f"{name} must hold no negative length, got {lengths.min()}")
    if lengths.sum(dtype=np.float64) >= 2**31:  # cu_seqlens are int32
        raise ValueError(f"{name} must add up to less than 2^31, got {sum(lengths.tolist())}")
    return lengths.astype(np.int64)


def _varlen_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,  # noqa: ARG001 - what it bounds is read on the device
    max_seqlen_k: int,  # noqa: ARG001
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiles: torch.Tensor | None,
    block_m: int,
    changes: dict[str, int | None] | None = None,
) -> None:
    attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, out,
        lse=lse, tiles=tiles, block_m=block_m, changes=changes,
    )  # fmt: skip


def _refuses(changes: dict[str, int | None], *args: Any) -> str | None:
    """Why a variant was not made for these arguments of the op."""
    q, causal, lse = args[0], args[8], args[10]
    if q.itemsize != 2:
        return f"dtype must be torch.bfloat16 or torch.float16, got {q.dtype}"
    if device_of(q).capability[0] not in (9, 10):
        return "it spills or does not fit except on sm_90 and sm_100"
    if "polynomial" in changes and (causal or lse is not None):
        return "its exponentials are too coarse for the log-sum-exp, and never 0"
    if "block_n" in changes and q.shape[2] > 80:
        return f"head_dim must be at most 80, got {q.shape[2]}"
    return None


# What `tune` tries beside the kernel as it is; docs/attention.md counts their instructions.
VARIANTS: dict[str, dict[str, int | None]] = {
    "triton_early": {"early": True},
    "triton_polynomial": {"early": True, "polynomial": True},
    "triton_128_keys": {
        "early": True,
        "block_m": 128,
        "num_warps": 8,
        "block_n": 128,
        "max_registers": None,
    },
}
_backends.register("varlen_attention", "triton", _varlen_attention_triton)
for _name, _changes in VARIANTS.items():
    _backends.register(
        "varlen_attention",
        _name,
        partial(_varlen_attention_triton, changes=_changes),
        refuses=partial(_refuses, _changes),
    )


def _shape_class(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, *_) -> tuple[tuple, tuple]:  # noqa: ARG001
    return (q.shape[2], causal), (q.shape[0], max_k)


_backends.register_class("varlen_attention", _shape_class)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    schedule: AttentionSchedule | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each sequence of a packed batch: softmax(q k^T * softmax_scale) v.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16, head_dim a multiple of 8 up to
            256. Any strides with a contiguous last dim, so views of a packed qkv work.
        k, v: [num_keys, num_kv_heads, head_dim], dtype of ``q``; query head i reads key/value head
            ``i // (num_heads // num_kv_heads)``.
        cu_seqlens_q, cu_seqlens_k: [batch_size + 1] int32, sequence starts, first 0, last
            num_tokens or num_keys. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: Longest sequence, or more.
        softmax_scale: Factor on q k^T, above 0, default head_dim ** -0.5.
        causal: The last query of a sequence sees all its keys, the one before it all but the last,
            and so on.
        return_lse: Also return the log-sum-exp of the scaled scores.
        out: Like ``q``.
        schedule: ``attention_schedule`` of these lengths, which saves each layer of a model the
            search for tiles. The result is the same. One of other lengths with the same totals
            may leave rows of ``out`` unwritten, which raises on a CPU.

    Returns:
        out [num_tokens, num_heads, head_dim], dtype of ``q``, contiguous; with ``return_lse`` the
        pair (out, lse), lse [num_heads, num_tokens] fp32, natural logarithm. A query without a
        visible key gives 0 and -inf. Scores and softmax in fp32.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, the schedule was made
            for other numbers of tokens or sequences, or, on a CPU, the contents of cu_seqlens
            differ from the above or from the schedule's lengths.

    Source: argument order and masks of flash_attn_varlen_func (flash-attn 2.1 and later), which
    also has dropout_p, window_size, softcap, alibi_slopes and block_table: leave them out.
    """
    check_tensor("q", q, (None, None, None), FLOAT_DTYPES)
    num_tokens, num_heads, head_dim = q.shape
    check_tensor("k", k, (None, None, head_dim), q.dtype, q.device)
    check_tensor("v", v, k.shape, q.dtype, q.device)
    check_heads(num_heads, k.shape[1])
    check_head_dim(head_dim)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (None,), torch.int32, q.device)
    check_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, torch.int32, q.device)
    # More than there are tokens says no more, and may be more than the op's int64 holds.
    max_seqlen_q = min(check_length("max_seqlen_q", max_seqlen_q), num_tokens)
    max_seqlen_k = min(check_length("max_seqlen_k", max_seqlen_k), k.shape[0])
    scale = head_dim**-0.5
    if softmax_scale is not None:
        scale = check_finite("softmax_scale", softmax_scale, above=0.0)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q must have at least 1 element, got 0")
    if cu_seqlens_q.shape[0] == 1 and num_tokens > 0:
        raise ValueError(f"q must have no tokens where there is no sequence, got {num_tokens}")
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        check_tensor("out", out, q.shape, q.dtype, q.device)
    tiles, block_m = None, 0
    if schedule is not None:
        _check_schedule(schedule, num_tokens, k.shape[0], cu_seqlens_q.shape[0] - 1, q.device)
        tiles, block_m = schedule.tiles, schedule.block_m
    lse = q.new_empty((num_heads, num_tokens), dtype=torch.float32) if return_lse else None
    if num_tokens > 0:
        _varlen_attention_op(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale,
            causal,
            out,
            lse,
            tiles,
            block_m,
        )
    return out if lse is None else (out, lse)


def _check_schedule(
    schedule: AttentionSchedule,
    num_tokens: int,
    num_keys: int,
    batch_size: int,
    device: torch.device,
) -> None:
    if not isinstance(schedule, AttentionSchedule):
        raise TypeError(f"schedule must be an AttentionSchedule, got {type(schedule).__name__}")
    made_for = (schedule.num_tokens, schedule.num_keys, schedule.batch_size)
    if made_for != (num_tokens, num_keys, batch_size):
        raise ValueError(
            f"schedule must be made for {num_tokens} queries and {num_keys} keys of {batch_size} "
            f"sequences, got one for {made_for[0]} and {made_for[1]} of {made_for[2]}"
        )
    if schedule.tiles.device != device:
        raise ValueError(f"schedule must be on device {device}, got {schedule.tiles.device}")
