"""Prompts from pieces, and the check of a cache's page bookkeeping."""

from __future__ import annotations

import functools
from collections import Counter

import torch

from keye_model.engine.calls import Engines
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.request import Request

GREEDY = SamplingParams(max_new_tokens=3)


@functools.cache
def patches(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 14, 14), generator=generator, dtype=torch.uint8)


def words(seed, count):
    """Ids of plain words, the same for the same seed."""
    return ("words", seed, count)


def picture(seed, rows=8, columns=8):
    return ("picture", seed, (1, rows, columns))


def video(seed, frames=2, seconds=0.5):
    return ("video", seed, (frames, 4, 4), seconds)


def request(config, pieces):
    """A prompt from its pieces."""
    ids, images, videos, seconds, pixels = [], [], [], [], {"picture": [], "video": []}
    for piece in pieces:
        kind, seed, *rest = piece
        if kind == "words":
            ids += [5 + (7 * seed + k * (3 + seed)) % 80 for k in range(rest[0])]
        elif kind == "ids":
            ids += seed
        else:
            grid = rest[0]
            count = grid[0] * grid[1] * grid[2]
            token = config.image_token_id if kind == "picture" else config.video_token_id
            ids += [config.vision_start_token_id, *[token] * (count // 4)]
            ids.append(config.vision_end_token_id)
            pixels[kind].append(patches(seed, count))
            (images if kind == "picture" else videos).append(grid)
            seconds += rest[1:]
    joined = [torch.cat(one) if one else None for one in pixels.values()]
    return Request(
        torch.tensor(ids), joined[0], tuple(images), joined[1], tuple(videos), tuple(seconds)
    )


def said(ids):
    """An answer that stands in the next prompt."""
    return ("ids", list(ids))


def start(model, requests, engines, params=GREEDY, **options):
    params = params if isinstance(params, list) else [params] * len(requests)
    options = {"eos_token_ids": ()} | options
    return engines.run(model.model, model.lm_head, requests, params, **options)


def tokens(model, requests, engines=None, params=GREEDY, **options):
    """Token ids of each request; without ``engines`` computed anew."""
    if engines is None:
        engines, options = Engines(), options | {"cache": False}
    found = [[] for _ in requests]
    for token in start(model, requests, engines, params, **options):
        found[token.request].append(token.token_id)
        check(engines.engine.workspace.cache)
    return found


def check(cache):
    """Every page is free, or owned, or only found; counts add up; a page's parent outlives it."""
    used = Counter(page for one in cache._sequences.values() for page in one.pages.tolist())
    assert cache._users == [used[page] for page in range(cache.num_pages)]
    free, unused = cache._free, list(cache._unused)
    assert sorted([*free, *unused, *used]) == list(range(cache.num_pages))
    assert cache._found == {key: page for page, key in cache._keys.items()}
    assert set(unused) <= set(cache._keys)
    assert not set(free) & set(cache._keys)
    turn = {page: k for k, page in enumerate(unused)}
    for page, (parent, _) in cache._keys.items():
        assert parent == -1 or parent in cache._keys
        assert parent not in turn or turn[page] < turn[parent]


def check_idle(engine):
    """Nothing is left of any request but what can be found."""
    cache = engine.workspace.cache
    check(cache)
    assert engine.idle
    assert not cache._sequences
    assert cache.num_free_pages == cache.num_pages
