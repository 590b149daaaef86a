"""What a batch will cost before it runs: tokens, memory, and the time arithmetic cannot undercut.

Counts come from the shapes alone: one multiply-add is two FLOPs, causal attention is half its
square, padding is not work. The seconds are a floor at given matmul and copy rates, not a
prediction of any kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keye_model.checkpoint.config import KeyeConfig
from keye_model.checkpoint.weights import DECODER_LAYERS, PROJECTOR, TOWER, tensor_shapes
from keye_model.engine import memory
from keye_model.engine.memory import Limits, activation_bytes, attention_segments, cache_pages
from keye_model.inputs.request import Request, num_patches
from keye_model.network.cache import PAGE_SIZE


@dataclass(frozen=True)
class Costs:
    """Prices of one unit of each stage, FLOPs unless the name says bytes."""

    vision_linear: int  # per patch
    vision_attention: int  # per patch and patch of its segment
    projector: int  # per merged token
    text_linear: int  # per token
    text_attention: int  # per token and visible token
    lm_head: int  # per evaluated token
    weight_bytes: int
    decode_bytes: int  # the matrices one decode step reads
    cache_bytes: int  # per token

    @classmethod
    def of(cls, config: KeyeConfig) -> Costs:
        text, vision = config.text_config, config.vision_config
        shapes = tensor_shapes(config)
        itemsize = config.dtype.itemsize

        def matmul_flops(part: str) -> int:
            matrices = (s for n, s in shapes.items() if n.startswith(part) and len(s) > 1)
            return sum(2 * math.prod(shape) for shape in matrices)

        position_table = 2 * vision.position_grid**2 * vision.hidden_size
        head = 2 * text.vocab_size * text.hidden_size
        layers = matmul_flops(DECODER_LAYERS)
        kv_width = text.num_key_value_heads * text.head_dim
        return cls(
            vision_linear=matmul_flops(TOWER) - position_table,
            vision_attention=4 * vision.num_hidden_layers * vision.hidden_size,
            projector=matmul_flops(PROJECTOR),
            text_linear=layers,
            text_attention=4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim,
            lm_head=head,
            weight_bytes=sum(map(math.prod, shapes.values())) * itemsize,
            decode_bytes=(layers + head) // 2 * itemsize,
            cache_bytes=2 * text.num_hidden_layers * kv_width * itemsize,
        )


@dataclass(frozen=True)
class Plan:
    """A batch's counts; FLOPs and bytes of the whole batch."""

    prompt_tokens: tuple[int, ...]
    image_tokens: int
    video_tokens: int
    patches: int
    longest_segment: int  # patches that attend to each other
    vision_flops: int
    prefill_flops: int
    decode_step_flops: int  # the last, most expensive step
    decode_step_bytes: int
    weight_bytes: int
    cache_bytes: int  # whole pages of this batch
    kept_cache_bytes: int  # of all pages that an engine made for it has
    activation_bytes: int
    pixel_bytes: int

    def floor_seconds(self, matmul_flops: float, copy_bytes: float) -> dict[str, float]:
        """The least time each stage can take at a matmul rate (FLOP/s) and copy rate (byte/s)."""
        step = max(self.decode_step_flops / matmul_flops, self.decode_step_bytes / copy_bytes)
        return {
            "vision": self.vision_flops / matmul_flops,
            "prefill": self.prefill_flops / matmul_flops,
            "decode_step": step,
        }


def plan(config: KeyeConfig, requests: Sequence[Request], max_new_tokens: int) -> Plan:
    """Count what one batch will need.

    Args:
        config: Of the checkpoint.
        requests: Prompts as the processor makes them; only sizes are read.
        max_new_tokens: Of each request, fewer where the context ends; the cache and the last decode
            step are counted with all.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens}")
    costs = Costs.of(config)
    merge = config.vision_config.spatial_merge_size**2
    images = [grid for request in requests for grid in request.image_grid_thw]
    videos = [grid for request in requests for grid in request.video_grid_thw]
    segments = [attention_segments(config, grid) for grid in images + videos]
    patches = sum(count * length for count, length in segments)
    squares = sum(count * length**2 for count, length in segments)
    prompts = tuple(request.input_ids.numel() for request in requests)
    context = config.text_config.max_position_embeddings
    totals = [max(min(prompt + max_new_tokens, context), prompt + 1) for prompt in prompts]
    # What the last step reads: the token it chooses is never stored.
    cached = sum(totals) - len(totals)
    pixels = [(r.pixel_values, r.pixel_values_videos) for r in requests]
    # All prompts have their embeddings at once; those of one pass are part of its activations.
    limits, itemsize = Limits(), config.dtype.itemsize
    waiting = max(sum(prompts) - limits.max_prefill_tokens, 0) * config.text_config.hidden_size
    vision = costs.vision_linear * patches + costs.vision_attention * squares
    prefill = costs.text_linear * sum(prompts) + costs.lm_head * len(prompts)
    prefill += costs.text_attention * sum(prompt**2 for prompt in prompts) // 2
    page_bytes, pages = costs.cache_bytes * PAGE_SIZE, cache_pages(totals)
    step = (costs.text_linear + costs.lm_head) * len(prompts)
    return Plan(
        prompt_tokens=prompts,
        image_tokens=num_patches(images) // merge,
        video_tokens=num_patches(videos) // merge,
        patches=patches,
        longest_segment=max((length for _, length in segments), default=0),
        vision_flops=vision + costs.projector * (patches // merge),
        prefill_flops=prefill,
        decode_step_flops=step + costs.text_attention * cached,
        decode_step_bytes=costs.decode_bytes + costs.cache_bytes * cached,
        weight_bytes=costs.weight_bytes,
        cache_bytes=page_bytes * pages,
        kept_cache_bytes=page_bytes * memory.kept_pages(config, pages, limits),
        activation_bytes=activation_bytes(config, requests, limits, itemsize) + waiting * itemsize,
        pixel_bytes=sum(t.nbytes for pair in pixels for t in pair if t is not None),
    )
