"""Keye at the published widths, and transformers' models with the same weights.

On a CPU one layer each and a vocabulary of 2048 fit a small machine.
"""

import dataclasses

import torch
import transformers
from transformers.models import paddleocr_vl as paddle

from benchmarks.shapes import TEXT, VISION
from benchmarks.timing import DEVICE, ON_GPU
from keye_model import KeyeConfig, KeyeForConditionalGeneration, KeyeTextConfig, KeyeVisionConfig
from keye_model.checkpoint.config import PREVIEW
from keye_model.checkpoint.weights import destinations

DTYPE = torch.bfloat16
IMAGE = 4  # placeholder id
VISION_CONFIG = KeyeVisionConfig(
    hidden_size=VISION.hidden_size,
    intermediate_size=VISION.intermediate_size,
    num_hidden_layers=27 if ON_GPU else 1,
    num_attention_heads=VISION.num_heads,
    image_size=VISION.position_grid * VISION.patch_size,
    patch_size=VISION.patch_size,
    spatial_merge_size=VISION.merge_size,
    tokens_per_second=2,
)
TEXT_CONFIG = KeyeTextConfig(
    vocab_size=TEXT.vocab_size if ON_GPU else 2048,
    hidden_size=TEXT.hidden_size,
    intermediate_size=TEXT.intermediate_size,
    num_hidden_layers=36 if ON_GPU else 1,
    num_attention_heads=TEXT.num_heads,
    num_key_value_heads=TEXT.num_kv_heads,
    head_dim=TEXT.head_dim,
    rms_norm_eps=TEXT.eps,
    rope_theta=TEXT.rope_theta,
    mrope_section=TEXT.mrope_section,
    max_position_embeddings=40960,
)


def build_ours():
    """Keye with random weights: what is computed does not depend on them."""
    config = KeyeConfig(TEXT_CONFIG, VISION_CONFIG, PREVIEW, IMAGE, 5, 6, 7, dtype=DTYPE)
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    model = model.to(DTYPE).to_empty(device=DEVICE).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def build_tower(ours):
    """transformers' PaddleOCR-VL tower with the weights of ours."""
    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionModel

    model = PaddleOCRVisionModel(_paddle_vision()).to(DEVICE, DTYPE).eval().requires_grad_(False)
    model.load_state_dict(_published(ours, "visual."), strict=True)
    return model


def build_projector(ours):
    """transformers' PaddleOCR-VL projector with the weights of ours."""
    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector

    vision = {"hidden_size": VISION.hidden_size, "spatial_merge_size": VISION.merge_size}
    config = paddle.PaddleOCRVLConfig(
        vision_config=vision, text_config={"hidden_size": TEXT.hidden_size}
    )
    model = PaddleOCRProjector(config).to(DEVICE, DTYPE).eval().requires_grad_(False)
    model.load_state_dict(_published(ours, "mlp_AR."), strict=True)
    return model


def build_decoder(ours):
    """transformers' Qwen3 with the weights of ours."""
    fields = dataclasses.asdict(TEXT_CONFIG)
    del fields["mrope_section"]
    theta = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    config = transformers.Qwen3Config(
        **fields, rope_parameters=theta, attn_implementation="sdpa", use_cache=True
    )
    with torch.device(DEVICE):
        model = transformers.Qwen3ForCausalLM(config).to(DTYPE).eval().requires_grad_(False)
    text = {f"model.{name}": value for name, value in _published(ours, "model.").items()}
    model.load_state_dict(text | {"lm_head.weight": ours.lm_head.weight}, strict=True)
    return model


def _paddle_vision():
    vision = VISION_CONFIG
    return paddle.PaddleOCRVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.layer_norm_eps,
        attn_implementation="sdpa",
    )


def _published(model, prefix):
    views = destinations(model, model.config)
    return {n.removeprefix(prefix): view for n, view in views.items() if n.startswith(prefix)}
