"""PEFT, accelerate, torchao and dynamic quantisation on patched models, where installed."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from keye_kernels.integrations.transformers import apply, report, revert
from tests.integrations.test_transformers import Calls, assert_equal
from tests.integrations.tiny import CASES, MAJOR

pytestmark = pytest.mark.usefixtures("on_device")

LINEARS = ["gate_proj", "up_proj", "down_proj", "q_proj", "v_proj", "fc1", "fc2", "linear_fc1"]


def library(name: str):
    """The library, without what it says of its own surroundings while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)
        return importlib.import_module(name)


def perturbed(model: nn.Module) -> nn.Module:
    """Adapters begin without effect; these have one."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3", "ln_tuning", "magnitude")):
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.data += 0.1 * noise.to(parameter)
    return model.eval().requires_grad_(False)


def configurations() -> dict:
    peft = library("peft")
    return {
        "lora": peft.LoraConfig(target_modules=LINEARS),
        "dora": peft.LoraConfig(target_modules=LINEARS, use_dora=True),
        "ia3": peft.IA3Config(target_modules=["gate_proj", "fc1"], feedforward_modules=[]),
        "norms": peft.LNTuningConfig(
            target_modules=["post_attention_layernorm", "norm", "norm2", "layer_norm2", "q_norm"]
        ),
        "kept whole": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]),
    }


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "norms", "kept whole"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl", "siglip2"])
def test_peft(name, kind, when):
    peft, config = library("peft"), configurations()[kind]
    if name == "siglip2" and kind == "kept whole":
        pytest.skip("keeps the MLP of a pooling head too, which is called with a tuple")
    outputs = []
    for patched in (False, True):
        model = CASES[name].build()
        inner = model
        if patched and when == "after":
            apply(inner)
        torch.manual_seed(0)  # adapters begin with random weights
        model = perturbed(peft.get_peft_model(model, copy.deepcopy(config)))
        if patched and when == "before":
            apply(model)
        outputs.append(CASES[name].call(model.get_base_model()))
    assert_equal(outputs[1], outputs[0])
    if kind == "lora":
        merged = model.merge_and_unload()
        with Calls() as calls:
            assert_equal(CASES[name].call(merged), outputs[0], rtol=1e-4)
        assert calls.counts == CASES[name].calls  # ours again


@pytest.mark.parametrize("when", ["before", "after"])
def test_add_adapter(when):
    peft = library("peft")
    plain, patched = CASES["qwen3"].build(), CASES["qwen3"].build()
    if when == "after":
        apply(patched)
    for model in (plain, patched):
        torch.manual_seed(0)
        try:
            model.add_adapter(peft.LoraConfig(target_modules=["gate_proj"]))
        except ValueError as error:  # transformers 5.24 wants a PEFT that is not out yet
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
        perturbed(model)
    if when == "before":
        apply(patched)
    rows = {row.part: row for row in report(patched).rows}
    assert rows["Qwen3MLP"].replaced == 0
    assert "gate_proj is peft" in rows["Qwen3MLP"].note
    assert_equal(CASES["qwen3"].call(patched), CASES["qwen3"].call(plain))
    for model in (plain, patched):
        model.disable_adapters()
    assert_equal(CASES["qwen3"].call(patched), CASES["qwen3"].call(plain))


# SigLIP2 reads its position table past the hooks, which accelerate does not serve.
@pytest.mark.parametrize("name", [name for name in CASES if name != "siglip2"])
def test_accelerate_offload_after_apply(name):
    if name == "qwen3_vl" and MAJOR == 4:
        pytest.skip("transformers 4 cannot offload it either")
    accelerate = library("accelerate")
    plain, patched = CASES[name].build(), CASES[name].build()
    device = next(plain.parameters()).device
    apply(patched)
    want = CASES[name].call(plain)
    accelerate.cpu_offload(patched, execution_device=device)
    assert_equal(CASES[name].call(patched), want)
    revert(patched)
    assert_equal(CASES[name].call(patched), want)
    accelerate.hooks.remove_hook_from_submodules(patched)
    with Calls() as calls:
        CASES[name].call(patched)
    assert not calls.counts


def test_accelerate_offload_before_apply():
    accelerate = library("accelerate")
    model = CASES["qwen3"].build()
    accelerate.cpu_offload(model, execution_device=next(model.parameters()).device)
    with pytest.raises(RuntimeError, match=r"^model\.\S+: Qwen3\w+ must have the forward of its"):
        apply(model)
    assert not any(row.replaced for row in report(model).rows)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl", "siglip2"])
def test_torchao(name, when):
    quantization = library("torchao.quantization")
    plain, patched = CASES[name].build(), CASES[name].build()
    if when == "after":
        apply(patched)
    for model in (plain, patched):
        model.requires_grad_(False)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if when == "before":
        apply(patched)
    assert_equal(CASES[name].call(patched), CASES[name].call(plain))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of PyTorch on a CPU")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl"])
def test_dynamic_quantisation(name, when):
    if not torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised layers")
    plain, patched = CASES[name].build(), CASES[name].build()
    if when == "after":
        apply(patched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its move to torchao
        plain, patched = (
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in (plain, patched)
        )
    if when == "before":
        apply(patched)
    assert_equal(CASES[name].call(patched), CASES[name].call(plain))
