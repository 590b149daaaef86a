"""The model's configuration, read from `config.json` of either line in either layout.

Two layouts are read: the published one (text keys at the top level beside `vision_config`) and the
converted one of the transformers ports (`text_config` and `vision_config`). A key that changes
results has no fallback: a file without `rope_theta` is refused rather than guessed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from keye_model.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Variant:
    """What differs between the two model lines, as policy.

    Sources: modeling_keye.py of Keye-VL-8B-Preview; the transformers and vLLM ports of 1.5.
    """

    name: str
    joint_video_attention: bool  # a whole video is one attention segment; else each frame is one
    norm_first: bool  # projector: LayerNorm per patch, then 2x2 merge; else merge, then LayerNorm
    timed_positions: bool  # a video's temporal position ids follow its seconds per frame
    timestamped_frames: bool  # a video's prompt has each frame behind its mark and its time
    video_version: str  # the keye-vl-utils line whose video rules apply: "1.0" or "1.5"


PREVIEW = Variant("Keye-VL-8B-Preview", True, True, True, False, "1.0")
V1_5 = Variant("Keye-VL-1.5", False, False, False, True, "1.5")

_VARIANTS = {
    "keye": PREVIEW,
    "keyeforconditionalgeneration": PREVIEW,
    "keyevl15": V1_5,
    "keyevl15forconditionalgeneration": V1_5,
}


@dataclass(frozen=True)
class KeyeVisionConfig:
    """The vision tower: SigLIP-so400m widths, native resolution, 2D RoPE.

    Keys with a default are absent from the published files; the defaults are those of the
    published configuration class. `image_mean` and `image_std` come from the preprocessor's file
    and serve uint8 pixels, which are normalised inside the patch embedding.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    spatial_merge_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    tokens_per_second: float | None = None
    rope_theta: float = 10000.0
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_sizes(self, "vision_config")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if len(value) != 3 or not all(is_number(one) for one in value):
                raise ValueError(f"{name} must hold three numbers, got {list(value)}")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {list(self.image_std)}")
        if self.hidden_act != "gelu_pytorch_tanh":
            raise NotImplementedError(
                f"vision_config.hidden_act must be 'gelu_pytorch_tanh', got {self.hidden_act!r}"
            )
        if self.position_grid < 1:
            raise ValueError(
                "vision_config.image_size must be at least patch_size, got "
                f"{self.image_size} and {self.patch_size}"
            )
        if self.num_channels != 3:
            raise NotImplementedError(
                f"vision_config.num_channels must be 3, got {self.num_channels}"
            )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ValueError(
                "vision_config.hidden_size must be num_attention_heads times a multiple of 4, "
                f"got {self.hidden_size} with {self.num_attention_heads} heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def position_grid(self) -> int:
        """Side of the learned position table: 27 for 384 / 14."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class KeyeTextConfig:
    """The decoder: Qwen3 with 3D RoPE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        _check_sizes(self, "text_config")
        if self.hidden_act != "silu":
            raise NotImplementedError(
                f"text_config.hidden_act must be 'silu', got {self.hidden_act!r}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "text_config.num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        sizes = self.mrope_section if isinstance(self.mrope_section, (list, tuple)) else ()
        whole = len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes)
        if not whole or sum(sizes) * 2 != self.head_dim:
            raise ValueError(
                "text_config.mrope_section must be three sizes that sum to head_dim / 2 = "
                f"{self.head_dim // 2}, got {list(sizes) or self.mrope_section!r}"
            )


@dataclass(frozen=True)
class KeyeConfig:
    """A whole checkpoint: text, vision, the ids that tie them, and the line it belongs to."""

    text_config: KeyeTextConfig
    vision_config: KeyeVisionConfig
    variant: Variant
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    fast_video_token_id: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike | Checkpoint, *, local_files_only: bool = False
    ) -> KeyeConfig:
        """Read `config.json`, and what it lacks from the files beside it, if they are there.

        `preprocessor_config.json` has the pixel statistics, and `tokenizer.json` the id of
        ``<|fast_video_pad|>``, which stands for a fast frame's tokens in relatives of 1.5.

        Raises:
            FileNotFoundError: No such checkpoint, or it has no `config.json`.
            ValueError: A key is missing or wrong, or the file describes another model.
        """
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        config = cls.from_dict(checkpoint.json("config.json"))
        pixels = checkpoint.json("preprocessor_config.json", required=False) or {}
        statistics = {}
        for key in ("image_mean", "image_std"):
            value = pixels.get(key)
            if value is not None:
                statistics[key] = tuple(value) if isinstance(value, list) else (value,)
        vision = dataclasses.replace(config.vision_config, **statistics)
        fast = config.fast_video_token_id
        if fast is None and config.variant.timestamped_frames:
            fast = checkpoint.added_tokens.get("<|fast_video_pad|>")
        return dataclasses.replace(config, vision_config=vision, fast_video_token_id=fast)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> KeyeConfig:
        """Build from the contents of a `config.json`; raises as `from_pretrained`."""
        variant = _variant(raw)
        if not isinstance(raw.get("vision_config"), dict):
            raise ValueError("config.json must contain the object 'vision_config'")
        text = raw.get("text_config") or raw
        if not isinstance(text, dict):
            raise ValueError(f"config.json must have an object 'text_config', got {text!r}")
        vision = _fields(KeyeVisionConfig, raw["vision_config"], "vision_config")
        if variant.timed_positions and vision.tokens_per_second is None:
            raise ValueError("config.json must contain 'vision_config.tokens_per_second'")
        for key in ("use_sliding_window", "attention_bias"):
            if text.get(key):
                raise NotImplementedError(f"config.json must have {key} false, got {text[key]!r}")
        tied = {"tie_word_embeddings": raw.get("tie_word_embeddings") or False}
        decoder = _fields(KeyeTextConfig, tied | text | _rope(text), "text_config")
        ids = _fields(_TokenIds, raw, "config.json")
        size = decoder.vocab_size
        for name, token in dataclasses.asdict(ids).items():
            if token is not None and not (type(token) is int and 0 <= token < size):
                raise ValueError(f"config.json must have {name} below {size}, got {token!r}")
        return cls(decoder, vision, variant, **dataclasses.asdict(ids), dtype=_dtype(raw, text))

    def to_dict(self) -> dict[str, Any]:
        """The published layout of `config.json`, readable by `from_dict`."""
        text = dataclasses.asdict(self.text_config)
        text["rope_scaling"] = {"type": "mrope", "mrope_section": list(text.pop("mrope_section"))}
        vision = dataclasses.asdict(self.vision_config)
        vision.pop("image_mean"), vision.pop("image_std")
        ids = {f.name: getattr(self, f.name) for f in dataclasses.fields(_TokenIds)}
        preview = self.variant == PREVIEW
        return {
            "architectures": [("Keye" if preview else "KeyeVL1_5") + "ForConditionalGeneration"],
            "model_type": "Keye" if preview else "KeyeVL1_5",
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            **text,
            **{key: value for key, value in ids.items() if value is not None},
            "vision_config": vision,
        }


@dataclass(frozen=True)
class _TokenIds:
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int | None = None  # what no computation needs, a file may leave out
    vision_end_token_id: int | None = None
    fast_video_token_id: int | None = None


def _variant(raw: dict[str, Any]) -> Variant:
    classes = raw.get("architectures") or []
    names = [raw.get("model_type"), *(classes if isinstance(classes, list) else [classes])]
    found = {_VARIANTS.get(str(name).lower().replace("_", "")) for name in names if name}
    if len(found) != 1 or None in found:
        raise ValueError(
            "config.json must describe Keye-VL-8B-Preview (model_type 'Keye') or Keye-VL-1.5 "
            f"(model_type 'KeyeVL1_5'), got model_type {raw.get('model_type')!r} and architectures "
            f"{raw.get('architectures')!r}"
        )
    return found.pop()


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `mrope_section`, from either spelling of the rope keys."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("mrope", "default"):
        raise NotImplementedError(f"rope_scaling.type must be 'mrope' or 'default', got {kind!r}")
    section = rope.get("mrope_section")
    theta = text.get("rope_theta", rope.get("rope_theta"))
    return {
        "rope_theta": float(theta) if is_number(theta) else theta,
        "mrope_section": tuple(section) if isinstance(section, list) else section,
    }


def _dtype(raw: dict[str, Any], text: dict[str, Any]) -> torch.dtype:
    levels = ((level, key) for level in (raw, text) for key in ("dtype", "torch_dtype"))
    name = next((level[key] for level, key in levels if level.get(key)), "bfloat16")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"torch_dtype must be float32, float16 or bfloat16, got {name!r}")
    return dtype


def _fields(cls: type, raw: dict[str, Any], where: str) -> Any:
    """Build a dataclass from the keys it names; a missing key without a default is an error."""
    fields = dataclasses.fields(cls)
    values = {f.name: raw[f.name] for f in fields if raw.get(f.name) is not None}
    missing = [f.name for f in fields if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{where} must contain {', '.join(map(repr, missing))}")
    return cls(**values)


def _check_sizes(config: Any, where: str) -> None:
    """Every plain integer field is a positive size, every number positive, every switch a bool."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (type(value) is not int or value < 1):
            raise ValueError(f"{where}.{field.name} must be a positive integer, got {value!r}")
        number = field.type == "float" or (field.type == "float | None" and value is not None)
        if number and not (is_number(value) and value > 0):
            raise ValueError(f"{where}.{field.name} must be a positive number, got {value!r}")
        if field.type == "bool" and type(value) is not bool:
            raise ValueError(f"{where}.{field.name} must be true or false, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a value from a JSON file is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
