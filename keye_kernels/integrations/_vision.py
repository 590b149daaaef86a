"""Forwards of the vision towers: attention over packed or padded images, embeddings, mergers."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from keye_kernels import merge_patches, patch_embed, varlen_attention
from keye_kernels.integrations._guard import LINEAR, fits, is_itself, known
from keye_kernels.integrations._layers import (
    LAYER_NORM,
    Forward,
    Maker,
    linear_gelu,
    norm,
    rows,
)

SEQUENTIAL = known(nn.Sequential)
CONV = known(nn.Conv2d)
EMBEDDING = known(nn.Embedding)
_STARTS = "keye_kernels_starts"  # keyword by which SigLIP2's encoder passes starts to its layers


def qwen2_5_merger_forward(*_: Any) -> Forward:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.ln_q(x).view(-1, self.hidden_size)
        if not is_itself(self.mlp, SEQUENTIAL) or len(self.mlp) != 3:
            return self.mlp(x)
        linear_1, activation, linear_2 = self.mlp
        return linear_2(linear_gelu(linear_1, activation, x))

    return forward


def qwen3_merger_forward(*_: Any) -> Forward:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, self.hidden_size) if self.use_postshuffle_norm else x
        x = norm(self.norm, x, LAYER_NORM).view(-1, self.hidden_size)
        return self.linear_fc2(linear_gelu(self.linear_fc1, self.act_fn, x))

    return forward


def paddle_projector_forward(_: ModuleType, original: Forward) -> Forward:
    def forward(
        self: nn.Module, image_features: torch.Tensor, image_grid_thw: torch.Tensor
    ) -> torch.Tensor:
        pre_norm = self.pre_norm
        if not (
            is_itself(pre_norm, LAYER_NORM) and fits(image_features, pre_norm.weight, pre_norm.bias)
        ):
            return original(self, image_features, image_grid_thw)
        x = merge_patches(
            rows(image_features),
            pre_norm.weight,
            pre_norm.bias,
            pre_norm.eps,
            image_grid_thw.tolist(),
            merge_size=self.merge_kernel_size[0],
            norm_first=True,
        )
        return self.linear_2(linear_gelu(self.linear_1, self.act, x))

    return forward


def paddle_embeddings_forward(_: ModuleType, original: Forward) -> Forward:
    def forward(
        self: nn.Module, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        conv, table = self.patch_embedding, self.position_embedding
        if not (
            is_itself(conv, CONV)
            and is_itself(table, EMBEDDING)
            and fits(conv.weight, conv.bias, table.weight)
        ):
            return original(self, pixel_values, grid_thw, **kwargs)
        return patch_embed(
            pixel_values.flatten(0, 1).to(conv.weight.dtype).contiguous(),
            conv.weight,
            conv.bias,
            table.weight,
            grid_thw.tolist(),
            image_mean=(0.5, 0.5, 0.5),  # unused: these pixels are normalised
            image_std=(0.5, 0.5, 0.5),
        )

    return forward


def check_dropout(dropout: float) -> None:
    if dropout:
        raise RuntimeError(
            f"attention_dropout must be 0 in training mode, got {dropout}; call model.eval()"
        )


def _attend_frames(
    self: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
) -> torch.Tensor:
    """q, k, v: [num_tokens, num_heads, head_dim]. Returns [num_tokens, hidden_size]."""
    check_dropout(self.attention_dropout if self.training else 0.0)
    starts = cu_seqlens.to(q.device, torch.int32)
    if max_seqlen is None:  # the tower's forward, which passes it, is not ours
        max_seqlen = int(starts.diff().max())
    return varlen_attention(q, k, v, starts, starts, max_seqlen, max_seqlen).flatten(1)


def _is_ours(self: nn.Module, x: torch.Tensor) -> bool:
    """Whether our attention serves; "eager" must return attention weights, which ours does not."""
    return fits(x) and self.config._attn_implementation != "eager"


def _writable(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """linear(x), which rope may overwrite: a copy if a hook may hold the output."""
    y = linear(x)
    return y if is_itself(linear, LINEAR) else y.clone()


def qwen_attention(modeling: ModuleType, original: Forward) -> Forward:
    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if args or position_embeddings is None or not _is_ours(self, hidden_states):
            kwargs.update(position_embeddings=position_embeddings, max_seqlen=max_seqlen)
            return original(self, hidden_states, cu_seqlens, *args, **kwargs)
        qkv = _writable(self.qkv, hidden_states)
        q, k, v = qkv.view(hidden_states.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = modeling.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        return self.proj(_attend_frames(self, q, k, v, cu_seqlens, max_seqlen))

    return forward


def paddle_attention(modeling: ModuleType, original: Forward) -> Forward:
    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not _is_ours(self, hidden_states):
            return original(
                self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs
            )
        q, k, v = (
            linear.unflatten(-1, (self.num_heads, self.head_dim))
            for linear in (
                _writable(self.q_proj, hidden_states),
                _writable(self.k_proj, hidden_states),
                self.v_proj(hidden_states),
            )
        )
        q, k = modeling.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        return self.out_proj(_attend_frames(self, q, k, v, cu_seqlens, max_seqlen)), None

    return forward


def _longest_frame(grid_thw: torch.Tensor) -> int:
    return max((h * w for _, h, w in grid_thw.tolist()), default=0)


def qwen_tower(*, windows: bool) -> Maker:
    """Pass the tower its longest segment, so that no layer has to read it from the device."""

    def make(_: ModuleType, original: Forward) -> Forward:
        def forward(
            self: nn.Module, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any
        ) -> Any:
            longest = _longest_frame(grid_thw)
            kwargs.setdefault("max_seqlen", longest)
            if windows:
                side = self.window_size // self.patch_size
                kwargs.setdefault("max_window_seqlen", min(longest, side * side))
            return original(self, hidden_states, grid_thw=grid_thw, **kwargs)

        return forward

    return make


def paddle_encoder(_: ModuleType, original: Forward) -> Forward:
    """Pass the longest segment, as `qwen_tower` does: in PaddleOCR-VL the encoder has the grid."""

    def forward(
        self: nn.Module,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.setdefault("max_seqlen", _longest_frame(grid_thw))
        return original(self, inputs_embeds, attention_mask, grid_thw=grid_thw, **kwargs)

    return forward


def siglip2_attention(_: ModuleType, original: Forward) -> Forward:
    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        starts = kwargs.pop(_STARTS, None)  # int32 [2, n + 1], from `siglip2_encoder`
        if starts is None or not _is_ours(self, hidden_states):
            return original(self, hidden_states, attention_mask, **kwargs)
        check_dropout(self.dropout if self.training else 0.0)
        batch_size, length, _hidden = hidden_states.shape
        q, k, v = (
            linear(hidden_states).reshape(batch_size * length, self.num_heads, self.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = varlen_attention(q, k, v, *starts, length, length)
        return self.out_proj(out.view(hidden_states.shape)), None

    return forward


def siglip2_encoder(modeling: ModuleType, original: Forward) -> Forward:
    """Compute sequence starts from the mask, once for all layers."""

    def forward(
        self: nn.Module,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        parts = (part for layer in self.layers for part in (layer, getattr(layer, "self_attn", 0)))
        if not _is_ours(self, inputs_embeds) or any(  # other layers may not accept _STARTS
            type(part).__module__ != modeling.__name__ for part in parts
        ):
            return original(self, inputs_embeds, attention_mask, **kwargs)
        batch_size, length, _hidden = inputs_embeds.shape
        mask = None if attention_mask is None else _tokens(attention_mask)
        starts_k = segments(mask, batch_size, length, inputs_embeds.device)
        starts_q = starts_k
        if mask is not None:
            # Queries at padding see the tokens too, since the text tower's answer is read from the
            # last position of a row, padding or not. So padding segments have keys and no queries.
            row = torch.arange(batch_size, device=starts_k.device)[:, None]
            ends = row + torch.tensor([0, 0, 1], device=starts_k.device)
            starts_q = F.pad(ends.flatten() * length, (0, 1), value=batch_size * length).int()
        kwargs[_STARTS] = torch.stack([starts_q, starts_k])
        return original(self, inputs_embeds, attention_mask, **kwargs)

    return forward


def _tokens(mask: torch.Tensor) -> torch.Tensor:
    """Reduce a mask [batch_size, 1, any, length] to [batch_size, length], true at tokens.

    The mask is bool, or float with 0 at tokens.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"attention_mask must be a tensor of 4 dims here, got {got}")
    mask = mask[:, 0, 0]
    return mask == 0 if mask.is_floating_point() else mask.bool()


def segments(
    mask: torch.Tensor | None, batch_size: int, length: int, device: torch.device
) -> torch.Tensor:
    """Sequence starts, int32, of padded rows laid end to end: [batch_size + 1] without a mask.

    With a mask [batch_size, length], true at tokens, [3 * batch_size + 1]: the padding before and
    after a row's tokens are sequences of their own. So all shapes are known without reading from
    the device, and nothing has to be gathered.

    Raises:
        ValueError: The tokens of a row are not consecutive.
    """
    if mask is None:
        return torch.arange(batch_size + 1, device=device, dtype=torch.int32) * length
    message = "attention_mask must mark consecutive tokens in each row, got holes"
    consecutive = is_consecutive(mask)
    if torch.compiler.is_compiling():
        torch._assert_async(consecutive, message)
    elif not consecutive:
        raise ValueError(message)
    first, count = mask.int().argmax(dim=1), mask.sum(dim=1)
    start = torch.arange(batch_size, device=mask.device) * length
    starts = torch.stack([start, start + first, start + first + count], dim=1).flatten()
    return F.pad(starts, (0, 1), value=batch_size * length).int()


def is_consecutive(mask: torch.Tensor) -> torch.Tensor:
    """Whether each row of [batch_size, length] has its tokens in one run: a bool on the device."""
    edges = F.pad(mask.int(), (1, 1)).diff(dim=1).abs().sum(dim=1)
    return (edges <= 2).all()
