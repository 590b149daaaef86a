import json

import numpy as np
import pytest
import torch

from keye_model.engine.sampling import GenerationDefaults, SamplingParams

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
    params = DEFAULTS.params(max_new_tokens=4, seed=3)
    assert params == SamplingParams(4, 0.6, 20, 0.95, 1.0, 3)


def test_greedy_ignores_the_checkpoints_sampling():
    assert DEFAULTS.params(max_new_tokens=4, do_sample=False, seed=0) == SamplingParams(4)


@pytest.mark.parametrize("temperature", [None, 0, 0.0, 1, 1.0])
@pytest.mark.parametrize("top_k", [None, -1, 0, 1, 50])
@pytest.mark.parametrize("top_p", [None, 0.001, 0.9, 1.0])
def test_greedy_takes_what_changes_nothing(temperature, top_k, top_p):
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    params = DEFAULTS.params(max_new_tokens=4, do_sample=False, seed=0, **given)
    assert params == SamplingParams(4)


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
        DEFAULTS.params(max_new_tokens=4, do_sample=do_sample, **given)


def test_sampling_at_temperature_0_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive when do_sample is True"):
        DEFAULTS.params(max_new_tokens=4, do_sample=True, temperature=0)
    assert DEFAULTS.params(max_new_tokens=4, temperature=0, seed=0).temperature == 0


def test_top_k_off_as_elsewhere():
    assert DEFAULTS.params(max_new_tokens=4, top_k=-1).top_k == 0


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


ADDED = {"<|im_end|>": 5, "<|endoftext|>": 6}


def write_tokens(directory, tokens):
    added = [{"content": token, "id": one} for token, one in tokens.items()]
    write(directory, "tokenizer.json", {"added_tokens": added})


@pytest.mark.parametrize(
    ("generation", "config", "tokens", "eos", "pad"),
    [
        ({"eos_token_id": [1, 2], "pad_token_id": 3}, {}, ADDED, (1, 2), 3),
        ({"eos_token_id": 1}, {}, ADDED, (1,), 6),
        ({"eos_token_id": [1, 2]}, {"pad_token_id": 4}, {}, (1, 2), 4),
        ({"eos_token_id": [1, 2]}, {}, {}, (1, 2), 2),
        ({"pad_token_id": 3}, {"eos_token_id": 5}, ADDED, (5, 6), 3),
        (None, {"eos_token_id": 5}, ADDED, (5, 6), 6),
        (None, {}, {"<|im_end|>": 5}, (5,), 5),
        (None, {"eos_token_id": 9, "pad_token_id": 8}, {}, (9,), 8),
        (None, {"eos_token_id": [9, 8]}, None, (9, 8), 8),
    ],
    ids=[
        *("generation_config", "pad by string", "pad of config.json", "last end pads"),
        *("end by string", "no file", "one string", "config.json", "no tokenizer"),
    ],
)
def test_end_and_padding(tmp_path, generation, config, tokens, eos, pad):
    write(tmp_path, "config.json", config)
    if generation is not None:
        write(tmp_path, "generation_config.json", generation)
    if tokens is not None:
        write_tokens(tmp_path, tokens)
    defaults = GenerationDefaults.from_directory(tmp_path)
    assert (defaults.eos_token_ids, defaults.pad_token_id) == (eos, pad)
    published = (defaults.temperature, defaults.top_k, defaults.top_p)
    assert (defaults.do_sample, *published) == (True, 0.6, 20, 0.95)


def test_defaults_without_a_stop_id_are_refused(tmp_path):
    write(tmp_path, "config.json", {})
    write_tokens(tmp_path, {"</s>": 2})
    with pytest.raises(ValueError, match=r"must contain 'eos_token_id', or tokenizer\.json"):
        GenerationDefaults.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id of .* must be a token id, got '</s>'"),
        ({"eos_token_id": []}, r"eos_token_id of .* must be a token id, got \[\]"),
        ({"eos_token_id": [3, None]}, r"eos_token_id of .* must be a token id, got \[3, None\]"),
        ({"eos_token_id": True}, "eos_token_id of .* must be a token id, got True"),
        ({"eos_token_id": 3, "pad_token_id": -1}, "pad_token_id of .* must be a token id, got -1"),
    ],
)
def test_ids_that_are_none(tmp_path, raw, message):
    write(tmp_path, "generation_config.json", raw)
    with pytest.raises(ValueError, match=message):
        GenerationDefaults.from_directory(tmp_path)


@pytest.mark.parametrize("added", [{"<|im_end|>": 5}, 3, [{"content": "a"}]], ids=str)
def test_a_broken_list_of_tokens(tmp_path, added):
    write(tmp_path, "tokenizer.json", {"added_tokens": added})
    with pytest.raises(ValueError, match="must list 'added_tokens' as objects with 'id' and"):
        GenerationDefaults.from_directory(tmp_path)


def test_the_least_and_the_largest_that_are_taken():
    SamplingParams(1, temperature=0, top_k=0, top_p=1, repetition_penalty=1e-9, seed=0)
    SamplingParams(1, seed=2**63 - 1)
    with pytest.raises(ValueError, match=f"seed must be an integer in .*, got {2**63}$"):
        SamplingParams(1, seed=2**63)
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        SamplingParams(0)
