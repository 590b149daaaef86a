"""A patched model is copied, saved, shared and taken apart like any other."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

pytest.importorskip("transformers")

from keye_kernels.integrations.transformers import apply, report, revert
from tests.integrations.test_transformers import DECODERS, Calls, assert_equal
from tests.integrations.tiny import CASES, MAJOR, expected, generate

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name):
    model = CASES[name].build()
    apply(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_equal(CASES[name].call(loaded), CASES[name].call(model), rtol=0)
    with Calls() as calls:
        CASES[name].call(loaded)
    assert calls.counts == CASES[name].calls
    assert str(report(loaded)) == str(report(model))
    revert(loaded)
    assert_equal(CASES[name].call(loaded), expected(name), rtol=0)
    with Calls() as calls:
        CASES[name].call(model)  # as it was
    assert calls.counts == CASES[name].calls


def test_loaded_in_a_fresh_process(tmp_path):
    model = CASES["qwen3"].build().cpu()
    apply(model)
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    print(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())\n"
        "from keye_kernels.integrations.transformers import report\n"
        "print(sum(row.replaced for row in report(model).rows))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    total, replaced = answer.stdout.split()
    with torch.no_grad():
        want = model(torch.tensor([[5, 6, 7]])).logits.double().sum().item()
    assert float(total) == pytest.approx(want, rel=1e-5)
    assert int(replaced) == sum(row.replaced for row in report(model).rows)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_of_a_module_runs_its_own_weights(copied):
    model = CASES["qwen3"].build().requires_grad_(False)
    apply(model)
    for module in (model.model.norm, model.model.layers[0].mlp):
        x, other = torch.randn(1, 3, 64), copied(module)
        want = module(x)
        assert torch.equal(other(x), want)
        if copied is copy.copy:  # whose parameters are those of the module, until it gets its own
            other._parameters = dict(other._parameters)
            other._modules = {k: copy.deepcopy(child) for k, child in other._modules.items()}
        for parameter in other.parameters():
            if copied is copy.copy and module is model.model.norm:
                other._parameters["weight"] = nn.Parameter(parameter * 2, requires_grad=False)
            else:
                parameter.mul_(2)
        assert not torch.equal(other(x), want)
        assert torch.equal(module(x), want)


def test_a_replica_runs_its_own_weights():
    """As DataParallel makes one: an empty object, the same __dict__, other tensors."""
    model = CASES["qwen3"].build().requires_grad_(False)
    apply(model)
    norm, x = model.model.norm, torch.randn(1, 3, 64)
    replica = norm._replicate_for_data_parallel()
    replica.weight = norm.weight.detach() * 2  # a tensor there, no parameter
    with Calls() as calls:
        assert_equal([replica(x)], [norm(x) * 2])
    assert calls.counts["rms_norm"] == 2
    mlp = model.model.layers[0].mlp
    replica = mlp._replicate_for_data_parallel()
    for name, child in mlp._modules.items():
        replica._modules[name] = child._replicate_for_data_parallel()
        if name != "act_fn":
            replica._modules[name].weight = child.weight.detach() * 2
            replica._modules[name]._parameters["bias"] = None
    twice = copy.deepcopy(mlp)
    for parameter in twice.parameters():
        parameter.mul_(2)
    with Calls() as calls:
        assert_equal([replica(x)], [twice(x)])
    assert calls.counts["silu_mul"] == 2


@pytest.mark.parametrize("name", DECODERS)
def test_only_the_model_named_is_changed(name):
    teacher = CASES[name].build()
    before = copy.deepcopy(teacher.config.to_dict())
    apply(teacher)
    CASES[name].call(teacher)
    assert teacher.config.to_dict() == before
    student = type(teacher)(teacher.config)
    decoder = teacher.model if name == "qwen3" else teacher.model.language_model
    for model in (student, type(decoder)(decoder.config)):
        for module in model.modules():
            if hasattr(module, "config"):
                assert module.config._attn_implementation == "sdpa"
    inputs = CASES[name].inputs()
    with Calls() as calls:
        student.train()(**inputs).logits.sum().backward()
    assert not calls.counts
    assert all(p.grad is not None for p in student.model.parameters() if p.dim() == 1)


def test_a_decoder_alone_and_what_is_built_from_it():
    teacher = CASES["qwen3"].build().model
    apply(teacher)
    classes = type(teacher).__mro__
    assert [cls.__name__ for cls in classes[:2]] == ["Qwen3Model", "Qwen3Model"]
    student = classes[1](teacher.config)
    student(input_ids=torch.arange(3, 9)[None]).last_hidden_state.sum().backward()
    with torch.no_grad(), Calls() as calls:
        teacher(input_ids=torch.arange(3, 9)[None])
    assert calls.counts["varlen_attention"] == 2


def test_a_configuration_changed_later_counts():
    model = CASES["qwen3"].build()
    apply(model)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        assert model(**inputs).past_key_values is not None
        model.config.use_cache = False
        assert model(**inputs).past_key_values is None
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == 3
    clone = copy.deepcopy(model)
    clone.config.output_hidden_states = False
    with torch.no_grad():
        assert clone(**inputs).hidden_states is None
        assert len(model(**inputs).hidden_states) == 3


def test_save_pretrained(tmp_path):
    from transformers import AutoModelForCausalLM

    model = CASES["qwen3"].build()
    apply(model)
    model.save_pretrained(tmp_path)
    assert "keye" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(model.device).eval()
    with Calls() as calls:
        assert_equal(CASES["qwen3"].call(loaded), expected("qwen3"), rtol=0)
    assert not calls.counts


def test_names_are_those_of_the_library():
    model, plain = CASES["qwen3"].build(), CASES["qwen3"].build()
    apply(model)
    assert repr(model) == repr(plain)
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(module, type(other))
        assert str(type(module)) == str(type(other))


def test_revert_is_exact_whatever_was_called_in_between():
    model = CASES["qwen3"].build()
    apply(model)
    with torch.no_grad():
        model(**CASES["qwen3"].inputs(), output_hidden_states=True)
    generate(model, "qwen3")
    revert(model)
    plain = CASES["qwen3"].build()
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(other)
        assert (
            getattr(vars(module).get("forward"), "__func__", type(other).forward)
            is type(other).forward
        )
    with Calls() as calls:
        assert_equal(CASES["qwen3"].call(model), expected("qwen3"), rtol=0)
    assert not calls.counts


def test_revert_under_hooks_of_accelerate():
    """`accelerate.hooks.add_hook_to_module`, whose forward goes round the one that was there."""
    model = CASES["qwen3"].build()
    apply(model)
    for module in model.modules():
        if module.__dict__.get("_parameters"):
            module._old_forward = module.forward
            module.forward = lambda *args, module=module, **kwargs: module._old_forward(
                *args, **kwargs
            )
    with Calls() as calls:
        assert_equal(CASES["qwen3"].call(model), expected("qwen3"))
    assert calls.counts["rms_norm"] == 9
    assert {row.part: row for row in report(model).rows}["Qwen3RMSNorm"].replaced == 9
    revert(model)
    with Calls() as calls:
        assert_equal(CASES["qwen3"].call(model), expected("qwen3"), rtol=0)
    assert not calls.counts


def test_revert_of_what_has_a_class_over_ours():
    model = CASES["qwen3"].build()
    apply(model)
    parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="must have the class that apply gave it, got another"):
        revert(model)
    assert_equal(CASES["qwen3"].call(model), expected("qwen3"))
    parametrize.remove_parametrizations(model.model.norm, "weight")
    revert(model)
    assert not any(row.replaced for row in report(model).rows)


@pytest.mark.skipif(MAJOR >= 5, reason="transformers 4 leaves forwards behind")
def test_forwards_that_recording_left_behind_are_not_bound_to_the_original():
    model = CASES["qwen3"].build()
    with torch.no_grad():
        model(**CASES["qwen3"].inputs(), output_hidden_states=True)
    apply(model)
    assert not any("forward" in vars(module) for module in model.model.layers)


def with_config(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "_from_config")]


@pytest.mark.parametrize("build", [lambda t, c: t(c), lambda t, c: t._from_config(c)])
@pytest.mark.parametrize("name", CASES)
def test_what_is_built_by_the_class_of_a_changed_part_is_the_librarys(name, build):
    teacher, plain = CASES[name].build(), CASES[name].build()
    apply(teacher)
    for part, other in zip(with_config(teacher), with_config(plain), strict=True):
        student = build(type(part), part.config)
        assert [type(m) for m in student.modules()] == [type(m) for m in other.modules()]
        assert inspect.signature(type(part)) == inspect.signature(type(other))


def test_parts_built_by_the_class_of_a_changed_part():
    teacher = CASES["qwen3"].build()
    apply(teacher)
    decoder = teacher.model
    layer = decoder.layers[0]
    built = [
        type(decoder.norm)(64, eps=1e-5),
        type(layer.mlp)(config=teacher.config),
        type(layer)(teacher.config, 0),
    ]
    plain = CASES["qwen3"].build().model
    kinds = [type(plain.norm), type(plain.layers[0].mlp), type(plain.layers[0])]
    assert [type(module) for module in built] == kinds
    assert built[0].variance_epsilon == 1e-5


def test_a_student_of_the_decoder_runs_and_learns():
    teacher = CASES["qwen3"].build()
    apply(teacher)
    student = type(teacher.model)(teacher.config)
    inputs = {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6)}
    with Calls() as calls:
        student(**inputs).last_hidden_state.sum().backward()
    assert not calls.counts


def test_a_users_class_over_ours_has_its_own_parts():
    teacher = CASES["qwen3"].build()
    apply(teacher)

    class Student(type(teacher.model)):
        pass

    student = Student(teacher.config).to(teacher.device).eval()
    student.load_state_dict(teacher.model.state_dict())
    assert type(student) is Student
    inputs = CASES["qwen3"].inputs()
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        got, want = (model(**inputs).last_hidden_state[kept] for model in (student, teacher.model))
    assert_equal([got], [want])
