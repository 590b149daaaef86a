"""The text decoder: Qwen3 with 3D rope, over a paged cache.

Source: KeyeDecoderLayer and KeyeAttention in modeling_keye.py of Keye-VL-8B-Preview. Keys enter the
cache normalised and rotated. The causal mask follows the order of tokens, not the 3D positions.
"""

from __future__ import annotations

import torch
from torch import nn

from keye_kernels import (
    linear,
    paged_decode_attention,
    paged_prefill_attention,
    qk_norm_mrope_store,
    rms_norm,
)
from keye_model.checkpoint.config import KeyeTextConfig
from keye_model.network.cache import CacheLayout, PagedCache


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
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: PagedCache, layout: CacheLayout
    ) -> torch.Tensor:
        """Run new tokens through the decoder; their keys and values stay in `cache`.

        Args:
            hidden: [num_tokens, hidden_size], embedded tokens of all sequences, packed. It is
                overwritten.
            positions: [3, num_tokens], int64, on the device of `hidden`: (t, h, w).
            cache: Holds keys and values of the sequences' earlier tokens.
            layout: From `cache.append`, for exactly these tokens.

        Returns:
            [num_tokens, hidden_size], after the final norm.
        """
        for layer in self.layers:
            hidden = layer(hidden, positions, cache, layout)
        return rms_norm(hidden, self.norm.weight, self.norm.eps)


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: KeyeTextConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cache: PagedCache, layout: CacheLayout
    ) -> torch.Tensor:
        """x: the residual stream, [num_tokens, hidden_size], which is overwritten and returned."""
        x = self.self_attn(x, self.input_layernorm, positions, cache, layout)
        return self.mlp(x, self.post_attention_layernorm)


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
        self,
        x: torch.Tensor,
        norm: RMSNorm,
        positions: torch.Tensor,
        cache: PagedCache,
        layout: CacheLayout,
    ) -> torch.Tensor:
        """Add the attention of norm(x) to x, [num_tokens, hidden_size]."""
        qkv = linear(x, self.qkv_proj.weight, norm_weight=norm.weight, eps=norm.eps)
        heads = self.attend(qkv, positions, cache, layout)
        return linear(heads, self.o_proj.weight, residual=x, out=x)

    def attend(
        self, qkv: torch.Tensor, positions: torch.Tensor, cache: PagedCache, layout: CacheLayout
    ) -> torch.Tensor:
        """From the qkv projection to the input of o_proj, [num_tokens, num_heads * head_dim]."""
        config = self.config
        k_cache, v_cache = cache.layer(self.index)
        q = qk_norm_mrope_store(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            positions,
            k_cache,
            v_cache,
            layout.slot_mapping,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            mrope_section=config.mrope_section,
            theta=config.rope_theta,
            eps=config.rms_norm_eps,
        )
        if layout.is_decode:
            x = paged_decode_attention(
                q,
                k_cache,
                v_cache,
                layout.block_table,
                layout.cache_seqlens,
                max_seqlen_k=layout.max_seqlen_k,
            )
        else:
            x = paged_prefill_attention(
                q,
                k_cache,
                v_cache,
                layout.block_table,
                layout.cu_seqlens_q,
                layout.cache_seqlens,
                layout.max_seqlen_q,
                layout.max_seqlen_k,
            )
        return x.flatten(1)


class MLP(nn.Module):
    """SwiGLU; gate and up are one matrix."""

    def __init__(self, config: KeyeTextConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Add the MLP of norm(x) to x, [num_tokens, hidden_size]."""
        gate_up = self.gate_up_proj.weight
        y = linear(x, gate_up, norm_weight=norm.weight, eps=norm.eps, swiglu=True)
        return linear(y, self.down_proj.weight, residual=x, out=x)


class Linear(nn.Linear):
    """nn.Linear that calls our `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, bias=self.bias)


class RMSNorm(nn.Module):
    """Weight and eps of an RMSNorm; the next op applies it."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps
