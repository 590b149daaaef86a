"""What the definitions of attention share: attention and log-sum-exp of single sequences."""

import torch
import torch.nn.functional as F

Outputs = tuple[torch.Tensor, torch.Tensor | None]  # out, lse

_MASKED_ROWS = 1024  # query rows per attention mask, so that a mask stays below 1024 x num_keys
_LSE_ROWS = 512  # query rows per block of explicit scores


def outputs(q: torch.Tensor, out: torch.Tensor | Outputs | None, return_lse: bool) -> Outputs:
    """Tensors to write. ``out`` may be the pair, or one tensor, or None for a new one."""
    out, lse = out if isinstance(out, tuple) else (out, None)
    if return_lse:
        lse = q.new_empty(q.shape[1::-1], dtype=torch.float32)
    return torch.empty_like(q) if out is None else out, lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
) -> None:
    """Attention of equally long sequences, written to ``out``.

    q and out [batch_size, len_q, num_heads, head_dim], k and v [batch_size, len_k, num_kv_heads,
    head_dim]. Uses masks only where causal meets len_q != len_k: SDPA is slower with one.
    """
    q, k, v, out = (tensor.transpose(1, 2) for tensor in (q, k, v, out))
    len_q, len_k = q.shape[2], k.shape[2]
    blind = max(len_q - len_k, 0) if causal or len_k == 0 else 0  # queries that see no key
    out[:, :, :blind] = 0
    q, out = q[:, :, blind:], out[:, :, blind:]
    len_q -= blind
    if len_q == 0:
        return

    def attend_rows(rows: slice, keys: int, **mask: object) -> None:
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows],
            k[:, :, :keys],
            v[:, :, :keys],
            scale=softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
            **mask,
        )

    if not causal or len_q == 1:  # the last query sees all
        attend_rows(slice(None), len_k)
    elif len_q == len_k:
        attend_rows(slice(None), len_k, is_causal=True)
    else:
        cached = len_k - len_q  # keys that every query sees
        for start in range(0, len_q, _MASKED_ROWS):
            stop = min(start + _MASKED_ROWS, len_q)
            mask = torch.ones(stop - start, cached + stop, dtype=torch.bool, device=q.device)
            attend_rows(slice(start, stop), cached + stop, attn_mask=mask.tril_(cached + start))


def log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, softmax_scale: float, causal: bool, lse: torch.Tensor
) -> None:
    """Write lse [num_heads, len_q] of one sequence; q and k packed, heads before head_dim."""
    len_q, len_k = q.shape[0], k.shape[0]
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1).permute(1, 2, 0)
    for start in range(0, len_q, _LSE_ROWS):
        rows = q[start : start + _LSE_ROWS].float().transpose(0, 1)
        scores = rows @ k * softmax_scale  # [num_heads, rows, len_k]
        if causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            visible.tril_(len_k - len_q + start)
            scores.masked_fill_(~visible, float("-inf"))
        lse[:, start : start + _LSE_ROWS] = scores.logsumexp(dim=2)
