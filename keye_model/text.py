"""The text decoder: Qwen3 with 3D rope, over a paged cache.

Source: KeyeDecoderLayer and KeyeAttention in modeling_keye.py of Keye-VL-8B-Preview. Keys enter the
cache normalised and rotated. Causality is that of the sequence, never of the 3D positions.
"""

from __future__ import annotations

import torch
from torch import nn

from keye_kernels import (
    backends,
    linear_decode,
    paged_decode_attention,
    paged_prefill_attention,
    qk_norm_mrope_store,
    rms_norm,
    silu_mul,
)
from keye_model.cache import CacheStep, PagedCache
from keye_model.config import KeyeTextConfig

_FEW_ROWS = 16  # that linear_decode takes


class KeyeTextModel(nn.Module):
    """Embedding table, decoder layers, final norm."""

    def __init__(self, config: KeyeTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: PagedCache, step: CacheStep
    ) -> torch.Tensor:
        """Run new tokens through the decoder; their keys and values stay in `cache`.

        Args:
            hidden: [num_tokens, hidden_size], embedded tokens of all sequences, packed.
            positions: [3, num_tokens], int64, on the device of `hidden`: (t, h, w).
            cache: Holds what the sequences said before.
            step: From `cache.step`, for exactly these tokens.

        Returns:
            [num_tokens, hidden_size], after the final norm.
        """
        if step.is_decode and _served_by_linear_decode(hidden):
            for layer in self.layers:
                hidden = layer.decode(hidden, positions, cache, step)
            return self.norm(hidden, None)[0]
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, positions, cache, step)
        # Nobody reads the sum after the last norm: it is not written.
        out, norm = (hidden, None), self.norm
        return rms_norm(hidden, norm.weight, norm.eps, residual=residual, out=out)[0]


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm and added to the residual stream.

    Takes and returns (branch, residual): the branch is added by the next norm, in the same pass.
    """

    def __init__(self, config: KeyeTextConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: PagedCache,
        step: CacheStep,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, positions, cache, step)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def decode(
        self, x: torch.Tensor, positions: torch.Tensor, cache: PagedCache, step: CacheStep
    ) -> torch.Tensor:
        """The same for few rows, where what surrounds a matrix is part of reading it.

        Takes and returns the residual stream, [num_tokens, hidden_size]. Rounds where `forward`
        does.
        """
        attention, mlp = self.self_attn, self.mlp
        qkv = linear_decode(x, attention.qkv_proj.weight, **self.input_layernorm.arguments)
        heads = attention.attend(qkv, positions, cache, step)
        x = linear_decode(heads, attention.o_proj.weight, residual=x)
        norm = self.post_attention_layernorm.arguments
        y = linear_decode(x, mlp.gate_up_proj.weight, **norm, swiglu=True)
        return linear_decode(y, mlp.down_proj.weight, residual=x)


class Attention(nn.Module):
    """Grouped-query attention; q and k normalised per head before they are rotated."""

    def __init__(self, config: KeyeTextConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_width + 2 * kv_width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(q_width, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cache: PagedCache, step: CacheStep
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size]. Returns a tensor like x."""
        return self.o_proj(self.attend(self.qkv_proj(x), positions, cache, step))

    def attend(
        self, qkv: torch.Tensor, positions: torch.Tensor, cache: PagedCache, step: CacheStep
    ) -> torch.Tensor:
        """What lies between the projections: [num_tokens, num_heads * head_dim]."""
        config = self.config
        k_cache, v_cache = cache.layer(self.index)
        q = qk_norm_mrope_store(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            positions,
            k_cache,
            v_cache,
            step.slot_mapping,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            mrope_section=config.mrope_section,
            theta=config.rope_theta,
            eps=config.rms_norm_eps,
        )
        if step.is_decode:
            x = paged_decode_attention(
                q,
                k_cache,
                v_cache,
                step.block_table,
                step.cache_seqlens,
                max_seqlen_k=step.max_seqlen_k,
            )
        else:
            x = paged_prefill_attention(
                q,
                k_cache,
                v_cache,
                step.block_table,
                step.cu_seqlens_q,
                step.cache_seqlens,
                step.max_seqlen_q,
                step.max_seqlen_k,
            )
        return x.flatten(1)


class MLP(nn.Module):
    def __init__(self, config: KeyeTextConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


class Linear(nn.Linear):
    """nn.Linear whose few rows of a decode step go to the CUDA kernel of ``linear_decode``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _served_by_linear_decode(x):
            return linear_decode(x, self.weight, bias=self.bias)
        return super().forward(x)


def _served_by_linear_decode(x: torch.Tensor) -> bool:
    """Whether these are few rows for the CUDA kernel; its definition is slower than nn.Linear."""
    if x.shape[0] > _FEW_ROWS or x.device.type != "cuda":
        return False
    return backends("cuda")["linear_decode"].backend == "cuda"


class RMSNorm(nn.Module):
    """RMSNorm that first adds the branch to the residual stream, if there is one yet."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    @property
    def arguments(self) -> dict[str, torch.Tensor | float]:
        """What ``linear_decode`` calls its norm."""
        return {"norm_weight": self.weight, "eps": self.eps}

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [num_tokens, hidden_size]. Returns (norm of the sum, the sum)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return rms_norm(x, self.weight, self.eps, residual=residual)
