"""Embedded prompts: the same rows as `KeyeModel.embed`, whatever is cached, cut or shown twice."""

import pytest
import torch

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.inputs.content import PromptInputs
from keye_model.inputs.packing import pack
from keye_model.network.embedding import Embedding
from keye_model.network.vision import KeyeVisionModel
from keye_model.network.vision_cache import VisionCache
from tests.model.engine.prompts import picture, request, video, words
from tests.model.tiny import tiny_keye

PROMPTS = [
    [words(0, 5), picture(0, 4, 4), words(1, 3), video(0, 2)],
    [picture(1, 4, 4), picture(0, 4, 4), words(2, 4)],
]


@pytest.fixture(params=[PREVIEW, V1_5], ids=lambda variant: variant.name)
def model(request):
    return tiny_keye(request.param).model


def embedded(model, requests, cached=(0, 0), cache=None, max_patches=10**6, hashed=True):
    """(rows, calls of the tower, hits, tokens of pictures)"""
    prompts = [PromptInputs(one, model.config, 16, index=0, hashed=hashed) for one in requests]
    one = Embedding(model, prompts, cached, VisionCache(0) if cache is None else cache)
    done = [one.take_done()]
    done += [one.take_done() for _ in one.calls(max_patches, KeyeVisionModel.encode)]
    return one.hidden, len(done) - 1, one.num_hits, [sum(k) for k in zip(*done, strict=True)]


@pytest.fixture
def requests(model):
    return [request(model.config, pieces) for pieces in PROMPTS]


@torch.inference_mode()
def test_rows_equal_those_of_one_pass(model, requests):
    want = model.embed(pack(requests, model.config))
    for max_patches, calls in ((10**6, 1), (16, 3 if model.visual.joint_video_attention else 4)):
        for hashed in (True, False):
            hidden, made, hits, done = embedded(
                model, requests, max_patches=max_patches, hashed=hashed
            )
            torch.testing.assert_close(hidden, want, atol=2e-6, rtol=0)
            assert (hits, done) == (0, [12, 8])
            assert made == calls or not hashed


@torch.inference_mode()
@pytest.mark.parametrize("first", [0, 3, 6, 7, 10, 14, 20, 21])
def test_rows_after_a_cached_start(model, requests, first):
    """It may end before, within or after a picture or a video."""
    want = model.embed(pack(requests, model.config))
    length = len(requests[0].input_ids)
    hidden, _, _, done = embedded(model, requests, (first, 3))
    expected = torch.cat([want[first:length], want[length + 3 :]])
    torch.testing.assert_close(hidden, expected, atol=2e-6, rtol=0)
    assert done == [12, 8], "what is not needed is done"


@torch.inference_mode()
def test_kept_features_need_no_tower(model, requests):
    want = model.embed(pack(requests, model.config))
    cache = VisionCache(1 << 20)
    _, calls, hits, _ = embedded(model, requests, cache=cache, max_patches=16)
    assert (calls > 1, hits) == (True, 0)
    assert cache.num_bytes == (4 + 4 + 8) * 4 * model.config.text_config.hidden_size
    hidden, calls, hits, done = embedded(model, requests, cache=cache)
    torch.testing.assert_close(hidden, want, atol=2e-6, rtol=0)
    assert (calls, hits, done) == (0, 3, [12, 8])


@torch.inference_mode()
def test_no_pictures(model):
    plain = [request(model.config, [words(k, 9)]) for k in range(2)]
    hidden, calls, hits, done = embedded(model, plain)
    assert torch.equal(hidden, model.embed(pack(plain, model.config)))
    assert (calls, hits, done) == (0, 0, [0, 0])
