"""Patched and unpatched models of transformers agree, on the release that is installed."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import StaticCache

from keye_kernels import _backends
from keye_kernels.integrations.transformers import apply, report, revert
from tests.compare import assert_close
from tests.integrations.tiny import CASES, GRID, MAJOR, expected, generate, pixels

pytestmark = pytest.mark.usefixtures("on_device")

TOWERS = [name for name, case in CASES.items() if case.tower]
# Modules that need two ops do not run on one of them: calls of an op where it is the only one.
ALONE = {
    ("paddleocr_vl", "merge_patches"): 0,
    ("paddleocr_vl", "gelu"): 2,
    ("qwen3_vl", "layer_norm"): 4,
    ("qwen3_vl", "gelu"): 2,
}
DECODERS = [name for name, case in CASES.items() if "mrope_" in case.calls]


class Calls:
    """Counts calls of our ops by name, where they look for who serves them."""

    def __enter__(self) -> "Calls":
        self.counts, self._find = Counter(), _backends.find
        _backends.find = self._count
        return self

    def _count(self, op: str, device_type: str):
        self.counts[op] += 1
        return self._find(op, device_type)

    def __exit__(self, *_: object) -> None:
        _backends.find = self._find


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor], rtol: float = 1e-5) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * largest)


@pytest.fixture
def family(request):
    """A family whose classes are changed for the length of a test."""
    expected(request.param)  # before the change
    apply(request.param)
    yield request.param
    revert(request.param)


@pytest.mark.parametrize("name", CASES)
def test_model_agrees_and_reverts(name):
    model = CASES[name].build()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    apply(model)
    with Calls() as calls:
        patched = CASES[name].call(model)
    assert calls.counts == CASES[name].calls
    assert_equal(patched, expected(name))
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)

    revert(model)
    with Calls() as calls:
        assert_equal(CASES[name].call(model), expected(name), rtol=0)
    assert not calls.counts


@pytest.mark.parametrize("family", CASES, indirect=True)
def test_family_agrees(family):
    model = CASES[family].build()
    with Calls() as calls:
        patched = CASES[family].call(model)
    assert_equal(patched, expected(family))
    wanted = dict(CASES[family].calls)
    if family in DECODERS:  # a decoder's attention is asked for by the model, not by its class
        wanted["varlen_attention"] -= 2
    if family == "qwen2_5_vl" and MAJOR == 4:  # its RMSNorm is Qwen2's there: layers only
        wanted["rms_norm"] = 8
    assert calls.counts == +Counter(wanted)


@pytest.mark.parametrize("family", DECODERS, indirect=True)
def test_family_with_our_attention_asked_for(family):
    model = CASES[family].build()
    model.set_attn_implementation("keye_kernels")
    with Calls() as calls:
        patched = CASES[family].call(model)
    assert calls.counts["varlen_attention"] == CASES[family].calls["varlen_attention"]
    assert_equal(patched, expected(family))


@pytest.mark.parametrize("name", CASES)
def test_family_reverts(name):
    expected(name)  # before the change
    apply(name)
    assert any(row.replaced for row in report(name).rows)
    model = CASES[name].build()
    revert(name)
    assert not any(row.replaced for row in report(name).rows)
    with Calls() as calls:
        assert_equal(CASES[name].call(model), expected(name), rtol=0)
    assert not calls.counts


@pytest.mark.parametrize(("name", "op"), [(n, op) for n, c in CASES.items() for op in c.calls])
def test_each_op_alone(name, op):
    model = CASES[name].build()
    apply(model, ops={op})
    wanted = ALONE.get((name, op), CASES[name].calls[op])
    with Calls() as calls:
        patched = CASES[name].call(model)
    assert calls.counts == +Counter({op: wanted})
    assert_equal(patched, expected(name))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic cache", "static cache"])
def test_generation_agrees(name, cache):
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    model = CASES[name].build()
    want = generate(model, name, **options)
    apply(model)
    with Calls() as calls:
        got = generate(model, name, **options)
    assert_equal(got, want)
    # A tower with two layers; a decoder with two, for the prompt over a dynamic cache alone.
    assert calls.counts["varlen_attention"] == (2 if name in TOWERS else 0) + (
        2 if cache is None else 0
    )


def test_prompt_in_two_parts_agrees():
    model = CASES["qwen3"].build()
    inputs = CASES["qwen3"].inputs()
    ids, mask = inputs["input_ids"].repeat(1, 3), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :5] = 0  # the first part of this row is all padding

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
            cache = first.past_key_values
            second = model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)
        return [second.logits[mask[:, 4:].bool()]]

    want = run()
    apply(model)
    with Calls() as calls:
        assert_equal(run(), want)
    assert calls.counts["varlen_attention"] == 4


@pytest.mark.parametrize("kind", ["holes", "packed"])
def test_other_masks_are_left_to_sdpa(kind):
    model = CASES["qwen3"].build()
    ids = torch.arange(3, 11)[None]
    if kind == "holes":
        inputs = {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1]])}
    else:  # two sequences in one row, told apart by their positions
        inputs = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False, **inputs).logits
        apply(model)
        with Calls() as calls:
            got = model(input_ids=ids, use_cache=False, **inputs).logits
    assert_equal([got], [want])
    assert calls.counts["varlen_attention"] == 0
    assert calls.counts["rms_norm"] == 9


def test_static_cache_without_a_mask_is_left_to_sdpa():
    model, ids = CASES["qwen3"].build(), torch.arange(3, 9)[None]

    def run() -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)  # whose end is not written yet
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache).logits

    want = run()
    apply(model)
    with Calls() as calls:
        assert_equal([run()], [want])
    assert calls.counts["varlen_attention"] == 0


@pytest.mark.parametrize("name", TOWERS)
def test_packed_images_stay_separate(name):
    case, model = CASES[name], CASES[name].build()
    apply(model)
    grid, patches = torch.tensor([*GRID, [2, 4, 4]]), pixels(24 + 32 + 32, *case.pixels)
    with torch.no_grad():
        together = case.tower(model, patches, grid)
        parts = patches.split([24, 32, 32])
        alone = [case.tower(model, part, row[None]) for part, row in zip(parts, grid, strict=True)]
        patches[24:] += 1  # what other images show makes no difference
        changed = case.tower(model, patches, grid)
    assert_equal([together], [torch.cat(alone)])
    assert torch.equal(together[:6], changed[:6])
    assert not torch.allclose(together[6:], changed[6:])


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    model = CASES[name].build().to(torch.bfloat16)
    plain = CASES[name].call(model)
    apply(model)
    for got, want, exact in zip(CASES[name].call(model), plain, expected(name), strict=True):
        assert_close(got, want, exact, atol=0.0)


@pytest.mark.parametrize("part", ["vision layer", "decoder layer"])
def test_layer_compiles_without_a_break(part):
    model = CASES["qwen3_vl"].build()
    apply(model)
    with torch.no_grad():
        if part == "vision layer":
            layer, x = model.model.visual.blocks[0], pixels(12, 144)
            places = torch.arange(12)
            positions = torch.stack([places // 4, places % 4], dim=1)
            angles = positions.float().repeat(1, 36)
            inputs = {
                "cu_seqlens": torch.tensor([0, 8, 12], dtype=torch.int32),
                "max_seqlen": 8,
                "position_embeddings": (positions, positions)
                if MAJOR >= 5
                else (angles.cos(), angles.sin()),
            }
        else:
            decoder, x = model.model.language_model, pixels(1, 5, 64)
            layer, positions = decoder.layers[0], torch.arange(5)[None]
            inputs = {
                "attention_mask": None,
                "position_embeddings": decoder.rotary_emb(x, positions),
            }
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_equal([compiled(x, **inputs)], [layer(x, **inputs)])


@pytest.mark.parametrize(
    ("op", "name"), {op: n for n, c in CASES.items() for op in c.calls}.items()
)
def test_gradients_are_refused(op, name):
    model = CASES[name].build()
    apply(model, ops={"merge_patches", "gelu"} if op == "merge_patches" else {op})
    with pytest.raises(RuntimeError, match=r"must not require a gradient: keye_kernels is forward"):
        model(**CASES[name].inputs())


def test_frozen_model_needs_no_context():
    model = CASES["qwen3"].build().requires_grad_(False)
    apply(model)
    inputs = CASES["qwen3"].inputs()
    got = CASES["qwen3"].outputs(model(**inputs, use_cache=False), inputs)
    assert_equal(got, expected("qwen3"))


def test_a_part_alone():
    model = CASES["qwen3_vl"].build()
    apply(model.model.visual)
    assert_equal(CASES["qwen3_vl"].call(model), expected("qwen3_vl"))
    rows = {row.part: row for row in report(model).rows}
    assert rows["Qwen3VLVisionBlock"].replaced == 2
    assert rows["Qwen3VLTextDecoderLayer"].replaced == 0
    with pytest.raises(RuntimeError, match="a part of it, is changed already"):
        apply(model)
    revert(model.model.visual)
    assert all(row.replaced == 0 for row in report(model).rows)


def test_parts_of_two_families():
    both = nn.ModuleDict({"tower": CASES["siglip2"].build(), "decoder": CASES["qwen3"].build()})
    apply(both)
    assert_equal(CASES["siglip2"].call(both["tower"]), expected("siglip2"))
    assert_equal(CASES["qwen3"].call(both["decoder"]), expected("qwen3"))
    parts = {row.part for row in report(both).rows if row.replaced}
    assert {"Siglip2Attention", "Qwen3Attention"} <= parts


def test_another_model_is_left_alone():
    patched, other = CASES["qwen3_vl"].build(), CASES["qwen3_vl"].build()
    apply(patched)
    with Calls() as calls:
        assert_equal(CASES["qwen3_vl"].call(other), expected("qwen3_vl"), rtol=0)
    assert not calls.counts


def test_a_copy_is_patched_and_reverts_by_itself():
    model = CASES["qwen3"].build()
    apply(model)
    clone = copy.deepcopy(model)
    revert(model)
    with Calls() as calls:
        assert_equal(CASES["qwen3"].call(clone), expected("qwen3"))
    assert calls.counts == CASES["qwen3"].calls
    revert(clone)
    with Calls() as calls:
        CASES["qwen3"].call(clone)
    assert not calls.counts
