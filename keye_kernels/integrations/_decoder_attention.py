"""Decoder attention registered with transformers as `attn_implementation="keye_kernels"`.

Prompts run on `varlen_attention`; a batch padded on the left becomes one packed call. Everything
else runs on PyTorch's scaled dot product attention (sdpa): steps of one token (our op for those
reads a paged cache, which transformers does not have), static caches, sliding windows, padding on
the right and masks of a model's own.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keye_kernels import varlen_attention
from keye_kernels._checks import FLOAT_DTYPES
from keye_kernels.integrations._layers import Forward
from keye_kernels.integrations._vision import check_dropout

NAME = "keye_kernels"
NOTE = "prompts over a dynamic cache; sdpa for steps of one token and for other masks"
# Keyword arguments of attention functions that do not change the result.
_HARMLESS = frozenset([
    "cache", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "labels",
    "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_value", "past_key_values",
    "position_embeddings", "position_ids", "return_dict", "sliding_window", "use_cache",
])  # fmt: skip

# Names of the families' modeling modules in transformers, filled by `_families`.
MODELINGS: set[str] = set()

# Models whose layers read the mask themselves: model_type to the attention whose mask they expect.
_OWN_MASKS = {"doge": "sdpa", "xglm": "eager"}


class Configured:
    """The model's configuration with our attention in place of its own; reads go to the original.

    "eager" is kept: it returns attention weights.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    @property
    def _attn_implementation(self) -> str:
        name = self.original._attn_implementation
        return name if name == "eager" else NAME

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name.startswith("__"):  # while it is copied, `original` is not set
            raise AttributeError(name)
        return getattr(self.original, name)


def model_forward(_: ModuleType, original: Forward) -> Forward:
    """Forward of the model that owns the decoder layers, which makes the mask for our attention.

    If the attention of any layer is not ours, all get the library's mask. The user's configuration
    is put back after the call, since other models may be built from it.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        # Already `Configured` while another thread runs this forward.
        if isinstance(config, Configured) or not _are_ours(self.layers, config):
            return original(self, *args, **kwargs)
        self.config = Configured(config)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.config = config

    return forward


def _are_ours(layers: nn.ModuleList, config: Any) -> bool:
    """Whether every layer's config is `Configured` and asks for the model's implementation."""
    for layer in layers:  # runs in each step of generation: nn.Module's look-ups are slower
        attention = layer._modules.get("self_attn")
        own = None if attention is None else attention.__dict__.get("config")
        original = own.original if type(own) is Configured else None
        if original is config:
            continue
        if original is None or original._attn_implementation != config._attn_implementation:
            return False
    return True


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """Sequence starts of queries and keys [1, 2, n + 1] int32 if our attention serves, else the
    mask of sdpa (or of `_OWN_MASKS`).

    transformers' mask functions call this once per forward of a model.
    """
    own = _OWN_MASKS.get(getattr(kwargs.get("config"), "model_type", None))
    starts = None if own else _starts(**kwargs)
    return ALL_MASK_ATTENTION_FUNCTIONS[own or "sdpa"](**kwargs) if starts is None else starts[None]


def _starts(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: torch.Tensor | None,
    q_length: int | None = None,
    q_offset: int | torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,  # replaces the two above in transformers 4
    kv_offset: int = 0,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    **_: Any,
) -> torch.Tensor | None:
    if cache_position is not None:
        # A static cache, longer than the tokens it holds, does not allow the skip.
        q_length, device = cache_position.shape[0], cache_position.device
        q_offset = kv_length - q_length if allow_is_causal_skip else None
    if (
        q_length <= 1
        or batch_size == 0
        or mask_function is not causal_mask_function
        or local_size is not None
        or kv_offset != 0
        or isinstance(q_offset, torch.Tensor)  # a static cache, in transformers 5
        or q_offset != kv_length - q_length
        or dtype not in FLOAT_DTYPES
        or torch.is_autocast_enabled(device.type)
    ):
        return None
    row = torch.arange(batch_size + 1, device=device, dtype=torch.int32)
    starts = torch.stack([row * q_length, row * kv_length])
    if attention_mask is None:
        return starts
    if attention_mask.shape != (batch_size, kv_length) or torch.compiler.is_compiling():
        return None  # torch.compile cannot read where the padding is
    tokens = attention_mask.int()
    if not (tokens.diff(dim=1) >= 0).all():  # read once per prompt, as transformers' sdpa does
        return None
    # Each row becomes three sequences: queries at padding, without keys, which give 0 as in sdpa;
    # keys at padding, without queries; the tokens. A row's queries stand at its last keys.
    padding = kv_length - tokens.sum(dim=1, dtype=torch.int32)
    queries, keys = starts[:, :-1]
    queries_after = queries + (padding - q_offset).clamp(min=0)
    starts_q = torch.stack([queries, queries_after, queries_after], dim=1).flatten()
    starts_k = torch.stack([keys, keys, keys + padding], dim=1).flatten()
    return torch.cat([torch.stack([starts_q, starts_k]), starts[:, -1:]], dim=1)


def _is_starts(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 3


def _is_for_sdpa(mask: Any) -> bool:
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4)


def _check(module: nn.Module, key: torch.Tensor, mask: torch.Tensor | None, more: dict) -> None:
    """Refuse what neither our op nor sdpa would honour."""
    left_out = [name for name in more if more[name] is not None and name not in _HARMLESS]
    if type(module).__module__ in MODELINGS:  # their layers pass no others: these are the caller's
        left_out.clear()
    window = more.get("sliding_window")
    if window is not None and (mask is None or _is_starts(mask)) and key.shape[2] > window:
        left_out.append("sliding_window")  # the mask does not include the window
    for name in left_out:
        value = more[name]
        got = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise NotImplementedError(
            f"{name} must be None with attn_implementation={NAME!r}, got {got} from "
            f"{type(module).__name__}; use attn_implementation='eager'"
        )


def _check_heads(module: nn.Module, query: torch.Tensor, value: torch.Tensor) -> None:
    head_dim = query.shape[3]
    if head_dim % 8 or head_dim > 256 or value.shape[3] != head_dim:
        raise NotImplementedError(
            f"head_dim must be a multiple of 8 up to 256, and that of values, with "
            f"attn_implementation={NAME!r}, got {head_dim} and {value.shape[3]} from "
            f"{type(module).__name__}; use attn_implementation='sdpa'"
        )


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: [batch_size, heads, length, head_dim], key and value with the cached ones.

    Raises:
        NotImplementedError: The model passes other arguments, such as sinks or a softcap.
    """
    _check(module, key, attention_mask, kwargs)
    if not _is_starts(attention_mask):
        name, config = "sdpa", getattr(module, "config", None)
        if isinstance(config, Configured) and not _is_for_sdpa(attention_mask):
            name = config.original._attn_implementation  # whose format the model's mask has
        return ALL_ATTENTION_FUNCTIONS[name](
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    if is_causal is False:
        raise NotImplementedError(
            f"is_causal must be True or None with attn_implementation={NAME!r} and a causal mask, "
            f"got False from {type(module).__name__}"
        )
    _check_heads(module, query, value)
    check_dropout(dropout)
    if torch.is_autocast_enabled(query.device.type):  # around this part: cast, as it does for sdpa
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch_size, _, q_length, head_dim = query.shape
    packed = (x.transpose(1, 2).reshape(-1, x.shape[1], head_dim) for x in (query, key, value))
    out = varlen_attention(
        *packed,
        *attention_mask[0],
        q_length,
        key.shape[2],
        softmax_scale=scaling,
        causal=True,
    )
    return out.view(batch_size, q_length, -1, head_dim), None


# At import, not in `apply`: unpickling a model with `Configured` imports only this module.
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
