"""A tiny Keye-VL checkpoint with random weights, in the layout of the published ones.

For the demo and the tests. It has all files that the loader and the processor read, from a sharded
safetensors index to a byte-level BPE trained here: no download is needed. Its answers mean nothing.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from keye_model.checkpoint.config import (
    PREVIEW,
    V1_5,
    KeyeConfig,
    KeyeTextConfig,
    KeyeVisionConfig,
    Variant,
)
from keye_model.checkpoint.weights import tensor_shapes
from keye_model.processing.template import DEFAULT_TEMPLATE

# In the order of their ids. Decoding with skip_special_tokens drops the first list.
_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
)
_ADDED = (
    "<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think> <|point_start|> "
    "<|point_end|> <|ocr_text_start|> <|ocr_text_end|> <|clip_time_start|> <|clip_time_end|>"
)
_ADDED_1_5 = "<|frame|> <|fast_start|> <|fast_end|> <|fast_video_pad|>"

_CORPUS = """\
You are a helpful assistant. Describe this image. Describe this video. What happened in the video?
The picture shows a red square on a blue ground; the video shows a white dot that moves from left
to right. Can you see the details in the images and video? Yes: there are two of them, and the
second one is larger than the first. I'd be happy to describe what I see. Let me think about it.
How many objects are there, and which colour do they have? First look at the left side, then at the
right side. These are from my vacation. It was a trip to the mountains. The answer is not known.
<analysis>This question is simple, so no long reasoning is needed.</analysis> <answer></answer>
"""
# The published pre-tokenizer: Qwen2's pattern, which isolates every digit.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(
    directory: str | os.PathLike,
    variant: Variant = PREVIEW,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a complete tiny checkpoint of either line into ``directory`` and return its path.

    2 vision layers of 2 x 72, 2 text layers of 2 query heads and 1 key/value head of 128, about
    1.5 million parameters in two shards.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(variant)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = _config(tokenizer, variant, dtype)
    eos, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    _write_json(directory / "config.json", config.to_dict())
    _write_json(
        directory / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "eos_token_id": [eos, pad],
            "pad_token_id": pad,
        },
    )
    _write_json(
        directory / "preprocessor_config.json",
        {
            "min_pixels": 4 * 28 * 28,
            "max_pixels": 1280 * 28 * 28,
            "patch_size": 14,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 4096},
    )
    _write_json(directory / "chat_template.json", {"chat_template": DEFAULT_TEMPLATE})
    _write_weights(directory, config, seed)
    return directory


def _train_tokenizer(variant: Variant) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL.split()])
    added = _ADDED.split() + (_ADDED_1_5.split() if variant == V1_5 else [])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def _config(tokenizer: Tokenizer, variant: Variant, dtype: torch.dtype) -> KeyeConfig:
    text = KeyeTextConfig(
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6 if variant == PREVIEW else 8e6,
        mrope_section=(16, 24, 24),
        max_position_embeddings=4096,
    )
    vision = KeyeVisionConfig(
        hidden_size=144,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=384,
        patch_size=14,
        spatial_merge_size=2,
        tokens_per_second=2,
    )
    return KeyeConfig(
        text,
        vision,
        variant,
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        dtype=dtype,
    )


def _write_weights(directory: Path, config: KeyeConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = noise * 0.1 + (1.0 if name.endswith(".weight") else 0.0)
        else:
            fan_in = 1 if "embed" in name and len(shape) == 2 else math.prod(shape[1:])
            value = noise / math.sqrt(fan_in)
        tensors[name] = value.to(config.dtype)
    names = list(tensors)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in shard}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
