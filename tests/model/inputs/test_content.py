"""Contents of pages, digests of patches, and which item each token belongs to."""

import dataclasses

import pytest
import torch

from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig
from keye_model.inputs import request as request_module
from keye_model.inputs.content import PromptInputs
from keye_model.inputs.request import Request
from tests.model import tiny
from tests.model.engine.prompts import picture, request, video, words


@pytest.fixture(params=[PREVIEW, V1_5], ids=lambda variant: variant.name)
def config(request):
    return KeyeConfig.from_dict(tiny.raw_config(request.param))


def pages(config, pieces, size=16, hashed=True):
    inputs = PromptInputs(request(config, pieces), config, size, index=0, hashed=hashed)
    return [inputs.page(k) for k in range(len(inputs.ids) // size)]


def test_items_in_the_order_of_their_tokens(config):
    pieces = [video(0, 2), words(0, 5), picture(1, 4, 6), picture(0, 4, 4)]
    prompt = request(config, pieces)
    inputs = PromptInputs(prompt, config, 16, index=0, hashed=True)
    assert [item.grid for item in inputs.items] == [(2, 4, 4), (1, 4, 6), (1, 4, 4)]
    assert [item.seconds for item in inputs.items] == [0.5, 0, 0]
    for item in inputs.items:
        assert len(item.index) == item.grid[0] * item.grid[1] * item.grid[2] // 4
        assert item.index.tolist() == list(range(item.index[0], item.index[-1] + 1))
    assert inputs.items[0].pixels is prompt.pixel_values_videos
    assert (inputs.items[1].first, inputs.items[2].first) == (0, 24)


def test_pages_that_differ(config):
    """In ids, in a picture of equal size, in a grid of equal size, in times."""
    base = [words(0, 10), picture(0), words(1, 40), video(0, 2, 0.5), words(2, 30)]
    same = pages(config, base)
    assert pages(config, base) == same
    for k, other in ((0, words(1, 10)), (1, picture(1)), (1, picture(0, 4, 16))):
        changed = pages(config, [*base[:k], other, *base[k + 1 :]])
        assert changed[0] != same[0]
    for other in (video(1, 2, 0.5), video(0, 2, 1.0)):
        changed = pages(config, [*base[:3], other, base[4]])
        assert [a == b for a, b in zip(changed, same, strict=True)].count(False) in (1, 2)


def test_a_page_within_a_long_picture_knows_it(config):
    assert [len(page.shown) for page in pages(config, [picture(0, 16, 16)])] == [1] * 4


def test_an_item_on_both_sides_of_a_page():
    """Frames of a row of a video of 1.5 may have text between them, here a page of it."""
    config = KeyeConfig.from_dict(tiny.raw_config(V1_5))
    frame = [config.video_token_id] * 4
    ids = torch.tensor([1, *frame, *range(5, 44), *frame, 2, 3, *range(20)])
    patches = torch.zeros(32, 3, 14, 14, dtype=torch.uint8)
    prompt = Request(ids, None, (), patches, ((2, 4, 4),), (1.0,))
    inputs = PromptInputs(prompt, config, 16, index=0, hashed=True)
    assert [len(inputs.page(k).shown) for k in range(4)] == [1, 1, 1, 0]


def test_a_picture_between_the_frames_of_a_video():
    config = KeyeConfig.from_dict(tiny.raw_config(V1_5))
    frame, shown = [config.video_token_id] * 4, [config.image_token_id] * 4
    ids = torch.tensor([*frame, *shown, *range(5, 35), *frame, *range(20)])
    patches = torch.zeros(32, 3, 14, 14, dtype=torch.uint8)
    prompt = Request(ids, patches[:16], ((1, 4, 4),), patches, ((2, 4, 4),), (1.0,))
    inputs = PromptInputs(prompt, config, 16, index=0, hashed=True)
    assert [len(inputs.page(k).shown) > 0 for k in range(3)] == [True] * 3
    assert inputs.page(3).shown == ()


def test_the_answer_belongs_to_the_pages(config):
    inputs = PromptInputs(request(config, [words(0, 20)]), config, 16, index=0, hashed=True)
    inputs.answer += range(12)
    whole = inputs.ids.tolist() + list(range(12))
    assert inputs.page(1).ids == torch.tensor(whole[16:]).numpy().tobytes()
    assert len(list(inputs.shareable())) == 1


def test_without_hashes_nothing_is_equal(config, monkeypatch):
    monkeypatch.setattr(request_module, "patch_digest", lambda _: pytest.fail("hashed"))
    first, second = (pages(config, [picture(0, 16, 16)], hashed=False) for _ in range(2))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_digests(monkeypatch):
    patches = torch.arange(48 * 588).remainder(251).to(torch.uint8).view(48, 3, 14, 14)
    prompt = Request(torch.tensor([1]), patches, ((1, 4, 6), (1, 4, 6)))
    images, videos = prompt.digests()
    assert (len(set(images)), videos) == (2, ())
    again = Request(torch.tensor([1]), patches.clone()[24:], ((1, 4, 6),))
    assert again.digests()[0] == images[1:]
    floats = Request(torch.tensor([1]), patches.float(), ((1, 4, 6),) * 2)
    assert not set(floats.digests()[0]) & set(images)
    halves = [Request(torch.tensor([1]), x, ((1, 4, 6),) * 2) for x in (patches.bfloat16(),) * 2]
    assert halves[0].digests() == halves[1].digests()
    monkeypatch.setattr(request_module, "patch_digest", lambda _: pytest.fail("hashed twice"))
    assert prompt.digests() == (images, videos)
    given = dataclasses.replace(again, image_digests=(b"known",))
    assert given.digests() == ((b"known",), ())


def test_digests_that_do_not_fit():
    patches = torch.zeros(24, 3, 14, 14, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image_digests must have one value for each of 1 rows"):
        Request(torch.tensor([1]), patches, ((1, 4, 6),), image_digests=())
    with pytest.raises(ValueError, match="video_digests must have one value for each of 0 rows"):
        Request(torch.tensor([1]), video_digests=(b"",))
