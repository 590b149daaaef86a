"""What `apply` and its like refuse, and what they say; and what a report says."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from keye_kernels.integrations import transformers as integration
from keye_kernels.integrations.transformers import apply, report, revert
from tests.integrations.tiny import CASES, MAJOR

pytestmark = pytest.mark.usefixtures("on_device")


def test_unknown_family():
    with pytest.raises(ValueError, match=r"must be a model or one of .*qwen3_vl.*, got 'llama'"):
        apply("llama")
    with pytest.raises(ValueError, match=r"must be a model or one of .*got 'llama'"):
        revert("llama")
    with pytest.raises(ValueError, match=r"must be a model or one of .*got 'llama'"):
        report("llama")


@pytest.mark.skipif(MAJOR >= 5, reason="transformers 5 has PaddleOCR-VL")
def test_family_of_a_later_release():
    with pytest.raises(ValueError, match=r"one of qwen2_5_vl, .* with transformers 4.57"):
        apply("paddleocr_vl")


def test_model_of_no_family():
    with pytest.raises(ValueError, match=r"must have parts of one of the families .*, got Linear"):
        apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must have parts of one of the families .*, got Linear"):
        report(nn.Linear(2, 2))


def test_neither_model_nor_name():
    with pytest.raises(TypeError, match=r"must be a model or a name, got int"):
        apply(3)


@pytest.mark.parametrize("ops", [{"sample"}, ["mrope_", "rope"], "mrope_", []], ids=str)
def test_unknown_op(ops):
    with pytest.raises(ValueError, match=r"ops must hold names from mrope_, .*silu_mul.*, got"):
        apply("qwen3", ops=ops)
    assert not any(row.replaced for row in report("qwen3").rows)


@pytest.mark.parametrize("version", [(4, 56), (5, 16), (6, 0)], ids=str)
def test_release(version, monkeypatch):
    monkeypatch.setattr(integration, "_MAJOR", version[0])
    monkeypatch.setattr(integration, "_MINOR", version[1])
    with pytest.raises(RuntimeError, match=r"must be 4.57, or 5 from 5.17 on, got"):
        apply("qwen3")


def test_release_without_a_class(monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.delattr(modeling_qwen3, "Qwen3MLP")
    with pytest.raises(RuntimeError, match=r"must have a class Qwen3MLP in .*qwen3, got none in"):
        apply("qwen3")
    assert not hasattr(modeling_qwen3.Qwen3RMSNorm.forward, integration._MARK)


def test_twice_and_never():
    model = CASES["qwen3"].build()
    with pytest.raises(RuntimeError, match="the model itself is not changed; call apply first"):
        revert(model)
    apply(model)
    with pytest.raises(RuntimeError, match="changed already; call revert first"):
        apply(model)
    revert(model)
    with pytest.raises(RuntimeError, match="the model itself is not changed; call apply first"):
        revert(model)


def test_family_twice_and_never():
    with pytest.raises(RuntimeError, match="'qwen3' is not changed; call apply first"):
        revert("qwen3")
    model = CASES["qwen3"].build()
    apply("qwen3")
    try:
        with pytest.raises(RuntimeError, match="'qwen3' is changed already; call revert first"):
            apply("qwen3")
        with pytest.raises(RuntimeError, match="the family 'qwen3' of the model is changed"):
            apply(model)
        with pytest.raises(RuntimeError, match="the model itself is not changed; call apply first"):
            revert(model)
    finally:
        revert("qwen3")


def test_forward_of_somebody_else():
    model = CASES["qwen3"].build()
    model.model.layers[1].mlp.forward = lambda x: x  # as accelerate's hooks do
    rule = r"^model\.layers\.1\.mlp: Qwen3MLP must have the forward of its class, got one"
    with pytest.raises(RuntimeError, match=rule):
        apply(model)
    assert not any(row.replaced for row in report(model).rows)
    apply(model, ops={"rms_norm"})


def test_recorded_outputs_are_no_hindrance():
    # transformers 4.57 sets the forward of each layer while it records, and leaves it there.
    model, inputs = CASES["qwen3"].build(), CASES["qwen3"].inputs()
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states
        apply(model)
        got = model(**inputs, output_hidden_states=True).hidden_states
    kept = inputs["attention_mask"].bool()
    assert len(got) == len(want) == 3
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one[kept], other[kept], rtol=1e-5, atol=1e-5)


def broken(name: str, path: str, attribute: str, value: object) -> nn.Module:
    model = CASES[name].build()
    setattr(model.get_submodule(path), attribute, value)
    return model


# Family, module, attribute, value, the class named, the op to leave out, the rule.
CONFIGURATIONS = [
    ("qwen3", "model.layers.0.mlp", "act_fn", nn.GELU(), "silu_mul",
     "act_fn must be SiLU, got GELU"),
    ("qwen3", "model.rotary_emb", "rope_type", "yarn", "mrope_",
     "rope_type must be 'default', got 'yarn'"),
    ("qwen3_vl", "model.language_model.rotary_emb", "mrope_section", [4, 3, 3], "mrope_",
     r"mrope_section must add up to head_dim / 2 = 8, got \[4, 3, 3\]"),
    ("qwen3_vl", "model.visual.blocks.0.mlp", "act_fn", nn.ReLU(), "gelu",
     "act_fn must be GELU, exact or by tanh, got ReLU"),
    ("qwen3_vl", "model.visual.blocks.1.attn", "head_dim", 60, "varlen_attention",
     "head_dim must be a multiple of 8 up to 256, got 60"),
    ("qwen3", "model.layers.1.self_attn", "head_dim", 60, "varlen_attention",
     "head_dim must be a multiple of 8 up to 256, got 60"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path", "attribute", "value", "op", "rule"),
    CONFIGURATIONS,
    ids=[f"{row[0]}-{row[2]}" for row in CONFIGURATIONS],
)
def test_configuration(name, path, attribute, value, op, rule):
    model = broken(name, path, attribute, value)
    with pytest.raises(ValueError, match=rf"^{path}: {rule} in \w+; leave '{op}' out of ops"):
        apply(model)
    assert not any(row.replaced for row in report(model).rows)
    apply(model, ops=set(CASES[name].calls) - {op})


def test_configuration_met_by_a_family():
    model = broken("qwen3", "model.rotary_emb", "rope_type", "yarn")
    apply("qwen3")
    try:
        with pytest.raises(ValueError, match="rope_type must be 'default', got 'yarn' in Qwen3"):
            CASES["qwen3"].call(model)
    finally:
        revert("qwen3")


@pytest.mark.skipif(MAJOR < 5, reason="the towers of transformers 4 keep their rotation")
def test_vision_rope_theta():
    model = CASES["qwen3_vl"].build()
    model.model.visual.config.rope_parameters["rope_theta"] = 5000.0
    with pytest.raises(ValueError, match=r"rope_theta must be 10000, got 5000.0 in Qwen3VLVision"):
        apply(model)


def test_dropout_in_training():
    model = CASES["siglip2"].build().train()
    apply(model)
    CASES["siglip2"].call(model)  # without dropout training mode is no difference
    for module in model.modules():
        if type(module).__name__ == "Siglip2Attention":
            module.dropout = 0.1
    with pytest.raises(RuntimeError, match=r"attention_dropout must be 0 in training .*got 0.1"):
        CASES["siglip2"].call(model)


def test_siglip2_holes():
    model, inputs = CASES["siglip2"].build(), CASES["siglip2"].inputs()
    apply(model)
    inputs["pixel_attention_mask"][0, 3] = 0
    with torch.no_grad(), pytest.raises(ValueError, match=r"must mark consecutive tokens .* holes"):
        model(**inputs)


def test_report_of_a_model():
    model = CASES["qwen3"].build()
    before = {row.part: row for row in report(model).rows}
    assert before["Qwen3RMSNorm"].replaced == 0
    assert before["Qwen3RMSNorm"].modules == 9
    assert before["Qwen3RMSNorm"].note == "not asked for"

    apply(model, ops={"rms_norm", "varlen_attention"})
    rows = {row.part: row for row in report(model).rows}
    assert rows["Qwen3RMSNorm"].replaced == rows["Qwen3RMSNorm"].modules == 9
    assert rows["Qwen3Attention"].replaced == 2
    assert "sdpa for steps of one token" in rows["Qwen3Attention"].note
    assert (rows["Qwen3MLP"].replaced, rows["Qwen3MLP"].note) == (0, "not asked for")
    text = str(report(model))
    assert text.startswith("Qwen3ForCausalLM (transformers ")
    assert "Qwen3RMSNorm          rms_norm          9 of 9\n" in text


def test_report_names_modules_that_slipped_away():
    model = CASES["qwen3"].build()
    apply("qwen3")
    try:
        model.model.norm.forward = lambda x: x
        rows = {row.part: row for row in report(model).rows}
        assert (rows["Qwen3RMSNorm"].replaced, rows["Qwen3RMSNorm"].modules) == (8, 9)
        assert rows["Qwen3RMSNorm"].note == "model.norm: a forward of its own"
        assert rows["Qwen3Attention"].note == "attn_implementation='keye_kernels' is not asked for"
    finally:
        revert("qwen3")


def test_report_names_what_stays():
    notes = {row.part: row.note for row in report("siglip2").rows if not row.ops}
    assert "antialiasing" in notes["Siglip2VisionEmbeddings"]
    assert "MultiheadAttention" in notes["Siglip2MultiheadAttentionPoolingHead"]


@pytest.mark.skipif(MAJOR >= 5, reason="a class of its own there")
def test_shared_class_is_left_to_its_family():
    rows = {row.part: row for row in report("qwen2_5_vl").rows}
    assert rows["Qwen2RMSNorm"].note == "shared with qwen2; apply to a model changes it"
    assert "cosines" in rows["Qwen2_5_VisionRotaryEmbedding"].note
