"""The answering loop: what drafts hold at its end, and what comes out on the way."""

import pytest

from keye_model.engine.calls import Draft, answer
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.job import Token
from keye_model.processing.tokenizer import load_tokenizer


class Script:
    """A run that says the given tokens, in turn, to requests that were not stopped."""

    def __init__(self, *tokens):
        self.tokens, self.stopped = tokens, []

    def __iter__(self):
        for token in self.tokens:
            if token.request not in self.stopped:
                yield token

    def stop(self, request):
        self.stopped.append(request)


@pytest.fixture(scope="module")
def tokenizer(preview_checkpoint):
    return load_tokenizer(preview_checkpoint)


def said(tokenizer, request, text, reason="length"):
    ids = tokenizer.encode(text).ids
    return [Token(request, one) for one in ids[:-1]] + [Token(request, ids[-1], reason)]


def test_two_requests_in_turn(tokenizer):
    first, second = said(tokenizer, 0, "Hello there", "stop"), said(tokenizer, 1, "你好")
    tokens = [token for pair in zip(first, second, strict=False) for token in pair]
    tokens += first[len(second) :] + second[len(first) :]
    drafts = [Draft(Detokenizer(tokenizer)) for _ in range(2)]
    pieces = list(answer(Script(*tokens), drafts))
    texts = ["".join(piece for request, piece in pieces if request == k) for k in range(2)]
    assert texts == ["Hello there", "你好"] == [draft.detokenizer.text for draft in drafts]
    assert all(piece for _, piece in pieces)
    assert [draft.finish_reason for draft in drafts] == ["stop", "length"]
    assert [draft.token_ids for draft in drafts] == [
        [token.token_id for token in one] for one in (first, second)
    ]
    assert 0 < drafts[0].first_token <= drafts[1].first_token


def test_a_stop_string_ends_one_request(tokenizer):
    tokens = said(tokenizer, 0, "one two three four")
    drafts = [Draft(Detokenizer(tokenizer, "two"))]
    script = Script(*tokens)
    assert "".join(piece for _, piece in answer(script, drafts)) == "one "
    assert script.stopped == [0]
    assert drafts[0].finish_reason == "stop"
    assert len(drafts[0].token_ids) < len(tokens)


def test_a_stop_string_in_the_last_token(tokenizer):
    drafts = [Draft(Detokenizer(tokenizer, "four"))]
    script = Script(*said(tokenizer, 0, "one two three four"))
    assert "".join(piece for _, piece in answer(script, drafts)) == "one two three "
    assert drafts[0].finish_reason == "stop"


def test_ids_alone(tokenizer):
    tokens = said(tokenizer, 0, "one two", "stop")
    drafts = [Draft()]
    assert list(answer(Script(*tokens), drafts)) == []
    assert drafts[0].token_ids == [token.token_id for token in tokens]
    assert drafts[0].finish_reason == "stop"
