"""Attention of PyTorch and of other libraries if installed: candidates that `tune` may choose.

A peer keeps the contract of our op or refuses the call; it decides from shapes alone. None is
needed, and none serves without a verdict.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from keye_kernels import _backends


class _Varlen(NamedTuple):
    """Arguments of the op varlen_attention."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    out: torch.Tensor
    lse: torch.Tensor | None
    tiles: torch.Tensor | None
    block_m: int


class _Decode(NamedTuple):
    """Arguments of the op paged_decode_attention."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    softmax_scale: float
    max_seqlen_k: int
    out: torch.Tensor
    lse: torch.Tensor | None


@functools.cache
def _imported(module: str, name: str) -> Callable[..., Any] | Exception:
    """The function of a library, or why there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a broken library raises
        return error


def _why_not(module: str, name: str) -> str | None:
    found = _imported(module, name)
    if isinstance(found, Exception):
        return f"{module} cannot be imported: {type(found).__name__}: {found}"
    return None


def _accepted(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """The keywords that ``function`` knows: libraries rename them between releases."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


def _first(result: Any) -> torch.Tensor:
    """The output of a function that returns a log-sum-exp too in some releases."""
    return result[0] if isinstance(result, tuple) else result


def _refuses_any(call: _Varlen | _Decode) -> str | None:
    if call.lse is not None:
        return "the log-sum-exp is not asked of it"
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype must be torch.bfloat16 or torch.float16, got {call.q.dtype}"
    return None


def _varlen(module: str, name: str, *args: Any) -> None:
    function, x = _imported(module, name), _Varlen(*args)
    options = _accepted(
        function,
        cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k,
        max_seqlen_q=x.max_seqlen_q, max_seqlen_k=x.max_seqlen_k,
        softmax_scale=x.softmax_scale, causal=x.causal,
        # PyTorch's names
        cu_seq_q=x.cu_seqlens_q, cu_seq_k=x.cu_seqlens_k, max_q=x.max_seqlen_q,
        max_k=x.max_seqlen_k, scale=x.softmax_scale, is_causal=x.causal, enable_gqa=True,
    )  # fmt: skip
    if not {"causal", "is_causal"} & options.keys():
        options["window_size"] = (-1, 0 if x.causal else -1)
    x.out.copy_(_first(function(x.q, x.k, x.v, **options)))


def _varlen_refuses(module: str, name: str, *args: Any) -> str | None:
    x, known = _Varlen(*args), inspect.signature(_imported(module, name)).parameters
    if reason := _refuses_any(x):
        return reason
    default = x.q.shape[2] ** -0.5
    if not {"softmax_scale", "scale"} & known.keys() and x.softmax_scale != default:
        return f"softmax_scale must be {default}, got {x.softmax_scale}"
    if x.q.shape[1] != x.k.shape[1] and not {"softmax_scale", "enable_gqa"} & known.keys():
        return "query heads must not share key/value heads"
    return None


def _sdpa(attend: Callable[..., Any], *args: Any) -> None:
    x = _Varlen(*args)
    batch, group = x.cu_seqlens_q.shape[0] - 1, x.q.shape[1] // x.k.shape[1]
    q, k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (x.q, x.k, x.v))
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    found = _first(attend(q, k, v, is_causal=x.causal, scale=x.softmax_scale))
    x.out.unflatten(0, (batch, -1)).copy_(found.transpose(1, 2))


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    # Called directly, because `sdpa_kernel` would change the choice of other threads.
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, **options)


def _math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, **options)


def _sdpa_refuses(*args: Any) -> str | None:
    x = _Varlen(*args)
    if reason := _refuses_any(x):
        return reason
    batch = x.cu_seqlens_q.shape[0] - 1
    longest = (batch * x.max_seqlen_q, batch * x.max_seqlen_k)
    if 0 in longest or (x.q.shape[0], x.k.shape[0]) != longest:  # no sequence is longer
        return "sequences must be equally long"
    if x.causal and x.max_seqlen_q != x.max_seqlen_k:
        return "causal needs as many queries as keys"
    return None


def _flash_decode(module: str, *args: Any) -> None:
    function, x = _imported(module, "flash_attn_with_kvcache"), _Decode(*args)
    options = _accepted(function, block_table=x.block_table, page_table=x.block_table)
    options |= {"cache_seqlens": x.cache_seqlens, "softmax_scale": x.softmax_scale, "causal": True}
    x.out.copy_(_first(function(x.q[:, None], x.k_cache, x.v_cache, **options))[:, 0])


def _flash_decode_refuses(multiple: int, *args: Any) -> str | None:
    x = _Decode(*args)
    if reason := _refuses_any(x):
        return reason
    if x.k_cache.shape[1] % multiple:
        return f"page_size must be a multiple of {multiple}, got {x.k_cache.shape[1]}"
    return None


def register() -> None:
    """Register what may be there; whether it is, is asked where a candidate is."""
    for label, module, name in (
        ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn"),
        ("flash_attn_2", "flash_attn", "flash_attn_varlen_func"),
        ("flash_attn_3", "flash_attn_interface", "flash_attn_varlen_func"),
        ("flash_attn_4", "flash_attn.cute", "flash_attn_varlen_func"),
    ):
        where = module, name
        _backends.register(
            "varlen_attention",
            label,
            functools.partial(_varlen, *where),
            why_not=functools.partial(_why_not, *where),
            refuses=functools.partial(_varlen_refuses, *where),
        )
    for label, attend, device_types in (
        ("sdpa", F.scaled_dot_product_attention, ("cpu", "cuda")),
        ("math", _math, ("cpu",)),
        ("cudnn", _cudnn, ("cuda",)),
    ):
        _backends.register(
            "varlen_attention",
            label,
            functools.partial(_sdpa, attend),
            device_types=device_types,
            refuses=_sdpa_refuses,
        )
    for label, module, multiple in (
        ("flash_attn_2", "flash_attn", 256),
        ("flash_attn_3", "flash_attn_interface", 16),
    ):
        _backends.register(
            "paged_decode_attention",
            label,
            functools.partial(_flash_decode, module),
            why_not=functools.partial(_why_not, module, "flash_attn_with_kvcache"),
            refuses=functools.partial(_flash_decode_refuses, multiple),
        )


register()
