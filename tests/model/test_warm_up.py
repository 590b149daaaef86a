"""`Keye.warm_up`, and the switch that turns all caches off."""

import pytest

from keye_model import Keye
from keye_model.checkpoint.config import PREVIEW

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def path(checkpoints):
    return checkpoints[PREVIEW.name]


def look(media):
    """More than a page of tokens."""
    picture = {"type": "image", "image": str(media["picture"])}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "and so on " * 30}]}]


def test_each_size_runs_and_leaves_nothing(path, media, monkeypatch):
    keye = Keye.from_pretrained(path)
    keye.generate(look(media), **GREEDY)
    batches, generate = [], Keye.generate

    def counted(self, messages, **options):
        answers = generate(self, messages, **options)
        assert all(answer.usage.new_tokens > 1 for answer in answers)
        batches.append((len(answers), answers[0].usage.image_tokens))
        return answers

    monkeypatch.setattr(Keye, "generate", counted)
    keye.warm_up(batch_sizes=(1, 3), images=[(56, 84)])
    assert batches == [(1, 0), (1, 0), (3, 0), (3, 0), (1, 6), (1, 6)]
    assert keye.processor.source_cache.num_bytes == 0
    monkeypatch.undo()
    assert keye.generate(look(media), **GREEDY).usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_sizes": (2, 0)}, "batch_sizes must hold positive ints, got 0"),
        ({"batch_sizes": (True,)}, "batch_sizes must hold positive ints, got True"),
        ({"images": [(28, "x")]}, "images must hold positive ints, got 'x'"),
    ],
)
def test_wrong_sizes_are_named(path, sizes, message):
    with pytest.raises(ValueError, match=message):
        Keye.from_pretrained(path).warm_up(**sizes)


def test_without_cache_nothing_is_kept(path, media):
    keye = Keye.from_pretrained(path, cache=False)
    first, second = (keye.generate(look(media), **GREEDY) for _ in range(2))
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 0)
    assert keye.processor.source_cache.num_bytes == 0


def test_clear_cache_drops_all_of_it(path, media):
    keye = Keye.from_pretrained(path)
    keye.generate(look(media), **GREEDY)
    assert keye.generate(look(media), **GREEDY).usage.cached_tokens > 0
    assert keye.processor.source_cache.num_bytes > 0
    keye.clear_cache()
    assert keye.processor.source_cache.num_bytes == 0
    assert keye.generate(look(media), **GREEDY).usage.cached_tokens == 0
