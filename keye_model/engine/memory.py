"""What bounds the memory of an engine: limits, pages of the cache, features, and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keye_model.checkpoint.config import KeyeConfig
from keye_model.engine.decode_batch import MAX_ROWS
from keye_model.inputs.request import GridTHW, Request
from keye_model.network.cache import PAGE_SIZE
from keye_model.network.features import MAX_PATCHES_PER_CALL


@dataclass(frozen=True)
class Limits:
    """What bounds memory, whatever the inputs.

    Attributes:
        max_prefill_tokens: Prompt tokens per forward pass of the decoder.
        max_patches_per_call: Patches per forward pass of the vision tower. A segment of attention
            (an image; a frame of 1.5; a whole video of 8B-Preview) is never split.
        max_cache_tokens: Tokens in the cache, of running requests or kept to be found again. None:
            the model's context, or what the requests of a call need together if that is more; on a
            GPU at most what fits into 90 % of the free memory beside features, the widest
            activations and 512 MB for CUDA graphs.
        max_feature_bytes: Features of pictures that are kept; None: 256 MiB, on a GPU 1 GiB.
    """

    max_prefill_tokens: int = 8192
    max_patches_per_call: int = MAX_PATCHES_PER_CALL
    max_cache_tokens: int | None = None
    max_feature_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")


def cache_pages(num_tokens: Sequence[int]) -> int:
    """Pages of the cache that requests need together, each of so many tokens with its answer.

    The last generated token is never stored, and at most MAX_ROWS requests run at once.
    """
    pages = sorted(-(-(count - 1) // PAGE_SIZE) for count in num_tokens)
    return sum(pages[-MAX_ROWS:])


def kept_pages(config: KeyeConfig, num_pages: int, limits: Limits) -> int:
    """Pages that an engine allocates when the requests of a call need ``num_pages`` together."""
    if limits.max_cache_tokens is not None:
        return limits.max_cache_tokens // PAGE_SIZE
    return max(cache_pages([config.text_config.max_position_embeddings]), num_pages)


def kept_feature_bytes(limits: Limits, device_type: str) -> int:
    """Most bytes of features that an engine keeps."""
    if limits.max_feature_bytes is not None:
        return limits.max_feature_bytes
    return 1 << 30 if device_type == "cuda" else 256 << 20


def free_pages(config: KeyeConfig, limits: Limits, weight: torch.Tensor, beside: int) -> int:
    """Pages that fit into a GPU's memory with features and ``beside`` other bytes."""
    free, _ = torch.cuda.mem_get_info(weight.device)
    # mem_get_info counts blocks that PyTorch keeps for reuse as taken.
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    text = config.text_config
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    # Each prompt token also has its embedding while its request is prefilled.
    token = (cached + text.hidden_size) * weight.dtype.itemsize
    beside += kept_feature_bytes(limits, "cuda")
    return max(int(0.9 * free) - beside, 0) // (token * PAGE_SIZE)


def activation_bytes(
    config: KeyeConfig, requests: Sequence[Request], limits: Limits, itemsize: int
) -> int:
    """Bytes of the widest activations of one pass: tower or decoder, whichever needs more."""
    text, vision = config.text_config, config.vision_config
    grids = [grid for r in requests for grid in r.image_grid_thw + r.video_grid_thw]
    segments = [attention_segments(config, grid) for grid in grids]
    patches = sum(count * length for count, length in segments)
    longest = max((length for _, length in segments), default=0)
    patches = min(patches, max(limits.max_patches_per_call, longest))
    tokens = min(sum(r.input_ids.numel() for r in requests), limits.max_prefill_tokens)
    # Tower: input, residual, norm, qkv (3) and attention, beside the widest part of the MLP.
    # Decoder: residual stream, norm and one more, beside gate, up and their product.
    tower = patches * (7 * vision.hidden_size + 2 * vision.intermediate_size)
    decoder = tokens * (3 * text.hidden_size + 3 * text.intermediate_size)
    # Logits twice, as fp32 too, and the tokens seen.
    logits = len(requests) * text.vocab_size
    return max(tower, decoder, logits) * itemsize + logits * (4 + 1)


def attention_segments(config: KeyeConfig, grid: GridTHW) -> tuple[int, int]:
    """(number of attention segments, patches in each) of one grid row."""
    frames, rows, columns = grid
    if config.variant.joint_video_attention:
        return 1, frames * rows * columns
    return frames, rows * columns
