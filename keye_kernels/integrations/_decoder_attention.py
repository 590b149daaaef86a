"""A decoder's attention through transformers' own door: `attn_implementation="keye_kernels"`.

A prompt goes to our attention, a padded batch as one packed call. All else is PyTorch's scaled dot
product attention, as it was: steps of one token (our op for those reads a paged cache, which
transformers does not have), static caches, sliding windows and other masks of a model.
"""

from typing import Any

import torch
from torch import nn

from keye_kernels import varlen_attention
from keye_kernels.integrations._vision import check_dropout, is_consecutive, segments

NAME = "keye_kernels"
NOTE = "prompts over a dynamic cache; sdpa for steps of one token and for other masks"


def register() -> None:
    """Make the name known to transformers. Again is no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """Sequence starts of queries and of keys [2, n + 1] int32 where ours serves, else sdpa's mask.

    Called once per forward of a model, by transformers' mask functions, with what they know.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    starts = _starts(**kwargs)
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs) if starts is None else starts


def _starts(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: torch.Tensor | None,
    q_length: int | None = None,
    q_offset: int | torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,  # the two above, in transformers 4
    kv_offset: int = 0,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **_: Any,
) -> torch.Tensor | None:
    from transformers.masking_utils import causal_mask_function

    if cache_position is not None:
        # A static cache, whose keys are longer than what they hold, does not allow the skip.
        q_length, device = cache_position.shape[0], cache_position.device
        q_offset = kv_length - q_length if allow_is_causal_skip else None
    if (
        q_length == 1
        or mask_function is not causal_mask_function
        or local_size is not None
        or kv_offset != 0
        or isinstance(q_offset, torch.Tensor)  # a static cache, in transformers 5
        or q_offset != kv_length - q_length
    ):
        return None
    if attention_mask is not None:
        # Under torch.compile nobody could look whether the tokens are consecutive.
        if attention_mask.shape[-1] != kv_length or torch.compiler.is_compiling():
            return None
        if not is_consecutive(attention_mask):
            return None
    starts_k = segments(attention_mask, batch_size, kv_length, device)
    # Of each row's keys the queries are the last q_length.
    row = (starts_k - 1).clamp(min=0) // kv_length
    within = starts_k - row * kv_length - q_offset
    starts_q = row * q_length + within.clamp(min=0)
    return torch.stack([starts_q, starts_k]).int()


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: [batch_size, heads, length, head_dim], the keys with those cached."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if attention_mask is None or attention_mask.dim() != 2:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    check_dropout(dropout)
    batch_size, num_heads, q_length, head_dim = query.shape
    starts_q, starts_k = attention_mask
    packed = (x.transpose(1, 2).reshape(-1, x.shape[1], head_dim) for x in (query, key, value))
    out = varlen_attention(
        *packed,
        starts_q,
        starts_k,
        q_length,
        key.shape[2],
        softmax_scale=scaling,
        causal=True,
    )
    return out.view(batch_size, q_length, num_heads, head_dim), None
