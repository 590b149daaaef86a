import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from keye_model.engine.detokenizer import Detokenizer

TEXT = "Grüße, 世界! 👩‍🔬 done"


@pytest.fixture(scope="module")
def tokenizer(preview_checkpoint):
    return Tokenizer.from_file(str(preview_checkpoint / "tokenizer.json"))


def feed(detokenizer, token_ids):
    pieces = [detokenizer.add(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.finish()]


def test_pieces_are_whole_characters(tokenizer):
    token_ids = tokenizer.encode(TEXT).ids
    assert len(token_ids) > len(TEXT)  # the tiny vocabulary spells these characters in bytes
    pieces = feed(Detokenizer(tokenizer), token_ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_once_at_the_end(tokenizer):
    token_ids = tokenizer.encode("ok 世").ids[:-1]
    *pieces, last = feed(Detokenizer(tokenizer), token_ids)
    assert "".join(pieces) == "ok "
    assert last == "\ufffd"


def test_special_tokens_leave_no_text_and_tags_stay(tokenizer):
    token_ids = tokenizer.encode("<think>a</think>b<|im_end|>").ids
    assert "".join(feed(Detokenizer(tokenizer), token_ids)) == "<think>a</think>b"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["done"], "Grüße, 世界! 👩‍🔬 "),
        (["界!"], "Grüße, 世"),
        (["never", "!", "世界"], "Grüße, "),
        (["done!"], TEXT),
    ],
    ids=["last word", "inside a word", "the first to come", "only begun"],
)
def test_stop_strings_cut(tokenizer, stops, expected):
    detokenizer = Detokenizer(tokenizer, stops)
    pieces = feed(detokenizer, tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stopped == (expected != TEXT)


def test_one_stop_string_needs_no_list(tokenizer):
    detokenizer = Detokenizer(tokenizer, "!")
    feed(detokenizer, tokenizer.encode(TEXT).ids)
    assert detokenizer.text == "Grüße, 世界"


@pytest.mark.parametrize("stop", ["", 3])
def test_bad_stop_strings(tokenizer, stop):
    with pytest.raises(ValueError, match="stop_strings must hold non-empty strings, got"):
        Detokenizer(tokenizer, [stop])


def test_stop_strings_of_another_kind(tokenizer):
    with pytest.raises(ValueError, match="stop_strings must be strings, got 5"):
        Detokenizer(tokenizer, 5)


@given(text=st.text(max_size=20), stop=st.text(min_size=1, max_size=3))
def test_stream_equals_whole(preview_checkpoint, text, stop):
    tokenizer = Tokenizer.from_file(str(preview_checkpoint / "tokenizer.json"))
    token_ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(token_ids)
    assert "".join(feed(Detokenizer(tokenizer), token_ids)) == whole
    assert "".join(feed(Detokenizer(tokenizer, [stop]), token_ids)) == whole.partition(stop)[0]
