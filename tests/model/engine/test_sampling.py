import numpy as np
import pytest
import torch

from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.engine.sampling import SamplingParams, sampling_params
from keye_model.inputs.options import SamplingOptions

DEFAULTS = GenerationDefaults((7, 8), 8)


def params(defaults=DEFAULTS, **options):
    [found] = sampling_params(SamplingOptions(**options), defaults, 1)
    return found


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_new_tokens", 0, "a positive integer"),
        ("max_new_tokens", 1.5, "a positive integer"),
        ("max_new_tokens", True, "a positive integer"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("temperature", "hot", "at least 0"),
        ("top_k", -1, "an integer of at least 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.01, r"in \(0, 1\]"),
        ("repetition_penalty", 0.0, "positive"),
        ("repetition_penalty", float("inf"), "positive"),
        ("seed", 2**63, r"an integer in \[0, 2\^63\)"),
        ("top_k", 2**63, r"an integer below 2\^63"),
        ("top_k", 10**400, r"an integer below 2\^63"),
        ("top_k", True, "an integer of at least 0"),
        ("top_k", 5.0, "an integer of at least 0"),
        ("temperature", 1e39, "at most 3.4e38"),
        ("temperature", 10**400, "at most 3.4e38"),
        ("repetition_penalty", 1e39, "between 1.2e-38 and 3.4e38"),
        ("repetition_penalty", 1e-46, "between 1.2e-38 and 3.4e38"),
        ("seed", 7.0, r"an integer in \[0, 2\^63\)"),
        ("seed", -1, r"an integer in \[0, 2\^63\)"),
    ],
)
def test_sampling_params_refuse(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got"):
        SamplingParams(**{"max_new_tokens": 4, field: value})


def test_defaults_are_the_checkpoints():
    found = params(max_new_tokens=4, seed=3)
    assert found == SamplingParams(4, 0.6, 20, 0.95, 1.0, 3)


def test_greedy_ignores_the_checkpoints_sampling():
    assert params(max_new_tokens=4, do_sample=False, seed=0) == SamplingParams(4)


@pytest.mark.parametrize("temperature", [None, 0, 0.0, 1, 1.0])
@pytest.mark.parametrize("top_k", [None, -1, 0, 1, 50])
@pytest.mark.parametrize("top_p", [None, 0.001, 0.9, 1.0])
def test_greedy_takes_what_changes_nothing(temperature, top_k, top_p):
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = params(max_new_tokens=4, do_sample=False, seed=0, **given)
    assert found == SamplingParams(4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -2}, "top_k must be an integer of at least 0, got -2"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": "0"}, "temperature must be at least 0, got '0'"),
    ],
)
@pytest.mark.parametrize("do_sample", [None, True, False])
def test_values_out_of_range_whether_they_are_used_or_not(do_sample, given, message):
    with pytest.raises(ValueError, match=message):
        params(max_new_tokens=4, do_sample=do_sample, **given)


def test_sampling_at_temperature_0_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive when do_sample is True"):
        params(max_new_tokens=4, do_sample=True, temperature=0)
    assert params(max_new_tokens=4, temperature=0, seed=0).temperature == 0


def test_top_k_off_as_elsewhere():
    assert params(max_new_tokens=4, top_k=-1).top_k == 0


def test_greedy_refuses_sampling_values():
    with pytest.raises(ValueError, match="temperature must be left out when do_sample is False"):
        params(max_new_tokens=4, do_sample=False, temperature=0.5)


def test_a_sampling_value_turns_sampling_on():
    greedy = GenerationDefaults((7,), 7, do_sample=False)
    assert params(greedy, max_new_tokens=4, seed=0).temperature == 0.0
    assert params(greedy, max_new_tokens=4, top_p=0.5, seed=0).temperature == 0.6


def test_numpy_numbers_are_numbers():
    found = SamplingParams(np.int64(3), temperature=np.float32(0.5), seed=np.int64(7))
    assert (found.max_new_tokens, found.temperature, found.seed) == (3, 0.5, 7)


def test_do_sample_is_a_bool():
    with pytest.raises(ValueError, match="do_sample must be True, False or None, got 'no'"):
        params(max_new_tokens=4, do_sample="no")


def test_seed_follows_torch():
    def draw():
        torch.manual_seed(11)
        return params(max_new_tokens=4).seed

    assert draw() == draw() != params(max_new_tokens=4).seed


def test_the_least_and_the_largest_that_are_taken():
    SamplingParams(1, temperature=0, top_k=0, top_p=1, repetition_penalty=1e-9, seed=0)
    SamplingParams(1, seed=2**63 - 1)
    with pytest.raises(ValueError, match=f"seed must be an integer in .*, got {2**63}$"):
        SamplingParams(1, seed=2**63)
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        SamplingParams(0)
