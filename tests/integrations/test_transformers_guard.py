"""What is done to the children of a patched model, before `apply` or after it, has its effect."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

pytest.importorskip("transformers")

from keye_kernels.integrations._guard import FORWARDS
from keye_kernels.integrations.transformers import apply, report, revert
from tests.integrations.test_transformers import Calls, assert_equal
from tests.integrations.tiny import CASES, expected

pytestmark = pytest.mark.usefixtures("on_device")


def leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


def more(value):
    """A little more of a tensor, or of each in a tuple."""
    if isinstance(value, tuple):
        return tuple(map(more, value))
    return value * 1.01 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def forward_hooks(model: nn.Module) -> None:
    for module in leaves(model):
        module.register_forward_hook(lambda _module, _args, output: more(output))


def forward_pre_hooks(model: nn.Module) -> None:
    for module in leaves(model):
        module.register_forward_pre_hook(lambda _module, args: more(args))


def own_forwards(model: nn.Module) -> None:
    """As accelerate and users set them."""
    for module in leaves(model):
        if type(module) in (nn.Linear, nn.LayerNorm, nn.SiLU, nn.GELU, nn.Conv2d):
            module.forward = lambda *args, inner=module.forward: more(inner(*args))


class Adapter(nn.Module):
    """A linear layer with an adapter beside it, as PEFT puts it in the place of the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False).to(base.weight.device)
        self.lora_B = nn.Linear(2, base.out_features, bias=False).to(base.weight.device)
        with torch.no_grad():
            self.lora_A.weight.fill_(0.02)
            self.lora_B.weight.fill_(0.02)

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Quantised(nn.Linear):
    """A linear layer of another kind, as those of bitsandbytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).round(decimals=1)


class Tuned(nn.Module):
    """A norm with weights beside it, as PEFT's tuning of norms: no weight of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return more(self.base_layer(x))


class Int8(torch.Tensor):
    """A weight that only F.linear understands, as torchao's."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        return torch.Tensor._make_subclass(cls, weight, require_grad=False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            weight = args[1].as_subclass(torch.Tensor).mul(8).round().div(8)
            return torch.nn.functional.linear(args[0], weight, *args[2:], **(kwargs or {}))
        if "linear" not in function.__name__ and function in (
            torch.mm,
            torch.addmm,
            torch.Tensor.t,
        ):
            raise NotImplementedError(f"{function.__name__} of a quantised weight")
        return super().__torch_function__(function, types, args, kwargs or {})


def swapped(kinds: tuple[type, ...], make: Callable, names: tuple[str, ...] = ("-",)) -> Callable:
    def change(model: nn.Module) -> None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                is_kind = type(child) in kinds or type(child).__name__.endswith(names)
                # The library reads the weight of these itself.
                if name == "patch_embedding" or "MultiheadAttention" in type(parent).__name__:
                    continue
                if is_kind:
                    setattr(parent, name, make(child))

    return change


def quantised(linear: nn.Linear) -> nn.Linear:
    other = Quantised(linear.in_features, linear.out_features, linear.bias is not None)
    other.load_state_dict(linear.state_dict())
    return other.to(linear.weight.device)


def int8_weights(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module._parameters["weight"] = nn.Parameter(Int8(module.weight.data), False)


def parametrizations(model: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 1.01

    for module in leaves(model):
        if getattr(module, "weight", None) is not None:
            parametrize.register_parametrization(module, "weight", Double())


def pruning(model: nn.Module) -> None:
    for module in leaves(model):
        if type(module) is nn.Linear:
            prune.l1_unstructured(module, "weight", 0.3)


def sequences(model: nn.Module) -> None:
    swapped((nn.Linear, nn.LayerNorm), lambda child: nn.Sequential(child, nn.Tanh()))(model)


CHANGES = {
    "forward hooks": forward_hooks,
    "forward pre-hooks": forward_pre_hooks,
    "forwards of their own": own_forwards,
    "adapters": swapped((nn.Linear,), Adapter),
    "a kind of linear": swapped((nn.Linear,), quantised),
    "tuned norms": swapped((nn.LayerNorm,), Tuned, ("RMSNorm",)),
    "int8 weights": int8_weights,
    "parametrizations": parametrizations,
    "pruning": pruning,
    "replaced children": sequences,
    "other activations": swapped(
        (nn.SiLU, nn.GELU), lambda _: nn.Tanh(), ("GELUTanh", "SiLUActivation")
    ),
}


def run(name: str, model: nn.Module, **options: object) -> list[torch.Tensor]:
    return CASES[name].call(model.requires_grad_(False), **options)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", CASES)
def test_after_apply(name, change):
    plain, patched = CASES[name].build(), CASES[name].build()
    apply(patched)
    run(name, patched)  # a first call decides nothing for later ones
    change(plain)
    change(patched)
    want = run(name, plain)
    assert any(not torch.equal(one, other) for one, other in zip(want, expected(name), strict=True))
    assert_equal(run(name, patched), want)


@pytest.mark.parametrize(
    "change",
    [CHANGES[k] for k in CHANGES if k not in ("other activations", "forwards of their own")],
    ids=[k for k in CHANGES if k not in ("other activations", "forwards of their own")],
)
@pytest.mark.parametrize("name", ["qwen3_vl", "siglip2", "qwen3"])
def test_before_apply(name, change):
    plain, patched = CASES[name].build(), CASES[name].build()
    change(plain)
    change(patched)
    apply(patched)
    assert_equal(run(name, patched), run(name, plain))


NAMED = {"hidden_states", "attention_mask", "cu_seqlens", "position_embeddings", "grid_thw"}


@pytest.mark.parametrize("name", CASES)
def test_hooks_see_what_they_saw(name):
    """Once per call of a module, and in the order and the form of the library."""

    def watch(model: nn.Module) -> list:
        seen = []
        for path, module in model.named_modules():
            module.register_forward_hook(
                lambda _m, args, kwargs, output, path=path: seen.append(
                    (path, len(args), sorted(kwargs.keys() & NAMED),
                     output if isinstance(output, torch.Tensor) else None)
                ),
                with_kwargs=True,
            )  # fmt: skip
        run(name, model)
        return seen

    plain, patched = CASES[name].build(), CASES[name].build()
    apply(patched)
    want, got = watch(plain), watch(patched)
    assert [seen[:3] for seen in got] == [seen[:3] for seen in want]
    for (path, *_, one), (*_, other) in zip(got, want, strict=True):
        if one is not None and one.is_floating_point() and "rotary" not in path:
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-4, msg=lambda m, p=path: p + m
            )


def test_global_hooks():
    plain, patched = CASES["qwen3"].build(), CASES["qwen3"].build()
    apply(patched)
    counts = []
    for model in (plain, patched):
        seen = Counter()
        handle = torch_module.register_module_forward_hook(
            lambda module, _args, _output, seen=seen: seen.update([type(module).__name__])
        )
        try:
            run("qwen3", model)
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1]
    with Calls() as calls:  # and gone with them
        run("qwen3", patched)
    assert calls.counts == CASES["qwen3"].calls


def test_backward_hooks_are_left_to_the_library():
    patched = CASES["qwen3"].build()
    apply(patched)
    patched.model.layers[0].mlp.gate_proj.register_full_backward_hook(lambda *_: None)
    with Calls() as calls:
        assert_equal(run("qwen3", patched), expected("qwen3"))
    assert calls.counts["silu_mul"] == 1  # of two


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(name, dtype):
    plain, patched = CASES[name].build().to(dtype), CASES[name].build().to(dtype)
    apply(patched)
    device = next(plain.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        assert_equal(run(name, patched), run(name, plain))
    with (
        torch.autocast(device, torch.bfloat16),
        torch.autocast(device, enabled=False),
        Calls() as c,
    ):
        run(name, patched)
    assert c.counts == CASES[name].calls


def test_autocast_in_a_part():
    """Of the layers alone: the mask was made for our attention, outside."""
    plain, patched = CASES["qwen3"].build(), CASES["qwen3"].build()
    apply(patched)
    for model in (plain, patched):
        for layer in model.model.layers:
            inner = type(layer).forward

            def forward(*args, layer=layer, inner=inner, **kwargs):
                with torch.autocast(args[0].device.type, torch.bfloat16):
                    return inner(layer, *args, **kwargs)

            layer.forward = forward
    assert_equal(run("qwen3", patched), run("qwen3", plain), rtol=0.02)


@pytest.mark.parametrize("name", CASES)
def test_norms_of_another_dtype(name):
    def build() -> nn.Module:
        model = CASES[name].build().to(torch.bfloat16)
        for module in model.modules():
            if "Norm" in type(module).__name__ and (
                isinstance(module, nn.LayerNorm) or "norm.weight" in type(module).__name__
            ):
                module.float()
        return model

    plain, patched = build(), build()
    apply(patched)
    exact = expected(name)
    for got, want, right in zip(run(name, patched), run(name, plain), exact, strict=True):
        error = (got.float() - right).abs().max()
        assert error <= 2 * (want.float() - right).abs().max()


def test_double_precision():
    for name in CASES:
        plain, patched = CASES[name].build().double(), CASES[name].build().double()
        apply(patched)
        inputs = CASES[name].inputs()
        inputs = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        with torch.no_grad():
            got, want = (CASES[name].outputs(m(**inputs), inputs) for m in (patched, plain))
        assert_equal(got, want, rtol=0)


def test_report_tells_what_was_added_since():
    model = CASES["qwen3"].build()
    apply(model)
    rows = {row.part: row for row in report(model).rows}
    assert (rows["Qwen3MLP"].replaced, rows["Qwen3MLP"].modules) == (2, 2)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = Adapter(mlp.gate_proj)
    norm = model.model.layers[0].post_attention_layernorm
    handle = norm.register_forward_hook(lambda *_: None)
    rows = {row.part: row for row in report(model).rows}
    assert (rows["Qwen3MLP"].replaced, rows["Qwen3MLP"].modules) == (1, 2)
    assert rows["Qwen3MLP"].note == f"model.layers.1.mlp: gate_proj is {__name__}.Adapter"
    assert rows["Qwen3DecoderLayer"].replaced == 1
    assert rows["Qwen3DecoderLayer"].note == (
        "model.layers.0: post_attention_layernorm has hooks or a forward of its own"
    )
    handle.remove()
    mlp.gate_proj = mlp.gate_proj.base_layer
    mlp.up_proj.weight = nn.Parameter(Int8(mlp.up_proj.weight.data), False)
    rows = {row.part: row for row in report(model).rows}
    assert rows["Qwen3DecoderLayer"].replaced == 2
    assert rows["Qwen3MLP"].note == "model.layers.1.mlp: up_proj.weight is Int8"
    revert(model)
    assert not any(row.replaced for row in report(model).rows)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_merger_of_another_kind(when):
    class Plain(nn.Module):
        def __init__(self, mlp: nn.Sequential) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 1.5

    plain, patched = CASES["qwen2_5_vl"].build(), CASES["qwen2_5_vl"].build()
    if when == "after":
        apply(patched)
    for model in (plain, patched):
        model.model.visual.merger.mlp = Plain(model.model.visual.merger.mlp)
    if when == "before":
        apply(patched)
    assert_equal(run("qwen2_5_vl", patched), run("qwen2_5_vl", plain))
    row = next(row for row in report(patched).rows if row.part == "Qwen2_5_VLPatchMerger")
    assert (row.replaced, row.note.split(": ")[0]) == (0, "model.visual.merger")


def test_an_adapter_can_be_trained_where_only_our_mlp_is():
    model = CASES["qwen3"].build().requires_grad_(False)
    apply(model, ops={"silu_mul"})
    for layer in model.model.layers:
        layer.mlp.gate_proj = Adapter(layer.mlp.gate_proj)
    model(**CASES["qwen3"].inputs()).logits.sum().backward()
    assert model.model.layers[0].mlp.gate_proj.lora_A.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.SiLU, nn.GELU, nn.Conv2d], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_forward_put_on_a_class(name, kind, monkeypatch):
    plain, patched = CASES[name].build(), CASES[name].build()
    apply(patched)
    before = run(name, patched)
    inner = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda *args, **kwargs: more(inner(*args, **kwargs)))
        assert_equal(run(name, patched), run(name, plain))
    assert_equal(run(name, patched), before, rtol=0)


@pytest.mark.parametrize("changed", ["model", "family"])
def test_a_forward_put_on_a_class_of_ours(changed):
    """In the place of the norms' that the layers read."""
    model = CASES["qwen3"].build()
    apply(model if changed == "model" else "qwen3")
    try:
        with Calls() as calls:
            run("qwen3", model)
        assert calls.counts["rms_norm"] == 9
        kind = type(model.model.norm)
        inner, heard = kind.forward, []
        assert FORWARDS[kind] is inner
        kind.forward = lambda *args: (heard.append(args[0]), inner(*args))[1]
        run("qwen3", model)
        kind.forward = inner
    finally:
        revert(model if changed == "model" else "qwen3")
    assert len(heard) == 9


def own_attention(model: nn.Module, plain: nn.Module) -> None:
    for ours, theirs in zip(layers(model)[::2], layers(plain)[::2], strict=True):
        setattr(ours, ATTENTION[type(ours).__name__], theirs.get_submodule(
            ATTENTION[type(theirs).__name__]))  # fmt: skip


def own_layers(model: nn.Module, plain: nn.Module) -> None:
    for ours, theirs in zip(lists(model), lists(plain), strict=True):
        ours[0] = theirs[0]


def wrapped_attention(model: nn.Module, _: nn.Module) -> None:
    for layer in layers(model):
        name = ATTENTION[type(layer).__name__]
        setattr(layer, name, Wrapped(layer.get_submodule(name)))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


class Narrow(Wrapped):
    """Takes what the library hands an attention of SigLIP2, and nothing of ours."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **handed: object
    ) -> object:
        assert set(handed) <= {"output_attentions", "output_hidden_states"}  # by transformers 4
        return self.inner(hidden_states, attention_mask=attention_mask)


class Attentions(dict):
    def __missing__(self, name: str) -> str:
        return "attn" if name.endswith("VisionBlock") else "self_attn"


ATTENTION = Attentions()


def lists(model: nn.Module) -> list[nn.ModuleList]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and type(module[0]).__name__.endswith(LAYERS)
    ]


LAYERS = ("Layer", "VisionBlock")


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for found in lists(model) for layer in found]


@pytest.mark.parametrize("change", [own_attention, own_layers, wrapped_attention])
@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_model_that_is_not_changed(name, change):
    patched = CASES[name].build()
    apply(patched)
    change(patched, CASES[name].build())
    assert_equal(run(name, patched), expected(name))


@pytest.mark.parametrize("number", [0, 1])
def test_an_attention_that_takes_no_more_than_the_librarys(number):
    patched = CASES["siglip2"].build()
    apply(patched)
    for found in lists(patched):
        found[number].self_attn = Narrow(found[number].self_attn)
    assert_equal(run("siglip2", patched), expected("siglip2"))


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_changed_model_in_one_that_is_not(name):
    plain, patched = CASES[name].build(), CASES[name].build()
    apply(patched)
    own_layers(plain, patched)
    assert_equal(run(name, plain), expected(name))


def test_layers_for_other_masks_among_plain_ones():
    """The mask of flex attention, which ours hand on."""
    name = "qwen3"
    patched, other = CASES[name].build(), CASES[name].build()
    for model in (patched, other):
        model.set_attn_implementation("flex_attention")
    apply(patched)
    seen = []
    own_attention(patched, other)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(_module, query, _key, _value, mask, **_):
        seen.append(type(mask).__name__)
        return torch.zeros_like(query).transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", attention)
        run(name, patched)
    assert seen == ["BlockMask", "BlockMask"]
