"""Tiny random models of every family served, and a call of each with all its parts in it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
MAJOR = int(transformers.__version__.split(".")[0])
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        build: Makes the model, fp32, in eval mode, with the default attention.
        inputs: Of one call: two images of different size and two padded rows, where there are such.
        outputs: What is compared of what the model returns, padding left out.
        calls: How often such a call on a patched model calls each op.
        tower: Runs the vision tower on packed images: (model, pixels, grid) to tokens, or None.
        pixels: Shape of one patch for the tower.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    outputs: Callable[[Any, dict[str, Any]], list[torch.Tensor]]
    calls: dict[str, int]
    tower: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    pixels: tuple[int, ...] = ()

    def call(self, model: nn.Module) -> list[torch.Tensor]:
        """One call of a model, without a cache."""
        inputs = self.inputs()
        more = {"use_cache": False} if hasattr(model, "generate") else {}
        with torch.no_grad():
            return self.outputs(model(**inputs, **more), inputs)


def _finish(model: nn.Module) -> nn.Module:
    """Weights that leave no part without effect on the output."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        noise = noise.to(parameter.device)
        if parameter.dim() == 1:
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = center + 0.1 * noise
        else:
            parameter.data = noise * parameter[0].numel() ** -0.5
    return model.eval().to(DEVICE)


def _rope(theta: float, section: list[int] | None = None) -> dict[str, Any]:
    more = {} if section is None else {"mrope_section": section}
    if MAJOR >= 5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}
    scaling = {"rope_type": "default", **more} if more else None
    return {"rope_theta": theta, "rope_scaling": scaling}


_TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def pixels(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


def _prompts(images: list[int]) -> dict[str, torch.Tensor]:
    """Two padded rows: text around all images, and text alone. ``images``: tokens of each."""
    row = [5, 6]
    for count in images:
        row += [VISION_START, *[IMAGE] * count, VISION_END, 7]
    rows = [row, [8, 9, 10]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if MAJOR >= 5:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def _logits(output: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [output.logits[inputs["attention_mask"].bool()]]


def generate(model: nn.Module, name: str, **options: Any) -> list[torch.Tensor]:
    """Logits and ids of three greedy steps: the prompt's, then one token each over the cache."""
    answer = model.generate(
        **CASES[name].inputs(),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return [*answer.logits, answer.sequences]


GRID = [[1, 4, 6], [1, 8, 4]]  # two images of different size; of 24 and 32 patches


def _qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, **_rope(1e6, [2, 3, 3])},
        vision_config={
            "depth": 2,
            "hidden_size": 160,  # head_dim 80
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,  # two by two tokens: several windows per image
            "fullatt_block_indexes": [1],
        },
        **_TOKENS,
    )
    return _finish(Qwen2_5_VLForConditionalGeneration(config))


def _qwen3_vl() -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 16, **_rope(5e6, [2, 3, 3])},
        vision_config={
            "depth": 2,
            "hidden_size": 144,  # head_dim 72
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        **_TOKENS,
    )
    return _finish(Qwen3VLForConditionalGeneration(config))


def _qwen_vl_inputs() -> dict[str, Any]:
    return {
        **_prompts([6, 8]),
        "pixel_values": pixels(56, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor(GRID),
    }


def _qwen_tower(model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    output = model.model.visual(pixels, grid_thw=grid)
    if MAJOR >= 5:
        return output.pooler_output
    return output[0] if isinstance(output, tuple) else output


def _paddleocr_vl() -> nn.Module:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    config = PaddleOCRVLConfig(
        text_config={**_TEXT, "head_dim": 16, **_rope(5e5, [2, 3, 3])},
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 144,  # head_dim 72
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
        },
        **_TOKENS,
    )
    return _finish(PaddleOCRVLForConditionalGeneration(config))


def _paddleocr_vl_inputs() -> dict[str, Any]:
    return {
        **_prompts([6, 8]),
        "pixel_values": pixels(56, 3, 4, 4),
        "image_grid_thw": torch.tensor(GRID),
    }


def _paddleocr_tower(model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    tokens = model.model.visual(pixels[None], grid_thw=grid).last_hidden_state
    return model.model.projector(tokens, grid)


def _siglip2() -> nn.Module:
    from transformers import Siglip2Config, Siglip2Model

    sizes = {
        "hidden_size": 144,  # head_dim 72
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = Siglip2Config(
        text_config={**sizes, "vocab_size": 96, "max_position_embeddings": 16},
        vision_config={**sizes, "patch_size": 4, "num_patches": 36},
    )
    return _finish(Siglip2Model(config))


def _siglip2_inputs() -> dict[str, Any]:
    shapes = torch.tensor([[4, 6], [3, 3]])
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).int(),
        "pixel_values": pixels(2, 24, 48),
        "pixel_attention_mask": (torch.arange(24)[None] < shapes.prod(dim=1)[:, None]).int(),
        "spatial_shapes": shapes,
    }


def _siglip2_outputs(output: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    tower, text = output.vision_model_output, output.text_model_output
    tokens = tower.last_hidden_state[inputs["pixel_attention_mask"].bool()]
    # The text's padding too: its answer is read at the end of a row, padding or not.
    return [output.logits_per_image, tower.pooler_output, tokens, text.last_hidden_state]


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _finish(Qwen3ForCausalLM(Qwen3Config(**_TEXT, head_dim=16, **_rope(1e6))))


def _qwen3_inputs() -> dict[str, Any]:
    inputs = _prompts([])
    inputs.pop("mm_token_type_ids", None)
    return inputs


# The towers of transformers 4 keep their rotation, and PaddleOCR-VL is not in it.
_TOWER_ROPE = {"rope_2d_": 2} if MAJOR >= 5 else {}
CASES = {
    "paddleocr_vl": Case(
        _paddleocr_vl,
        _paddleocr_vl_inputs,
        _logits,
        {
            **_TOWER_ROPE,
            "patch_embed": 1,
            "merge_patches": 1,
            "layer_norm": 4,
            "gelu": 3,
            "mrope_": 2,
            "silu_mul": 2,
            "rms_norm": 5,
            "varlen_attention": 4,
        },
        _paddleocr_tower,
        (3, 4, 4),
    ),
    "qwen2_5_vl": Case(
        _qwen2_5_vl,
        _qwen_vl_inputs,
        _logits,
        {
            **_TOWER_ROPE,
            "gelu": 1,
            "mrope_": 2,
            "silu_mul": 4,
            "rms_norm": 10,
            "varlen_attention": 4,
        },
        _qwen_tower,
        (96,),
    ),
    "qwen3_vl": Case(
        _qwen3_vl,
        _qwen_vl_inputs,
        _logits,
        {
            **_TOWER_ROPE,
            "layer_norm": 6,
            "gelu": 4,
            "mrope_": 2,
            "silu_mul": 2,
            "rms_norm": 9,
            "varlen_attention": 4,
        },
        _qwen_tower,
        (96,),
    ),
    "siglip2": Case(
        _siglip2,
        _siglip2_inputs,
        _siglip2_outputs,
        {"layer_norm": 8, "gelu": 5, "varlen_attention": 4},
    ),
    "qwen3": Case(
        _qwen3,
        _qwen3_inputs,
        _logits,
        {"mrope_": 2, "silu_mul": 2, "rms_norm": 9, "varlen_attention": 2},
    ),
}
if MAJOR < 5:
    del CASES["paddleocr_vl"]
elif _paddleocr_vl().model.visual.vision_model.embeddings.interpolation_align_corners:
    del CASES["paddleocr_vl"].calls["patch_embed"]  # as releases before 5.23 had it


@functools.cache
def expected(name: str) -> list[torch.Tensor]:
    """What a call of the unpatched model gives."""
    return CASES[name].call(CASES[name].build())
