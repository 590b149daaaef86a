"""Options of an answer: the keywords of each door, and the refusal of others."""

import dataclasses
from typing import get_type_hints

import pytest

from keye_model.inputs.options import SamplingKeywords, SamplingOptions


def test_the_keywords_are_the_fields():
    assert get_type_hints(SamplingKeywords) == get_type_hints(SamplingOptions)
    assert not SamplingKeywords.__required_keys__


def test_every_field_is_explained():
    for field in dataclasses.fields(SamplingOptions):
        assert f"        {field.name}: " in SamplingOptions.__doc__


def test_options_of_keywords():
    assert SamplingOptions.of({}) == SamplingOptions()
    assert SamplingOptions.of({"top_k": 3, "seed": [1, 2]}) == SamplingOptions(top_k=3, seed=[1, 2])


def test_unknown_keywords_are_refused_by_name():
    message = (
        "unknown keyword 'temprature'; known: max_new_tokens, do_sample, temperature, top_k, "
        "top_p, repetition_penalty, seed, stop_strings, limits"
    )
    with pytest.raises(TypeError, match=f"^{message}$"):
        SamplingOptions.of({"top_p": 0.5, "temprature": 1.0}, "limits")


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingOptions().top_k = 4
