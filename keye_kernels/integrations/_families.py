"""The classes that `apply` replaces, in one table per model family.

A row names a class of the family's modeling module and how releases differ. Classes that stay as
they are have rows too, with the reason, for `report`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from keye_kernels.integrations import _decoder_attention, _layers, _rotary, _vision
from keye_kernels.integrations._guard import LINEAR, Part, child_at
from keye_kernels.integrations._layers import GELU, LAYER_NORM, SILU, Maker


@dataclass(frozen=True)
class Replacement:
    """One class whose forward is replaced.

    Attributes:
        classes: Its name, then its names in other releases.
        ops: Our ops that the new forward calls. `apply` needs all of them among its ops.
        make: (modeling module, current forward) -> new forward.
        refuse: (module) -> why its configuration is not served, or None.
        missing: (class) -> why this release cannot have the replacement, or None.
        parts: Children whose weights the new forward reads instead of calling them.
        note: What a user should know, for `report`.
    """

    classes: tuple[str, ...]
    ops: tuple[str, ...]
    make: Maker
    refuse: Callable[[nn.Module], str | None] = lambda _: None
    missing: Callable[[type], str | None] = lambda _: None
    parts: tuple[Part, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Attributes:
        modeling: Its module below `transformers.models`.
        since: First major version of transformers that has it.
        replacements: In no order; each is independent of the others.
        functions: Module functions that then take positions as well as cosines: name to the op
            that needs it.
        decoder: Decoder attention class, which calls transformers' AttentionInterface, and the
            model class that owns the layers and makes their mask. None: no decoder.
        left: Classes that stay as they are: name to reason.
    """

    modeling: str
    since: int
    replacements: tuple[Replacement, ...]
    functions: dict[str, str]
    decoder: tuple[str, str] | None
    left: dict[str, str]

    @property
    def in_models(self) -> tuple[Replacement, ...]:
        """The replacements in single models, with the class that makes a decoder's mask."""
        if self.decoder is None:
            return self.replacements
        make = _decoder_attention.model_forward
        return (*self.replacements, Replacement(self.decoder[1:], ("varlen_attention",), make))


def _refuse_swiglu(module: nn.Module) -> str | None:
    if type(module.act_fn) not in SILU:
        return f"act_fn must be SiLU, got {type(module.act_fn).__name__}"
    return None


def _refuse_gelu(activation: str) -> Callable[[nn.Module], str | None]:
    """``activation``: path from the module to its activation."""

    def refuse(module: nn.Module) -> str | None:
        found = child_at(module, activation)
        if found is not None and _layers.approximation(found) is None:
            return f"{activation} must be GELU, exact or by tanh, got {type(found).__name__}"
        return None

    return refuse


def refuse_attention(module: nn.Module) -> str | None:
    if module.head_dim % 8 or module.head_dim > 256:
        return f"head_dim must be a multiple of 8 up to 256, got {module.head_dim}"
    return None


def _refuse_vision_rotary(module: nn.Module) -> str | None:
    theta = _rotary.rope_theta(module.config)
    return None if theta == 10000 else f"rope_theta must be 10000, got {theta}"


def _refuse_decoder_rotary(module: nn.Module) -> str | None:
    # transformers 4 calls the rope type of Qwen2.5-VL "default" or "mrope", for the same thing.
    if module.rope_type not in ("default", "mrope"):
        return f"rope_type must be 'default', got {module.rope_type!r}"
    section, half = _rotary.mrope_section(module), module.inv_freq.shape[0]
    if sum(section) != half:
        return f"mrope_section must add up to head_dim / 2 = {half}, got {list(section)}"
    return None


def _cosines_only(cls: type) -> str | None:
    if "position_ids" in inspect.signature(cls.forward).parameters:
        return None
    return "the towers of this release hand down cosines, our op takes positions"


def _aligned_corners(cls: type) -> str | None:
    # Releases up to 5.20 sample the position table with aligned corners; Keye never did.
    if "interpolation_align_corners = True" in inspect.getsource(cls.__init__):
        return "this release samples the position table with aligned corners, our op does not"
    return None


def _rms_norm(*classes: str) -> Replacement:
    return Replacement(classes, ("rms_norm",), _layers.rms_norm_forward)


def _swiglu(*classes: str) -> Replacement:
    parts = (("gate_proj", LINEAR), ("up_proj", LINEAR), ("act_fn", SILU))
    return Replacement(classes, ("silu_mul",), _layers.swiglu_forward, _refuse_swiglu, parts=parts)


def _gelu(name: str, *parts: str) -> Replacement:
    make = _layers.gelu_mlp(*parts)
    known = ((parts[0], LINEAR), (parts[1], GELU))
    return Replacement((name,), ("gelu",), make, _refuse_gelu(parts[1]), parts=known)


def _layer(
    name: str, op: str, *parts: str, norms: tuple[str, ...] = (), **more: bool
) -> Replacement:
    make = _layers.layer(*parts, norms=norms, **more)
    known = ((parts[0], norms or LAYER_NORM), (parts[2], norms or LAYER_NORM))
    note = "the first sum goes into the second norm"
    return Replacement((name,), (op,), make, parts=known, note=note)


def _decoder_layer(name: str, *norms: str, returns_tuple: bool = False) -> Replacement:
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm")
    return _layer(name, "rms_norm", *parts, norms=norms, returns_tuple=returns_tuple)


def _decoder_rotary(name: str, *, interleaved: bool = False) -> Replacement:
    make = _rotary.decoder_rotary(interleaved=interleaved)
    return Replacement((name,), ("mrope_",), make, _refuse_decoder_rotary)


def _vision_rotary(*classes: str) -> Replacement:
    make = _rotary.vision_rotary_forward
    return Replacement(classes, ("rope_2d_",), make, _refuse_vision_rotary, _cosines_only)


def _attention(name: str, make: Maker) -> Replacement:
    return Replacement((name,), ("varlen_attention",), make, refuse_attention)


def _lengths(name: str, make: Maker) -> Replacement:
    return Replacement((name,), ("varlen_attention",), make, note="lengths once, not per layer")


_ONCE = "once per call, in torch.nn.LayerNorm"
_QWEN2_5_NORMS = ("Qwen2_5_VLRMSNorm", "Qwen2RMSNorm")  # the second in transformers 4
_PAIRS = "a patch is a pair of frames there, our op takes one"


def families(major: int) -> dict[str, Family]:
    """The tables for a major version of transformers."""
    return {
        "paddleocr_vl": Family(
            "paddleocr_vl.modeling_paddleocr_vl",
            5,
            (
                Replacement(
                    ("PaddleOCRVisionEmbeddings",),
                    ("patch_embed",),
                    _vision.paddle_embeddings_forward,
                    missing=_aligned_corners,
                    parts=(
                        ("patch_embedding", _vision.CONV),
                        ("position_embedding", _vision.EMBEDDING),
                    ),
                ),
                _vision_rotary("PaddleOCRVisionRotaryEmbedding"),
                _attention(
                    "PaddleOCRVisionAttention",
                    _vision.paddle_attention,
                ),
                _lengths("PaddleOCRVisionEncoder", _vision.paddle_encoder),
                _layer(
                    "PaddleOCRVisionEncoderLayer",
                    "layer_norm",
                    "layer_norm1",
                    "self_attn",
                    "layer_norm2",
                    by_name=False,
                ),
                _gelu("PaddleOCRVisionMLP", "fc1", "activation_fn", "fc2"),
                Replacement(
                    ("PaddleOCRProjector",),
                    ("merge_patches", "gelu"),
                    _vision.paddle_projector_forward,
                    _refuse_gelu("act"),
                    parts=(("pre_norm", LAYER_NORM), ("linear_1", LINEAR), ("act", GELU)),
                ),
                _rms_norm("PaddleOCRRMSNorm"),
                _decoder_layer("PaddleOCRDecoderLayer", "PaddleOCRRMSNorm"),
                _decoder_rotary("PaddleOCRRotaryEmbedding"),
                _swiglu("PaddleOCRMLP"),
            ),
            {"apply_rotary_pos_emb": "mrope_", "apply_rotary_pos_emb_vision": "rope_2d_"},
            ("PaddleOCRAttention", "PaddleOCRTextModel"),
            {"PaddleOCRVisionTransformer": f"post_layernorm: {_ONCE}"},
        ),
        "qwen2_5_vl": Family(
            "qwen2_5_vl.modeling_qwen2_5_vl",
            4,
            (
                _vision_rotary("Qwen2_5_VLVisionRotaryEmbedding", "Qwen2_5_VisionRotaryEmbedding"),
                _attention(
                    "Qwen2_5_VLVisionAttention",
                    _vision.qwen_attention,
                ),
                _lengths(
                    "Qwen2_5_VisionTransformerPretrainedModel",
                    # 4.57 passes the same keywords to all layers, windowed or not.
                    _vision.qwen_tower(windows=major >= 5),
                ),
                _layer(
                    "Qwen2_5_VLVisionBlock",
                    "rms_norm",
                    "norm1",
                    "attn",
                    "norm2",
                    norms=_QWEN2_5_NORMS,
                    by_name=False,
                ),
                _swiglu("Qwen2_5_VLMLP"),
                Replacement(
                    ("Qwen2_5_VLPatchMerger",),
                    ("gelu",),
                    _vision.qwen2_5_merger_forward,
                    _refuse_gelu("mlp.1"),
                    parts=(("mlp", _vision.SEQUENTIAL), ("mlp.0", LINEAR), ("mlp.1", GELU)),
                ),
                _rms_norm(*_QWEN2_5_NORMS),
                _decoder_layer("Qwen2_5_VLDecoderLayer", *_QWEN2_5_NORMS, returns_tuple=major == 4),
                _decoder_rotary("Qwen2_5_VLRotaryEmbedding"),
                _swiglu("Qwen2MLP"),
            ),
            {
                "apply_rotary_pos_emb": "mrope_",
                "apply_multimodal_rotary_pos_emb": "mrope_",
                "apply_rotary_pos_emb_vision": "rope_2d_",
            },
            ("Qwen2_5_VLAttention", "Qwen2_5_VLTextModel"),
            {"Qwen2_5_VisionPatchEmbed": _PAIRS},
        ),
        "qwen3_vl": Family(
            "qwen3_vl.modeling_qwen3_vl",
            4,
            (
                _vision_rotary("Qwen3VLVisionRotaryEmbedding"),
                _attention("Qwen3VLVisionAttention", _vision.qwen_attention),
                _lengths("Qwen3VLVisionModel", _vision.qwen_tower(windows=False)),
                _layer("Qwen3VLVisionBlock", "layer_norm", "norm1", "attn", "norm2", by_name=False),
                _gelu("Qwen3VLVisionMLP", "linear_fc1", "act_fn", "linear_fc2"),
                Replacement(
                    ("Qwen3VLVisionPatchMerger",),
                    ("layer_norm", "gelu"),
                    _vision.qwen3_merger_forward,
                    _refuse_gelu("act_fn"),
                    parts=(("norm", LAYER_NORM), ("linear_fc1", LINEAR), ("act_fn", GELU)),
                ),
                _rms_norm("Qwen3VLTextRMSNorm"),
                _decoder_layer("Qwen3VLTextDecoderLayer", "Qwen3VLTextRMSNorm"),
                _decoder_rotary("Qwen3VLTextRotaryEmbedding", interleaved=True),
                _swiglu("Qwen3VLTextMLP"),
            ),
            {"apply_rotary_pos_emb": "mrope_", "apply_rotary_pos_emb_vision": "rope_2d_"},
            ("Qwen3VLTextAttention", "Qwen3VLTextModel"),
            {
                "Qwen3VLVisionPatchEmbed": _PAIRS,
                "Qwen3VLVisionModel": "position table: sampled with aligned corners, in another "
                "order than our op's",
            },
        ),
        "siglip2": Family(
            "siglip2.modeling_siglip2",
            4,
            (
                _attention("Siglip2Attention", _vision.siglip2_attention),
                _lengths("Siglip2Encoder", _vision.siglip2_encoder),
                _layer(
                    "Siglip2EncoderLayer", "layer_norm", "layer_norm1", "self_attn", "layer_norm2"
                ),
                _gelu("Siglip2MLP", "fc1", "activation_fn", "fc2"),
            ),
            {},
            None,
            {
                "Siglip2VisionEmbeddings": "position table: sampled with antialiasing, our op has "
                "none",
                "Siglip2MultiheadAttentionPoolingHead": "one query per image, in "
                "torch.nn.MultiheadAttention",
                "Siglip2VisionModel": f"post_layernorm: {_ONCE}",
            },
        ),
        "qwen3": Family(
            "qwen3.modeling_qwen3",
            4,
            (
                _rms_norm("Qwen3RMSNorm"),
                _decoder_layer("Qwen3DecoderLayer", "Qwen3RMSNorm"),
                _decoder_rotary("Qwen3RotaryEmbedding"),
                _swiglu("Qwen3MLP"),
            ),
            {"apply_rotary_pos_emb": "mrope_"},
            ("Qwen3Attention", "Qwen3Model"),
            {},
        ),
    }


_decoder_attention.MODELINGS.update(
    f"transformers.models.{family.modeling}" for family in families(5).values()
)
