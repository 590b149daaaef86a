"""The ids that end an answer and the defaults of sampling, from a checkpoint's files."""

import json

import pytest

from keye_model.checkpoint.generation import GenerationDefaults


def write(directory, name, value):
    (directory / name).write_text(json.dumps(value))


def test_defaults_from_the_published_file(tmp_path):
    write(tmp_path, "config.json", {"eos_token_id": 151645})
    published = {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True}
    write(tmp_path, "generation_config.json", published | {"temperature": 0.3, "top_k": 5})
    defaults = GenerationDefaults.from_pretrained(tmp_path)
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
    defaults = GenerationDefaults.from_pretrained(tmp_path)
    assert (defaults.eos_token_ids, defaults.pad_token_id) == (eos, pad)
    published = (defaults.temperature, defaults.top_k, defaults.top_p)
    assert (defaults.do_sample, *published) == (True, 0.6, 20, 0.95)


def test_defaults_without_a_stop_id_are_refused(tmp_path):
    write(tmp_path, "config.json", {})
    write_tokens(tmp_path, {"</s>": 2})
    with pytest.raises(ValueError, match=r"must contain 'eos_token_id', or tokenizer\.json"):
        GenerationDefaults.from_pretrained(tmp_path)


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
        GenerationDefaults.from_pretrained(tmp_path)


@pytest.mark.parametrize("added", [{"<|im_end|>": 5}, 3, [{"content": "a"}]], ids=str)
def test_a_broken_list_of_tokens(tmp_path, added):
    write(tmp_path, "tokenizer.json", {"added_tokens": added})
    with pytest.raises(ValueError, match="must list 'added_tokens' as objects with 'id' and"):
        GenerationDefaults.from_pretrained(tmp_path)
