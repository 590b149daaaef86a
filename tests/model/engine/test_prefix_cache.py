"""Reuse of pages and features changes no answer, and what can be reused is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_model import Keye
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.calls import Engines
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.content import PageContent
from keye_model.network.text import Linear
from tests.compare import assert_close
from tests.model.engine.prompts import (
    check_idle,
    picture,
    request,
    said,
    start,
    tokens,
    video,
    words,
)


@pytest.fixture(scope="module", params=[PREVIEW.name, V1_5.name])
def model(request, checkpoints):
    return KeyeForConditionalGeneration.from_pretrained(
        checkpoints[request.param], device_map="auto"
    )


@pytest.fixture(scope="module")
def preview(checkpoints):
    return KeyeForConditionalGeneration.from_pretrained(
        checkpoints[PREVIEW.name], device_map="auto"
    )


@pytest.fixture(scope="module")
def cold(model):
    """Token ids of prompts computed anew, remembered."""
    known = {}

    def answers(pieces):
        key = repr(pieces)
        if key not in known:
            [known[key]] = tokens(model, [request(model.config, pieces)])
        return known[key]

    return answers


def stats(engines):
    return dict(engines.engine.stats)


def spent(engines, before):
    """What the engine has done since ``before``."""
    return {name: count - before.get(name, 0) for name, count in stats(engines).items()}


PIECES = st.one_of(
    st.builds(words, st.integers(0, 1), st.sampled_from([1, 40, 64, 90])),
    st.builds(picture, st.integers(0, 2)),
    st.builds(video, st.integers(0, 1), st.integers(1, 2), st.sampled_from([0.5, 2.0])),
)
TURNS = st.lists(
    st.tuples(
        st.integers(0, 3),  # the earlier prompt that this one begins with
        st.integers(0, 4),  # without so many of its last pieces
        st.booleans(),  # with its answer
        st.lists(PIECES, min_size=1, max_size=3),
        st.integers(0, 4),  # the client leaves after so many tokens
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=25)
@given(turns=TURNS, pages=st.sampled_from([6, 9, 64]), batch=st.booleans())
def test_any_history_gives_the_cold_answers(model, cold, turns, pages, batch):
    """Turns, edited histories, shared starts, equal pictures anywhere, little room, leaving."""
    engines, limits = Engines(), Limits(max_cache_tokens=64 * pages, max_prefill_tokens=100)
    history = []
    for earlier, dropped, answered, new, leave in turns:
        begin = history[-1 - earlier] if earlier < len(history) else []
        begin = begin[: len(begin) - dropped]
        if answered and begin and not dropped:
            begin = [*begin, said(cold(begin))]
        pieces = [*begin, *new]
        prompt = request(model.config, pieces)
        if prompt.input_ids.numel() > 64 * min(pages, 9) - 3:
            continue
        history.append(pieces)
        prompts = [prompt] * 2 if batch else [prompt]
        if leave < 3:
            running = iter(start(model, prompts, engines, limits=limits))
            found = [next(running).token_id for _ in range(leave)]
            running.close()
            assert batch or found == cold(pieces)[:leave]
        else:
            assert tokens(model, prompts, engines, limits=limits) == [cold(pieces)] * len(prompts)
        if engines.engine:
            check_idle(engines.engine)


@pytest.mark.parametrize("pages", range(4, 10))
def test_evictions_at_every_point(model, cold, pages):
    """Conversations in turn, with room for one and a part of what others have left."""
    engines, limits = Engines(), Limits(max_cache_tokens=64 * pages)
    starts = [[words(0, 70), picture(0)], [words(0, 70), picture(1)], [picture(0), words(1, 80)]]
    for _ in range(2):
        for pieces in starts:
            for more in ([], [words(2, 50)], [words(2, 50), words(3, 30)]):
                prompt = request(model.config, [*pieces, *more])
                found = tokens(model, [prompt], engines, limits=limits)
                assert found == [cold([*pieces, *more])]
                check_idle(engines.engine)


def turn(model, engines, pieces, **options):
    """(answer, cached tokens, what was done) for a prompt."""
    before = stats(engines) if engines.engine else {}
    running = start(model, [request(model.config, pieces)], engines, **options)
    answer = [token.token_id for token in running]
    check_idle(engines.engine)
    return answer, running.cached_tokens[0], spent(engines, before)


@pytest.mark.parametrize(
    "seen", [picture(0, 60, 82), video(0, 64)], ids=["picture of 1230 tokens", "64 frames"]
)
def test_the_second_turn_computes_only_what_is_new(model, cold, seen):
    engines, first = Engines(), [words(0, 12), seen, words(1, 9)]
    answer, cached, done = turn(model, engines, first)
    assert (answer, cached) == (cold(first), 0)
    assert done["tower calls"] == 1
    second = [*first, said(answer), words(2, 20)]
    again, cached, done = turn(model, engines, second)
    assert again == cold(second)
    old, new = (request(model.config, one).input_ids.numel() for one in (first, second))
    assert old - 63 <= cached <= old + 2
    assert done["prompt tokens"] - done["cached tokens"] == new - cached <= new - old + 63
    assert done.get("tower calls", 0) == 0


def test_a_picture_partly_in_the_cache_needs_its_features(preview):
    """They come from the vision cache, or from the tower if that has dropped them."""
    config = preview.config
    pieces = [words(0, 50), picture(0, 16, 16)]  # tokens 51 to 114: the page ends within
    longer = [*pieces, words(1, 30)]
    want = tokens(preview, [request(config, longer)])[0]
    for max_bytes, calls in ((None, 0), (1, 1)):
        engines, limits = Engines(), Limits(max_feature_bytes=max_bytes)
        turn(preview, engines, pieces, limits=limits)
        answer, cached, done = turn(preview, engines, longer, limits=limits)
        assert (answer, cached) == (want, 64)
        assert done.get("tower calls", 0) == calls


def test_the_last_token_is_always_computed(preview):
    engines, pieces = Engines(), [words(0, 128)]
    for cached in (0, 64, 64):
        assert turn(preview, engines, pieces)[1] == cached
    assert turn(preview, engines, [words(0, 129)])[1] == 128


def test_answers_are_found_too(preview):
    """Prompt and answer fill two pages and a part, without the last token, which is not stored."""
    engines, params = Engines(), SamplingParams(70)
    answer, _, _ = turn(preview, engines, [words(0, 60)], params=params)
    assert turn(preview, engines, [words(0, 60), said(answer[:68])])[1] == 64
    assert turn(preview, engines, [words(0, 60), said(answer[:69])])[1] == 128
    other = [*answer[:66], answer[66] + 1, *answer[67:]]
    assert turn(preview, engines, [words(0, 60), said(other)])[1] == 64


@pytest.mark.parametrize(
    ("first", "second", "calls"),
    [
        ([picture(0, 16, 16)], [picture(1, 16, 16)], 1),
        ([picture(0, 16, 16)], [picture(0, 8, 32)], 1),
        ([video(0, 16, 0.5)], [video(1, 16, 0.5)], 1),
        ([video(0, 16, 0.5)], [video(0, 16, 2.0)], 0),
    ],
    ids=["other patches", "other grid", "other frames", "other times"],
)
def test_what_only_looks_equal_is_not_confused(model, cold, first, second, calls):
    """Equal ids, and other content, grid or times; features do not depend on times."""
    engines, question = Engines(), words(0, 80)
    turn(model, engines, [*first, question])
    answer, cached, done = turn(model, engines, [*second, question])
    assert (answer, cached) == (cold([*second, question]), 0)
    assert done.get("tower calls", 0) == calls


def test_equal_pictures_at_other_places_share_features(model, cold):
    engines = Engines()
    turn(model, engines, [picture(0), words(0, 5)])
    pieces = [words(1, 7), picture(0), words(0, 5), picture(0), picture(1)]
    answer, cached, done = turn(model, engines, pieces)
    assert (answer, cached) == (cold(pieces), 0)
    assert (done["tower calls"], done["cached items"]) == (1, 1)


def test_a_collision_of_hashes_is_caught(model, cold, monkeypatch):
    """Every page has the same hash: only comparing what they hold tells them apart."""
    monkeypatch.setattr(PageContent, "__hash__", lambda _: 7)
    engines = Engines()
    prompts = [[words(0, 70)], [words(1, 70)], [picture(0, 16, 16)], [picture(1, 16, 16)]]
    for pieces in [*prompts, *prompts]:
        assert turn(model, engines, pieces)[0] == cold(pieces)
    assert [turn(model, engines, pieces)[1] for pieces in prompts] == [64] * 4


def test_a_batch_that_begins_alike_computes_it_once(model, cold):
    engines = Engines()
    prompts = [[words(0, 70), picture(0), words(k, 9)] for k in range(1, 5)]
    running = start(model, [request(model.config, one) for one in prompts], engines)
    found = [[] for _ in prompts]
    for token in running:
        found[token.request].append(token.token_id)
    assert found == [cold(one) for one in prompts]
    assert running.cached_tokens == [0, 64, 64, 64]
    assert stats(engines)["tower calls"] == 1
    check_idle(engines.engine)


def test_nothing_is_kept_without_cache(preview):
    engines, pieces = Engines(), [picture(0, 16, 16), words(0, 70)]
    for _ in range(2):
        _, cached, done = turn(preview, engines, pieces, cache=False)
        assert (cached, done["tower calls"]) == (0, 1)
    assert engines.engine.features.num_bytes == 0
    assert not engines.engine.workspace.cache._found


def test_forgetting_while_requests_run(model, cold):
    engines, pieces = Engines(), [words(0, 70), picture(0), words(1, 60)]
    turn(model, engines, pieces)
    running = start(model, [request(model.config, pieces)] * 2, engines)
    one = iter(running)
    found = [[], []]
    for token in one:
        found[token.request].append(token.token_id)
        engines.clear_cache()
        assert engines.engine.features.num_bytes == 0
    assert found == [cold(pieces)] * 2
    check_idle(engines.engine)
    assert turn(model, engines, pieces)[0] == cold(pieces)


@pytest.fixture
def logits(monkeypatch):
    """The logits of all tokens of a prompt's answer."""
    heard, forward = [], Linear.forward

    def recorded(linear, hidden):
        out = forward(linear, hidden)
        if linear is listened[0]:
            heard.append(out.clone())
        return out

    listened = [None]
    monkeypatch.setattr(Linear, "forward", recorded)

    def of(model, pieces, engines, **options):
        heard.clear()
        listened[0] = model.lm_head
        list(start(model, [request(model.config, pieces)], engines, **options))
        return torch.cat(heard)

    return of


HISTORY = [words(0, 40), picture(0), words(1, 30), video(0, 4, 0.5), words(2, 50), picture(1)]


def test_logits_of_a_warm_prompt(model, logits):
    engines = Engines()
    for length in range(1, len(HISTORY) + 1):
        pieces = HISTORY[:length]
        warm = logits(model, pieces, engines)
        cold = logits(model, pieces, Engines(), cache=False)
        torch.testing.assert_close(warm, cold, atol=2e-5, rtol=0)
    assert stats(engines)["cached tokens"] > 200


def test_logits_of_a_warm_prompt_in_bfloat16(model, logits, checkpoints):
    """As far from fp32 as cold ones, within a factor."""
    directory = checkpoints[model.config.variant.name]
    rough = KeyeForConditionalGeneration.from_pretrained(
        directory, dtype=torch.bfloat16, device_map="auto"
    )
    engines, params = Engines(), SamplingParams(1)
    for length in range(1, len(HISTORY) + 1):
        pieces = HISTORY[:length]
        warm = logits(rough, pieces, engines, params=params)
        cold = logits(rough, pieces, Engines(), params=params, cache=False)
        exact = logits(model, pieces, Engines(), params=params, cache=False)
        assert_close(warm, cold, exact.double())


def test_conversations_of_the_facade(checkpoints, media):
    """Turns with a picture, a video and both: cold and warm give the same answers."""
    picture = {"type": "image", "image": str(media["picture"])}
    film = {"type": "video", "video": str(media["video"]), "max_frames": 4}
    for line in (PREVIEW, V1_5):
        warm = Keye.from_pretrained(checkpoints[line.name])
        cold = Keye.from_pretrained(checkpoints[line.name], cache=False)
        for shown in ([picture], [film], [picture, film]):
            messages, known = [], 0
            for k, text in enumerate(("What is this?", "And its colour?", "Why?")):
                content = [*(shown if k == 0 else []), {"type": "text", "text": text}]
                messages.append({"role": "user", "content": content})
                options = {"max_new_tokens": 9, "do_sample": False}
                answer = warm.generate(messages, **options)
                assert answer.token_ids == cold.generate(messages, **options).token_ids
                if k:
                    assert answer.usage.cached_tokens >= known - 63
                assert answer.usage.cached_tokens % 64 == 0
                known = answer.usage.prompt_tokens
                raw = warm.processor.tokenizer.decode(
                    list(answer.token_ids), skip_special_tokens=True
                )
                messages.append({"role": "assistant", "content": raw})
        assert cold.model.engines.engine.stats["cached tokens"] == 0
        warm.clear_cache()
        assert warm.generate(messages[:1], **options).usage.cached_tokens == 0
        assert warm.generate(messages[:1], **options).usage.cached_tokens > 0
