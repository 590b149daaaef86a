"""Keywords that programs for transformers pass: taken where they change nothing, else refused."""

import pytest
import torch

from keye_model import Keye, KeyeForConditionalGeneration, KeyeProcessor
from keye_model.inputs.keywords import GENERATING, LOADING, LOADING_PROCESSOR, without_idle

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def model(preview_checkpoint):
    return KeyeForConditionalGeneration.from_pretrained(preview_checkpoint)


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False)


def idle(table):
    """Every keyword of a table with every value that it may have."""
    return [
        pytest.param({name: value}, id=f"{name}={value!r}")
        for name, values in table.items()
        for value in (None, *(("anything", 3, object) if values is None else values))
    ]


@pytest.mark.parametrize("given", idle(GENERATING))
def test_generate_takes_what_changes_nothing(model, greedy, given):
    out = model.generate(IDS, max_new_tokens=8, do_sample=False, **given)
    assert torch.equal(out, greedy)


@pytest.mark.parametrize("given", idle(LOADING))
def test_loading_takes_what_changes_nothing(given):
    assert without_idle(given | {"dtyp": 1}, LOADING) == {"dtyp": 1}


@pytest.mark.parametrize("given", idle(LOADING_PROCESSOR))
def test_loading_a_processor_takes_what_changes_nothing(preview_checkpoint, given):
    assert KeyeProcessor.from_pretrained(preview_checkpoint, **given).chat_template


def test_lists_of_nothing(model, greedy):
    class Processors(list):
        pass

    out = model.generate(IDS, max_new_tokens=8, do_sample=False, logits_processor=Processors())
    assert torch.equal(out, greedy)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams must be 1, got 4"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1, got 2"),
        ({"penalty_alpha": 0.6}, "penalty_alpha must be 0, got 0.6"),
        ({"use_cache": False}, "use_cache must be True, got False"),
        ({"cache_implementation": "offloaded"}, "must be 'dynamic' or 'static', got 'offloaded'"),
        ({"max_length": 40}, "max_length must be left out, got 40"),
        ({"min_new_tokens": 4}, "min_new_tokens must be 0, got 4"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size must be 0, got 3"),
        ({"output_scores": True}, "output_scores must be False, got True"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate must be False, got True"),
        ({"bad_words_ids": [[5]]}, r"bad_words_ids must be left out, got \[\[5\]\]"),
        ({"logits_processor": [min]}, "logits_processor must be left out, got"),
        ({"stopping_criteria": min}, "stopping_criteria must be left out, got"),
        ({"streamer": object()}, "streamer must be left out, got <object"),
        ({"inputs_embeds": torch.ones(2, 2)}, "inputs_embeds must be left out, got tensor"),
        ({"generation_config": {"top_k": 1}}, "generation_config must be left out, got"),
        ({"guidance_scale": 2.0}, "guidance_scale must be 1, got 2.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_generate_refuses_what_it_cannot_do(model, given, message):
    with pytest.raises(NotImplementedError, match=message):
        model.generate(IDS, max_new_tokens=2, **given)


def test_generate_refuses_what_nobody_knows(model):
    with pytest.raises(TypeError, match="unknown keyword 'max_new_token'; known: max_new_tokens, "):
        model.generate(IDS, max_new_token=2)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"load_in_4bit": True}, NotImplementedError, "load_in_4bit must be False, got True"),
        ({"quantization_config": object()}, NotImplementedError, "must be left out, got <object"),
        ({"revision": "abc"}, NotImplementedError, "revision must be 'main', got 'abc'"),
        ({"use_safetensors": False}, NotImplementedError, "use_safetensors must be True, got F"),
        ({"device": "cpu"}, TypeError, "unknown keyword 'device'; known: dtype, torch_dtype, dev"),
        (
            {"dtype": "float16", "torch_dtype": "float32"},
            ValueError,
            "dtype must be given once, got float16 and torch_dtype float32",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_loading_refuses(preview_checkpoint, given, error, message):
    with pytest.raises(error, match=message):
        KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, **given)


@pytest.mark.parametrize("given", [{"dtype": None}, {"torch_dtype": None}, {"torch_dtype": "auto"}])
def test_the_dtype_of_the_checkpoint(preview_checkpoint, model, given):
    loaded = KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, **given)
    assert loaded.dtype == model.dtype


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"padding_side": "right"},
            NotImplementedError,
            "padding_side must be 'left', got 'right'",
        ),
        ({"max_pixel": 4}, TypeError, "unknown keyword 'max_pixel'; known: min_pixels, max_pixels"),
    ],
)
def test_loading_a_processor_refuses(preview_checkpoint, given, error, message):
    with pytest.raises(error, match=message):
        KeyeProcessor.from_pretrained(preview_checkpoint, **given)


@pytest.mark.parametrize("form", [int, lambda one: [one], lambda one: torch.tensor([one])])
def test_other_ids_end_an_answer(model, greedy, form):
    new = greedy[0, 3:].tolist()
    end = new[2]
    kept = new[: new.index(end) + 1]
    two = IDS.repeat(2, 1)
    two[1, 0] = 9
    other = model.generate(two, max_new_tokens=8, do_sample=False, eos_token_id=form(end))
    assert other[0, 3 : 3 + len(kept)].tolist() == kept
    pads = model.generation_config.pad_token_id
    assert other[0, 3 + len(kept) :].tolist() == [pads] * (other.shape[1] - 3 - len(kept))
    filled = model.generate(
        two, max_new_tokens=8, do_sample=False, eos_token_id=[end, new[0]], pad_token_id=11
    )
    assert filled[0, 3:].tolist() == [new[0]] + [11] * (filled.shape[1] - 4)


def test_no_id_of_the_checkpoint_ends_an_answer_when_others_are_given(model, greedy):
    end = int(greedy[0, 3])
    stopping = type(model.generation_config)((end,), 1)
    model.generation_config, kept = stopping, model.generation_config
    try:
        assert model.generate(IDS, max_new_tokens=8, do_sample=False).shape[1] == 4
        free = model.generate(
            IDS, max_new_tokens=8, do_sample=False, eos_token_id=kept.eos_token_ids
        )
        assert torch.equal(free, greedy)
    finally:
        model.generation_config = kept


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [-1, True, "2", 1.0, [], [1, -2], [[1]]], ids=repr)
def test_ids_that_are_none(model, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a token id, got"):
        model.generate(IDS, max_new_tokens=2, **{name: value})


def test_the_facade_has_its_own_keywords(model, preview_checkpoint):
    keye = Keye(model, KeyeProcessor.from_pretrained(preview_checkpoint))
    messages = [{"role": "user", "content": "Hi"}]
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = keye.generate(messages, **options).token_ids
    same = keye.generate(messages, **options, temperature=0, top_p=1.0, top_k=1)
    assert same.token_ids == expected
    with pytest.raises(TypeError, match="num_beams"):
        keye.generate(messages, num_beams=1)
