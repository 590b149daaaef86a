"""The deterministic tiny model of the golden runs, written as a checkpoint and read by the loader.

Every weight is a hash of its published name and its index, so the goldens, computed with the
authors' modeling_keye.py (8B-Preview) and with three independent stacks (1.5), need no files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from keye_model.checkpoint.config import PREVIEW, KeyeConfig, Variant
from keye_model.checkpoint.weights import load_model, tensor_shapes
from keye_model.inputs.packing import pack
from keye_model.inputs.request import Request
from keye_model.network.cache import PagedCache
from keye_model.network.model import KeyeModel

IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93
FRAME, FAST_START, FAST_END = 80, 81, 82
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def raw_config(variant: Variant, **changes: object) -> dict:
    """`config.json` of the tiny model."""
    preview = variant == PREVIEW
    return {
        "architectures": [("Keye" if preview else "KeyeVL1_5") + "ForConditionalGeneration"],
        "model_type": "Keye" if preview else "KeyeVL1_5",
        "torch_dtype": "float32",
        "vocab_size": 100,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 1024,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "vision_config": {
            "hidden_size": 144,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 384,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "tokens_per_second": 2,
        },
    } | changes


def filler(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 values in [-0.5, 0.5): a hash of the name's byte sum and the row-major index."""
    mask = np.uint64(0xFFFFFFFF)
    x = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(1000003 * sum(name.encode()))
    x &= mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint64(shift)
        x = (x * np.uint64(factor)) & mask
    x ^= x >> np.uint64(16)
    return torch.from_numpy((x / 2.0**32 - 0.5).astype(np.float32)).view(shape)


@functools.cache
def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    u = 0.28 * filler(name, shape)
    return 1 + u if len(shape) == 1 and name.endswith(".weight") else u


def state_dict(config: KeyeConfig) -> dict[str, torch.Tensor]:
    """All used tensors under their published names; a new dict of shared tensors."""
    return {name: weight(name, shape) for name, shape in tensor_shapes(config).items()}


def pixels(name: str, num_patches: int) -> torch.Tensor:
    """[num_patches, 3, 14, 14], fp32 in [-1, 1): already normalised."""
    return 2 * filler(name, (num_patches, 3, 14, 14))


def write_checkpoint(
    directory: Path, raw: dict, tensors: dict[str, torch.Tensor], num_shards: int = 2
) -> Path:
    """A checkpoint directory in the published layout, with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for i in range(num_shards):
        filename = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = names[i::num_shards]
        save_file({name: tensors[name].contiguous() for name in part}, directory / filename)
        weight_map |= dict.fromkeys(part, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


class TinyKeye(nn.Module):
    """The model under its output head, as plainly as possible."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = KeyeModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @torch.inference_mode()
    def logits(self, *requests: Request) -> torch.Tensor:
        """[num_tokens, vocab_size] of all requests, packed, in one pass without a kept cache."""
        packed = pack(requests, self.config)
        cache, step = PagedCache.for_single_pass(
            self.config.text_config,
            packed.seqlens,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        hidden = self.model.embed(packed)
        positions = packed.positions.to(self.model.device)
        return self.lm_head(self.model(hidden, positions, cache, step))

    def cache(self, num_pages: int = 8, page_size: int = 16) -> PagedCache:
        return PagedCache(
            self.config.text_config,
            num_pages,
            page_size=page_size,
            dtype=self.model.dtype,
            device=self.model.device,
        )


@functools.cache
def tiny_keye(
    variant: Variant = PREVIEW,
    theta: float = 1e6,
    dtype: torch.dtype = torch.float32,
    eps: float = 1e-6,
) -> TinyKeye:
    """The tiny model, loaded from a checkpoint that holds fp32; shared, so leave it unchanged."""
    raw = raw_config(variant, rope_theta=theta, rms_norm_eps=eps)
    raw["vision_config"]["layer_norm_eps"] = eps
    config = KeyeConfig.from_dict(raw)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), raw, state_dict(config))
        return load_model(TinyKeye, config, Path(directory), device=DEVICE, dtype=dtype)


def with_variant(model: TinyKeye, **changes: bool) -> TinyKeye:
    """The same weights under another policy, for alarms."""
    config = model.config
    changed = TinyKeye(
        dataclasses.replace(config, variant=dataclasses.replace(config.variant, **changes))
    )
    changed.load_state_dict(model.state_dict())
    return changed.to(DEVICE).requires_grad_(False)


def g1() -> Request:
    """8B-Preview, mixed: two images and a video of two frames at 2 fps."""
    return Request(
        input_ids=torch.tensor(
            [1, 2, 92, *[90] * 4, 93, 5, 92, *[90] * 12, 93, 92, *[91] * 8, 93, 7, 8]
        ),
        pixel_values=pixels("pixel_values", 64),
        image_grid_thw=((1, 4, 4), (1, 6, 8)),
        pixel_values_videos=pixels("pixel_values_videos", 32),
        video_grid_thw=((2, 4, 4),),
        second_per_grid_ts=(0.5,),
    )


def g2() -> Request:
    """One image."""
    return Request(
        input_ids=torch.tensor([1, 2, 92, *[90] * 4, 93, 5]),
        pixel_values=pixels("pixel_values", 64)[:16],
        image_grid_thw=((1, 4, 4),),
    )


def g3() -> Request:
    """Text only."""
    return Request(input_ids=torch.tensor([1, 2, 3, 4, 5]))


def g4() -> Request:
    """1.5: an image, and a video of a slow, a fast and a slow frame with timestamps."""
    frames = [*[80, 11, 12, 13], *[91] * 4, *[80, 11, 12, 14, 81, 91, 82], *[80, 15, 12, 13]]
    return Request(
        input_ids=torch.tensor([1, 92, *[90] * 4, 93, 92, *frames, *[91] * 4, 93, 5, 6]),
        pixel_values=pixels("pixel_values", 16),
        image_grid_thw=((1, 4, 4),),
        pixel_values_videos=pixels("pixel_values_videos", 36),
        video_grid_thw=((1, 4, 4), (1, 2, 2), (1, 4, 4)),
    )
