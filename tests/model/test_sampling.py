import json

import numpy as np
import pytest
import torch

from keye_model.sampling import GenerationDefaults, SamplingParams

DEFAULTS = GenerationDefaults((7, 8), 8)


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
        ("seed", -1, r"an integer in \[0, 2\^63\)"),
    ],
)
def test_sampling_params_refuse(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got"):
        SamplingParams(**{"max_new_tokens": 4, field: value})


def test_defaults_are_the_checkpoints():
    params = DEFAULTS.params(max_new_tokens=4, seed=3)
    assert params == SamplingParams(4, 0.6, 20, 0.95, 1.0, 3)


def test_greedy_ignores_the_checkpoints_sampling():
    assert DEFAULTS.params(max_new_tokens=4, do_sample=False, seed=0) == SamplingParams(4)


def test_greedy_refuses_sampling_values():
    with pytest.raises(ValueError, match="temperature must be left out when do_sample is False"):
        DEFAULTS.params(max_new_tokens=4, do_sample=False, temperature=0.5)


def test_a_sampling_value_turns_sampling_on():
    greedy = GenerationDefaults((7,), 7, do_sample=False)
    assert greedy.params(max_new_tokens=4, seed=0).temperature == 0.0
    assert greedy.params(max_new_tokens=4, top_p=0.5, seed=0).temperature == 0.6


def test_numpy_numbers_are_numbers():
    params = SamplingParams(np.int64(3), temperature=np.float32(0.5), seed=np.int64(7))
    assert (params.max_new_tokens, params.temperature, params.seed) == (3, 0.5, 7)


def test_do_sample_is_a_bool():
    with pytest.raises(ValueError, match="do_sample must be True, False or None, got 'no'"):
        DEFAULTS.params(max_new_tokens=4, do_sample="no")


def test_seed_follows_torch():
    def draw():
        torch.manual_seed(11)
        return DEFAULTS.params(max_new_tokens=4).seed

    assert draw() == draw() != DEFAULTS.params(max_new_tokens=4).seed


def write(directory, name, value):
    (directory / name).write_text(json.dumps(value))


def test_defaults_from_the_published_file(tmp_path):
    write(tmp_path, "config.json", {"eos_token_id": 151645})
    published = {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True}
    write(tmp_path, "generation_config.json", published | {"temperature": 0.3, "top_k": 5})
    defaults = GenerationDefaults.from_directory(tmp_path)
    assert defaults.eos_token_ids == (151645, 151643)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.3, 5, 0.95)


def test_defaults_without_the_file_stop_where_the_config_says(tmp_path):
    write(tmp_path, "config.json", {"eos_token_id": 5})
    defaults = GenerationDefaults.from_directory(tmp_path)
    assert (defaults.eos_token_ids, defaults.pad_token_id) == ((5,), 5)


def test_defaults_without_a_stop_id_are_refused(tmp_path):
    write(tmp_path, "config.json", {})
    with pytest.raises(ValueError, match="must contain 'eos_token_id'"):
        GenerationDefaults.from_directory(tmp_path)
