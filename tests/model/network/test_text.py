"""The decoder against transformers' Qwen3, and its 3D rope against transformers' Qwen2.5-VL."""

import pytest
import torch

from keye_model.inputs.packing import pack
from keye_model.inputs.request import Request
from tests.model import tiny

SECTION = [16, 24, 24]


def qwen3(model: tiny.TinyKeye):
    """transformers' decoder with the tiny model's weights, or a skip."""
    transformers = pytest.importorskip("transformers")
    text = model.config.text_config
    config = transformers.Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    reference = transformers.Qwen3ForCausalLM(config).eval()
    names = ("model.", "lm_head.")
    weights = {n: t for n, t in tiny.state_dict(model.config).items() if n.startswith(names)}
    reference.load_state_dict(weights, strict=True)
    return reference


@pytest.mark.parametrize(
    ("num_tokens", "theta", "eps"),
    [(1, 1e6, 1e-6), (2, 1e6, 1e-6), (65, 1e6, 1e-6), (65, 8e6, 1e-6), (65, 1e6, 1e-2)],
    ids=["one token", "two tokens", "past a page", "theta=8e6", "eps=1e-2"],
)
def test_text_equals_transformers_qwen3(num_tokens, theta, eps):
    # The large eps shows that every norm uses it: next to these activations 1e-6 is invisible.
    model = tiny.tiny_keye(theta=theta, eps=eps)
    ids = (torch.arange(num_tokens) * 7 + 3) % 89
    with torch.no_grad():
        expected = qwen3(model)(ids[None]).logits[0]
    torch.testing.assert_close(model.logits(Request(ids)).cpu(), expected, atol=5e-5, rtol=0)


class QwenVLRope(torch.nn.Module):
    """Qwen2.5-VL's rotary module, asked for given 3D positions whatever the decoder passes."""

    def __init__(self, positions: torch.Tensor, theta: float) -> None:
        super().__init__()
        qwen = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

        rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": SECTION}
        config = Qwen2_5_VLTextConfig(
            hidden_size=512, num_attention_heads=4, num_key_value_heads=4, rope_parameters=rope
        )
        self.positions = positions
        self.rope = qwen.Qwen2_5_VLRotaryEmbedding(config)

    def forward(self, x, _):
        cos, sin = self.rope(x, self.positions[:, None])
        if cos.dim() == 4:  # older releases select the sections later, per layer
            axis = torch.tensor([0, 1, 2, 0, 1, 2]).repeat_interleave(torch.tensor(SECTION * 2))
            cos, sin = (m[axis, ..., torch.arange(128)].permute(1, 2, 0) for m in (cos, sin))
        return cos, sin


@pytest.mark.parametrize("theta", [1e6, 8e6], ids=lambda t: f"theta={t:g}")
def test_3d_rope_equals_transformers_qwen2_5_vl(theta):
    model = tiny.tiny_keye(theta=theta)
    packed = pack([tiny.g1()], model.config)
    reference = qwen3(model)
    reference.model.rotary_emb = QwenVLRope(packed.positions, theta)
    with torch.no_grad():
        hidden = model.model.embed(packed).cpu()
        expected = reference(inputs_embeds=hidden[None]).logits[0]
    torch.testing.assert_close(model.logits(tiny.g1()).cpu(), expected, atol=5e-5, rtol=0)
