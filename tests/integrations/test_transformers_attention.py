"""The attention of patched decoders: masks, caches, weights; and its name in other models."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keye_kernels.integrations.transformers import apply, report, revert
from tests.integrations.test_transformers import DECODERS, Calls, assert_equal
from tests.integrations.tiny import _TEXT, CASES, MAJOR, generate

pytestmark = pytest.mark.usefixtures("on_device")

IDS = torch.arange(3, 19).view(2, 8)
MASKS = {
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8],
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8],
    "both sides": [[0, 0, 1, 1, 1, 1, 0, 0], [1] * 8],
    "holes": [[1, 1, 0, 1, 1, 0, 1, 1], [1] * 8],
    "a row of padding": [[0] * 8, [0, 1, 1, 1, 1, 1, 1, 1]],
    "none": [[1] * 8, [1] * 8],
}
LEFT = ("left", "a row of padding", "none")


def built(name: str = "qwen3", attention: str | None = None) -> nn.Module:
    model = CASES[name].build()
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_masks_at_every_position(kind, dtype):
    mask = torch.tensor(MASKS[kind]).to(dtype)
    plain, patched = built(), built()
    apply(patched)
    with torch.no_grad(), Calls() as calls:
        got, want = (m(IDS.to(m.device), attention_mask=mask).logits for m in (patched, plain))
    assert_equal([got], [want])  # at padding too
    assert calls.counts["varlen_attention"] == (2 if kind in LEFT else 0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["right", "left", "both sides"])
def test_generation_from_padded_prompts(name, kind):
    options = {
        "attention_mask": torch.tensor(MASKS[kind]),
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    static = {"cache_implementation": "static", "disable_compile": True}
    model = built(name)
    want = model.generate(IDS.to(model.device), **options)
    apply(model)
    for more in ({}, static):
        got = model.generate(IDS.to(model.device), **options, **more)
        assert_equal(list(got.logits), list(want.logits))
        assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("kind", ["right", "holes"])
def test_masked_queries_over_a_cache(kind):
    mask = torch.tensor(MASKS[kind])

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            first = model(IDS[:, :4].to(model.device), attention_mask=mask[:, :4], use_cache=True)
            return model(
                IDS[:, 4:].to(model.device),
                attention_mask=mask,
                past_key_values=first.past_key_values,
            ).logits

    plain, patched = built(), built()
    apply(patched)
    assert_equal([run(patched)], [run(plain)])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_one_token_without_positions(name, rows):
    plain, patched = built(name), built(name)
    apply(patched)
    ids = torch.tensor([[5], [6]])[:rows]
    with torch.no_grad():
        got, want = (m(ids.to(m.device)).logits for m in (patched, plain))
    assert got.shape == (rows, 1, 96)
    assert_equal([got], [want])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "inputs",
    [
        {"position_ids": torch.arange(8)[None]},
        {"position_ids": torch.arange(8)[None].expand(2, -1)},
        {"position_ids": torch.arange(8)[None].expand(3, 2, -1)},
        {"inputs_embeds": torch.randn(64, 8, 2).permute(2, 1, 0)},
        {"inputs_embeds": torch.randn(1, 8, 64).expand(2, -1, -1)},
        {"inputs_embeds": torch.randn(1, 1, 64).expand(2, -1, -1)},
        {"inputs_embeds": torch.randn(64, 1, 1).permute(1, 2, 0).expand(2, -1, -1)},
        {"inputs_embeds": torch.randn(2, 8, 128)[..., ::2]},
        {"inputs_embeds": torch.randn(0, 8, 64)},
    ],
    ids=["positions 1", "positions 2", "positions 3", "strided", "expanded", "one token", "both",
         "every second", "empty"],
)  # fmt: skip
def test_strides(name, inputs):
    if name == "qwen3" and inputs.get("position_ids", IDS).dim() == 3:
        pytest.skip("positions on three axes are not Qwen3's")
    plain, patched = (
        model.model if name == "qwen3" else model.model.language_model
        for model in (built(name), built(name))
    )
    apply(patched)
    if "inputs_embeds" not in inputs:
        inputs = {**inputs, "input_ids": IDS}
    with torch.no_grad():
        inputs = {key: value.to(plain.device) for key, value in inputs.items()}
        if inputs.get("inputs_embeds", IDS).shape[0] == 0:
            try:
                want = plain(**inputs).last_hidden_state
            except RuntimeError:
                pytest.skip("the library takes no empty batch")
            assert patched(**inputs).last_hidden_state.shape == want.shape
            return
        got, want = (model(**inputs).last_hidden_state for model in (patched, plain))
        assert_equal([got], [want])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams(options):
    model = built()
    inputs = CASES["qwen3"].inputs()
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    apply(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **options), want)


@pytest.mark.parametrize("name", DECODERS)
def test_weights_of_a_model_loaded_eager(name):
    plain, patched = built(name, "eager"), built(name, "eager")
    apply(patched)
    rows = {row.part: row for row in report(patched).rows}
    attention = next(row for part, row in rows.items() if part.endswith("Attention") and
                     "Vision" not in part)  # fmt: skip
    assert attention.replaced == 0
    assert "'eager' keeps its own" in attention.note
    inputs = CASES[name].inputs()
    with torch.no_grad():
        got, want = (m(**inputs, output_attentions=True).attentions for m in (patched, plain))
    assert len(got) == len(want) == 2
    assert_equal(list(got), list(want), rtol=1e-4)


def test_weights_of_a_model_set_eager_afterwards():
    plain, patched = built(attention="eager"), built()
    apply(patched)
    patched.set_attn_implementation("eager")
    with torch.no_grad():
        got, want = (m(IDS, output_attentions=True) for m in (patched, plain))
    assert_equal([*got.attentions, got.logits], [*want.attentions, want.logits], rtol=1e-4)
    patched.set_attn_implementation("sdpa")
    with torch.no_grad(), Calls() as calls:
        patched(IDS)
    assert calls.counts["varlen_attention"] == 2
    revert(patched)
    assert patched.model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_weights_of_a_tower_loaded_eager():
    plain, patched = built("siglip2", "eager"), built("siglip2", "eager")
    apply(patched)
    inputs = CASES["siglip2"].inputs()
    with torch.no_grad():
        got, want = (
            m(**inputs, output_attentions=True).vision_model_output.attentions
            for m in (patched, plain)
        )
    assert (got is None) == (want is None)
    if want is not None:
        assert_equal(list(got), list(want), rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_assisted_decoding(attention):
    model, assistant = built(attention=attention), built(attention=attention)
    ids = IDS[:1].to(model.device)
    options = {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_attentions": attention == "eager"}
    want = model.generate(ids, **options)
    apply(model)
    apply(assistant)
    got = model.generate(ids, assistant_model=assistant, **options)
    assert torch.equal(got.sequences, want.sequences)


def other_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**{**_TEXT, "head_dim": 16, **options})
    return LlamaForCausalLM(config).eval()


def test_a_model_of_another_family():
    model = other_model().to(IDS.device)
    mask = torch.tensor(MASKS["left"])
    with torch.no_grad():
        want = model(IDS, attention_mask=mask).logits
        model.set_attn_implementation("keye_kernels")
        with Calls() as calls:
            assert_equal([model(IDS, attention_mask=mask, token_type_ids=None).logits], [want])
    assert calls.counts["varlen_attention"] == 2


MORE = {
    "s_aux": torch.zeros(4),
    "sinks": torch.zeros(4),
    "softcap": 50.0,
    "position_bias": torch.zeros(1, 4, 8, 8),
    "head_mask": torch.ones(4),
    "score_mod": lambda score, *_: score,
    "something_new": torch.ones(1),
    "sliding_window": 4,
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("masked", [True, False])
def test_what_our_attention_does_not_honour_is_refused(name, masked):
    attention = ALL_ATTENTION_FUNCTIONS["keye_kernels"]
    q, kv = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
    starts = torch.tensor([[[0, 8, 16], [0, 8, 16]]], dtype=torch.int32) if masked else None
    module = other_model().model.layers[0].self_attn
    attention(module, q, kv, kv, starts, position_ids=torch.arange(8), softcap=None)
    with pytest.raises(NotImplementedError, match=f"{name} must be None with attn_implementation"):
        attention(module, q, kv, kv, starts, **{name: MORE[name]})


def test_a_window_that_the_mask_has_or_that_is_wide_enough():
    attention = ALL_ATTENTION_FUNCTIONS["keye_kernels"]
    q, kv = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
    module = other_model().model.layers[0].self_attn
    mask = torch.ones(8, 8, dtype=torch.bool).tril().triu(-3)[None, None].expand(2, 1, 8, 8)
    attention(module, q, kv, kv, mask, sliding_window=4)
    attention(module, q, kv, kv, None, sliding_window=8)


def test_attention_that_is_not_causal_or_drops():
    attention = ALL_ATTENTION_FUNCTIONS["keye_kernels"]
    q, kv = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
    starts = torch.tensor([[[0, 8, 16], [0, 8, 16]]], dtype=torch.int32)
    module = other_model().model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match=r"is_causal must be True or None .* got False"):
        attention(module, q, kv, kv, starts, is_causal=False)
    with pytest.raises(RuntimeError, match=r"attention_dropout must be 0 .* got 0\.5"):
        attention(module, q, kv, kv, starts, dropout=0.5)
    both = attention(module, q, kv, kv, None, is_causal=False)[0]  # a tower, through sdpa
    want = torch.nn.functional.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
    torch.testing.assert_close(both, want.transpose(1, 2))


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_models_whose_attention_takes_more(kind):
    if kind == "softcap":
        from transformers import Gemma2Config as Config
    else:
        from transformers import GptOssConfig as Config
    options = {**_TEXT, "head_dim": 16, "sliding_window": 4}
    if kind == "sinks":
        options |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(Config(**options), attn_implementation="eager").eval()
    with torch.no_grad():
        model(IDS)
        model.config._attn_implementation = "keye_kernels"
        name = "softcap" if kind == "softcap" else "s_aux"
        with pytest.raises(NotImplementedError, match=f"{name} must be None .*Attention"):
            model(IDS)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen3"])
def test_windows_in_the_mask(kind):
    import transformers

    options = {**_TEXT, "head_dim": 16, "sliding_window": 4}
    if kind == "Qwen3":
        options |= {"use_sliding_window": True, "max_window_layers": 1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        want = model(IDS).logits
        if kind == "Qwen3":
            apply(model)
        else:
            model.set_attn_implementation("keye_kernels")
        assert_equal([model(IDS).logits], [want])
        wanted = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert wanted.shape[0] == 2


def test_what_a_user_adds_to_a_call_is_no_argument_of_attention():
    model = built()
    apply(model)
    with torch.no_grad():
        want = model(IDS).logits
        assert_equal([model(IDS, token_type_ids=torch.zeros_like(IDS)).logits], [want])


def test_prompts_one_after_the_other_agree_with_static_caches():
    model = built()
    apply(model)
    inputs = {"attention_mask": torch.tensor(MASKS["right"])}
    one = generate_from(model, inputs)
    other = generate_from(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(one, other)


def generate_from(model: nn.Module, inputs: dict, **options: object) -> torch.Tensor:
    return model.generate(
        IDS.to(model.device), **inputs, max_new_tokens=6, do_sample=False, **options
    )


def test_generation_of_a_model_loaded_eager():
    model = built(attention="eager")
    want = generate(model, "qwen3")
    apply(model)
    assert_equal(generate(model, "qwen3"), want)


def foreign(kind: str, attention: str, **options: object) -> nn.Module:
    import transformers

    if kind == "XGLM":
        sizes = {"vocab_size": 96, "d_model": 64, "ffn_dim": 48, "num_layers": 2}
        options = {**sizes, "attention_heads": 4}
    elif kind == "ModernBert":
        options = {**_TEXT, "local_attention": 2, "global_attn_every_n_layers": 2}
        del options["num_key_value_heads"]
    else:
        options = {**_TEXT, **options}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    kinds = {"ModernBert": "Model"}
    cls = getattr(transformers, kind + kinds.get(kind, "ForCausalLM"))
    return cls._from_config(config, attn_implementation=attention).eval()


LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize(
    ("kind", "options", "got"),
    [
        ("DeepseekV2", LATENT, "16 and 24"),
        ("DeepseekV3", LATENT, "16 and 24"),
        ("Llama", {"head_dim": 20}, "20 and 20"),
        ("Llama", {"head_dim": 320}, "320 and 320"),
    ],
)
def test_heads_that_our_attention_does_not_take(kind, options, got):
    model = foreign(kind, "keye_kernels", **options)
    message = f"got {got} from {kind}Attention; use attn_implementation='sdpa'"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        model(IDS)


@pytest.mark.parametrize("kind", ["Doge", "XGLM", "ModernBert"])
@pytest.mark.parametrize("masked", MASKS)
def test_models_that_read_the_mask_or_say_more(kind, masked):
    if kind == "ModernBert" and MAJOR == 4:
        pytest.skip("has attention functions of its own in transformers 4")
    mask = torch.tensor(MASKS[masked])
    with torch.no_grad():
        got, want = (
            foreign(kind, attention)(IDS, attention_mask=mask)[0][mask.bool()]
            for attention in ("keye_kernels", "eager" if kind == "XGLM" else "sdpa")
        )
    assert_equal([got], [want])
