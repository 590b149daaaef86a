"""Reading `config.json`: both lines, both layouts, and refusals instead of guesses."""

import copy
import json
import math

import pytest
import torch

from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig
from tests.model import tiny

# The file of Keye-VL-8B-Preview, unread keys shortened.
PUBLISHED = {
    "auto_map": {"AutoConfig": "configuration_keye.KeyeConfig"},
    "architectures": ["KeyeForConditionalGeneration"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "Keye",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "architectures": ["SiglipVisionModel"],
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
TEXT_KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "hidden_act",
    "attention_bias",
]


def published(**changes: object) -> dict:
    """The published file with top-level keys changed; None removes one."""
    raw = copy.deepcopy(PUBLISHED) | changes
    return {key: value for key, value in raw.items() if value is not None}


def vision(**changes: object) -> dict:
    raw = copy.deepcopy(PUBLISHED["vision_config"]) | changes
    return {"vision_config": {key: value for key, value in raw.items() if value is not None}}


def converted(rope: dict | None = None) -> dict:
    """1.5 in the layout of the transformers port."""
    raw = published(model_type="keye_vl_1_5", architectures=None)
    text = {key: raw.pop(key) for key in TEXT_KEYS}
    if rope is not None:
        del text["rope_theta"], text["rope_scaling"]
        text["rope_parameters"] = rope
    raw["vision_config"].pop("tokens_per_second")
    del raw["vision_start_token_id"], raw["vision_end_token_id"]
    return raw | {"text_config": text | {"model_type": "keye_vl_1_5_text"}}


def test_published_file():
    config = KeyeConfig.from_dict(published())
    assert config.variant is PREVIEW
    text, tower = config.text_config, config.vision_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 12288, 36)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 8, 128)
    assert (text.rope_theta, text.mrope_section) == (1e6, (16, 24, 24))
    assert (text.vocab_size, text.max_position_embeddings) == (151936, 40960)
    assert (text.rms_norm_eps, text.tie_word_embeddings) == (1e-6, False)
    assert (tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers) == (1152, 4304, 27)
    assert (tower.head_dim, tower.patch_size, tower.position_grid) == (72, 14, 27)
    assert (tower.layer_norm_eps, tower.tokens_per_second) == (1e-6, 2)
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert config.fast_video_token_id is None
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "names",
    [
        {"model_type": "KeyeVL1_5", "architectures": ["KeyeVL1_5ForConditionalGeneration"]},
        {"model_type": "keye_vl_1_5", "architectures": None},
        {"model_type": None, "architectures": ["KeyeVL1_5ForConditionalGeneration"]},
    ],
    ids=["both", "model_type", "architectures"],
)
def test_names_of_1_5(names):
    config = KeyeConfig.from_dict(
        published(**names, **vision(tokens_per_second=None), fast_video_token_id=151678)
    )
    assert config.variant is V1_5
    assert config.fast_video_token_id == 151678


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "default", "rope_theta": 8e6, "mrope_section": [16, 24, 24]},
        {"rope_type": "default", "type": "mrope", "rope_theta": 8e6, "mrope_section": [16, 24, 24]},
    ],
    ids=["rope_scaling", "rope_parameters", "rope_parameters, both types"],
)
def test_converted_layout(rope):
    config = KeyeConfig.from_dict(converted(rope))
    assert config.variant is V1_5
    assert config.text_config.rope_theta == (1e6 if rope is None else 8e6)
    assert config.text_config.mrope_section == (16, 24, 24)
    assert config.text_config.hidden_size == 4096
    assert config.vision_start_token_id is config.vision_end_token_id is None


@pytest.mark.parametrize("raw", [published(), converted()], ids=["published", "converted"])
def test_round_trip(raw):
    config = KeyeConfig.from_dict(raw)
    assert KeyeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_tied_embeddings_in_either_place():
    assert KeyeConfig.from_dict(published(tie_word_embeddings=True)).text_config.tie_word_embeddings
    raw = converted()
    raw["text_config"]["tie_word_embeddings"] = True
    assert KeyeConfig.from_dict(raw).text_config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": None, "dtype": "float32"}, torch.float32),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"torch_dtype": None}, torch.bfloat16),
    ],
    ids=["torch_dtype", "dtype", "prefix", "absent"],
)
def test_dtype_names(changes, dtype):
    assert KeyeConfig.from_dict(published(**changes)).dtype == dtype


REQUIRED = [key for key in TEXT_KEYS if key not in ("hidden_act", "attention_bias", "rope_scaling")]
REQUIRED += ["image_token_id", "video_token_id"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_refused(key):
    with pytest.raises(ValueError, match=f"must contain '{key}'"):
        KeyeConfig.from_dict(published(**{key: None}))


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "spatial_merge_size",
    ],
)
def test_a_missing_vision_key_is_refused(key):
    with pytest.raises(ValueError, match=f"vision_config must contain '{key}'"):
        KeyeConfig.from_dict(published(**vision(**{key: None})))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
         ValueError, "must describe Keye-VL-8B-Preview .* got model_type 'qwen2_5_vl'"),
        ({"model_type": None, "architectures": None}, ValueError, "must describe .* got"),
        ({"architectures": ["KeyeVL1_5ForConditionalGeneration"]}, ValueError, "must describe"),
        ({"vision_config": None}, ValueError, "must contain the object 'vision_config'"),
        ({"rope_scaling": None}, ValueError, "text_config must contain 'mrope_section'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, NotImplementedError,
         "rope_scaling.type must be 'mrope' or 'default', got 'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, ValueError,
         r"mrope_section must be three sizes that sum to head_dim / 2 = 64, got \[16, 24, 25\]"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [32, 32]}}, ValueError,
         r"mrope_section must be three sizes .* got \[32, 32\]"),
        ({"use_sliding_window": True}, NotImplementedError, "use_sliding_window false, got True"),
        ({"attention_bias": True}, NotImplementedError, "must have attention_bias false, got True"),
        ({"hidden_act": "gelu"}, NotImplementedError, "text_config.hidden_act must be 'silu'"),
        ({"torch_dtype": "int8"}, ValueError, "torch_dtype must be float32, .* got 'int8'"),
        ({"torch_dtype": "bf16"}, ValueError, "torch_dtype must be float32, .* got 'bf16'"),
        ({"hidden_size": -1}, ValueError, "hidden_size must be a positive integer, got -1"),
        ({"hidden_size": "4096"}, ValueError, "hidden_size must be a positive integer, got '4096'"),
        ({"rms_norm_eps": 0}, ValueError, "rms_norm_eps must be a positive number, got 0"),
        ({"num_key_value_heads": 5}, ValueError,
         "num_attention_heads must be a multiple of num_key_value_heads, got 32 and 5"),
        (vision(tokens_per_second=None), ValueError, "contain 'vision_config.tokens_per_second'"),
        (vision(hidden_act="gelu"), NotImplementedError, "must be 'gelu_pytorch_tanh', got 'gelu'"),
        (vision(num_channels=1), NotImplementedError, "num_channels must be 3, got 1"),
        (vision(hidden_size=1150), ValueError, "hidden_size must be num_attention_heads times a"),
        (vision(patch_size=14.0), ValueError, "patch_size must be a positive integer, got 14.0"),
        (vision(image_size=7), ValueError, "image_size must be at least patch_size, got 7 and 14"),
        (vision(tokens_per_second="2"), ValueError, "tokens_per_second must be a positive number"),
        ({"text_config": [1]}, ValueError, r"must have an object 'text_config', got \[1\]"),
        ({"architectures": 5}, ValueError, "must describe .* and architectures 5"),
        ({"rope_scaling": "mrope"}, ValueError, "rope_scaling must be an object, got 'mrope'"),
        ({"rope_scaling": {"mrope_section": 64}}, ValueError, "mrope_section must be .* got 64"),
        ({"rope_scaling": {"mrope_section": ["a", 2, 3]}}, ValueError, r"got \['a', 2, 3\]"),
        ({"rope_scaling": {"mrope_section": [-16, 40, 40]}}, ValueError, r"got \[-16, 40, 40\]"),
        ({"rope_theta": "1e6"}, ValueError, "rope_theta must be a positive number, got '1e6'"),
        ({"rope_theta": math.inf}, ValueError, "rope_theta must be a positive number, got inf"),
        ({"rms_norm_eps": True}, ValueError, "rms_norm_eps must be a positive number, got True"),
        ({"tie_word_embeddings": "false"}, ValueError, "must be true or false, got 'false'"),
        ({"image_token_id": "x"}, ValueError, "image_token_id below 151936, got 'x'"),
        ({"video_token_id": 151936}, ValueError, "video_token_id below 151936, got 151936"),
        ({"vision_start_token_id": -1}, ValueError, "vision_start_token_id below 151936, got -1"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:48],
)  # fmt: skip
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        KeyeConfig.from_dict(published(**changes))


def test_from_pretrained_reads_the_pixel_statistics(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.raw_config(PREVIEW)))
    assert KeyeConfig.from_pretrained(tmp_path).vision_config.image_std == (0.5, 0.5, 0.5)
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    config = KeyeConfig.from_pretrained(tmp_path)
    assert config.vision_config.image_mean == (0.1, 0.2, 0.3)
    assert config.vision_config.image_std == (0.4, 0.5, 0.6)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": null, "image_std": null}')
    assert KeyeConfig.from_pretrained(tmp_path).vision_config.image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"image_mean": [0.1] * 4}, r"image_mean must hold three numbers, got \[0.1, 0.1"),
        ({"image_mean": 0.5}, r"image_mean must hold three numbers, got \[0.5\]"),
        ({"image_std": [0.5, None, 0.5]}, r"image_std must hold three numbers, got \[0.5, None"),
        ({"image_std": [0.5, "1", 0.5]}, r"image_std must hold three numbers, got \[0.5, '1'"),
        ({"image_mean": [0, 0, float("nan")]}, r"image_mean must hold three numbers, got .* nan"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std must be positive, got \[0.5, 0, 0.5\]"),
    ],
    ids=["four", "one", "null", "string", "nan", "zero"],
)
def test_bad_pixel_statistics(tmp_path, statistics, message):
    (tmp_path / "config.json").write_text(json.dumps(tiny.raw_config(PREVIEW)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match=message):
        KeyeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("variant", "named", "expected"),
    [(V1_5, {}, 94), (V1_5, {"fast_video_token_id": 95}, 95), (PREVIEW, {}, None)],
    ids=["1.5", "config.json goes first", "8B-Preview"],
)
def test_the_fast_placeholder_is_looked_up(tmp_path, variant, named, expected):
    (tmp_path / "config.json").write_text(json.dumps(tiny.raw_config(variant, **named)))
    added = {"added_tokens": [{"id": 94, "content": "<|fast_video_pad|>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    assert KeyeConfig.from_pretrained(tmp_path).fast_video_token_id == expected


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "checkpoint must contain config.json"),
        ("{", ValueError, "config.json must be valid JSON"),
        ("[]", ValueError, "config.json must hold a JSON object, got a list"),
    ],
    ids=["missing", "broken", "no object"],
)
def test_bad_files(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        KeyeConfig.from_pretrained(tmp_path)
