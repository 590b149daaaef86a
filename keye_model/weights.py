"""Checkpoint tensors: their published names, and where each one goes in our modules.

The names and shapes are those of the safetensors files of Keye-VL-8B-Preview, as its
modeling_keye.py builds them; Keye-VL-1.5 differs in the shape of `mlp_AR.pre_norm` only.
"""

from __future__ import annotations

from keye_model.config import KeyeConfig


def tensor_shapes(config: KeyeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model uses, by its published name, with the shape it has on disk.

    Unused tensors that a checkpoint may also hold (the packing table, the pooling head) are left
    out, and so is `lm_head.weight` when the embeddings are tied.
    """
    vision, text = config.vision_config, config.text_config
    width, mlp = vision.hidden_size, vision.intermediate_size
    patch = vision.patch_size
    merged = width * vision.spatial_merge_size**2
    hidden, inner = text.hidden_size, text.intermediate_size
    q_width = text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim

    tower = "visual.vision_model."
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{tower}embeddings.patch_embedding.bias": (width,),
        f"{tower}embeddings.position_embedding.weight": (vision.position_grid**2, width),
    }
    for i in range(vision.num_hidden_layers):
        layer = f"{tower}encoder.layers.{i}."
        shapes |= _affine(f"{layer}layer_norm1", width) | _affine(f"{layer}layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", mlp, width) | _linear(f"{layer}mlp.fc2", width, mlp)
    shapes |= _affine(f"{tower}post_layernorm", width)

    shapes |= _affine("mlp_AR.pre_norm", width if config.variant.norm_first else merged)
    shapes |= _linear("mlp_AR.linear_1", merged, merged)
    shapes |= _linear("mlp_AR.linear_2", hidden, merged)

    shapes["model.embed_tokens.weight"] = (text.vocab_size, hidden)
    for i in range(text.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (q_width, hidden),
            f"{layer}self_attn.k_proj.weight": (kv_width, hidden),
            f"{layer}self_attn.v_proj.weight": (kv_width, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, q_width),
            f"{layer}self_attn.q_norm.weight": (text.head_dim,),
            f"{layer}self_attn.k_norm.weight": (text.head_dim,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, hidden)
    return shapes


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}
