"""Page bookkeeping of the cache, and what a step says about new tokens."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keye_model.checkpoint.config import PREVIEW, KeyeConfig
from keye_model.network.cache import PagedCache
from tests.model import tiny
from tests.model.engine.prompts import check

TEXT = KeyeConfig.from_dict(tiny.raw_config(PREVIEW)).text_config


def make(num_pages: int = 8, **options) -> PagedCache:
    return PagedCache(
        TEXT, num_pages, **{"page_size": 16, "dtype": torch.float32, "device": "cpu"} | options
    )


def state(cache: PagedCache) -> tuple:
    return cache.num_free_pages, [cache.num_tokens(h) for h in sorted(cache._sequences)]


def test_shapes():
    cache = make(5)
    assert cache.k.shape == cache.v.shape == (2, 5, 16, 2, 128)
    k, v = cache.layer(1)
    assert (k.data_ptr(), v.data_ptr()) == (cache.k[1].data_ptr(), cache.v[1].data_ptr())
    shared = make(5, num_layers=1)
    assert shared.layer(1)[0].data_ptr() == shared.layer(0)[0].data_ptr()


def test_step_metadata():
    cache = make()
    first, second = cache.add(), cache.add()
    step = cache.append([first, second], [17, 2])
    assert step.block_table.tolist() == [[0, 1], [2, 0]]
    assert step.slot_mapping.tolist() == [*range(17), 32, 33]
    assert step.cu_seqlens_q.tolist() == [0, 17, 19]
    assert step.cache_seqlens.tolist() == [17, 2]
    assert (step.max_seqlen_q, step.max_seqlen_k, step.is_decode) == (17, 17, False)
    assert step.slot_mapping.dtype == torch.int64
    for tensor in (step.block_table, step.cu_seqlens_q, step.cache_seqlens):
        assert tensor.dtype == torch.int32
        assert tensor.data_ptr() % 16 == 0
        assert tensor.is_contiguous()

    # In another order, one across a page edge and one inside a page.
    step = cache.append([second, first], [15, 1])
    assert step.block_table.tolist() == [[2, 3], [0, 1]]
    assert step.slot_mapping.tolist() == [*range(34, 49), 17]
    assert step.cache_seqlens.tolist() == [17, 18]
    assert not step.is_decode

    step = cache.append([first, second], [1, 1])
    assert step.is_decode
    assert step.slot_mapping.tolist() == [18, 49]
    assert (cache.num_tokens(first), cache.num_tokens(second)) == (19, 18)


def test_a_prompt_of_one_token_is_a_decode_step():
    step = (cache := make()).append([cache.add()], [1])
    assert step.is_decode
    assert step.cache_seqlens.tolist() == [1]


def test_pages_grow_and_come_back():
    cache = make(4)
    first, second = cache.add(), cache.add()
    assert [cache.pages_needed(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    cache.append([first], [16])
    assert cache.num_free_pages == 3
    cache.append([first, second], [1, 20])
    assert cache.num_free_pages == 0
    cache.free(first)
    assert cache.num_free_pages == 2
    third = cache.add()
    assert third not in (first, second)
    step = cache.append([third, second], [32, 12])
    table = step.block_table.tolist()
    assert sorted(table[0] + table[1]) == [0, 1, 2, 3]
    cache.free(second)
    cache.free(third)
    assert cache.num_free_pages == 4


def test_pages_for_all_tokens_from_the_start():
    cache = make(4)
    handle = cache.add(33)
    assert cache.num_free_pages == 1
    assert (cache.pages(handle).tolist(), cache.pages(handle).dtype) == ([0, 1, 2], np.int32)
    step = cache.append([handle], [16])
    assert (step.max_seqlen_k, step.block_table.tolist()) == (16, [[0, 1, 2]])
    other = cache.add(1)
    with pytest.raises(RuntimeError, match="must have 1 free pages of 16 tokens for 5 new tokens"):
        cache.add(5)
    assert len(cache._sequences) == 2
    cache.free(handle)
    assert cache.num_free_pages == 3
    assert cache.pages(other).tolist() == [3]


def test_advance_counts_what_the_device_stores():
    cache = make(4)
    first, second = cache.add(32), cache.add(16)
    cache.append([first, second], [3, 15])
    assert cache.advance([first, second]) == 16
    assert [cache.num_tokens(h) for h in (first, second)] == [4, 16]
    assert cache.advance([first]) == 5
    message = f"sequence {second} must own pages for another token, got room for 16"
    with pytest.raises(RuntimeError, match=message):
        cache.advance([first, second])
    assert [cache.num_tokens(h) for h in (first, second)] == [5, 16]
    assert cache.append([first], [1]).slot_mapping.tolist() == [5]


def test_num_bytes():
    assert make(5).num_bytes == 2 * 2 * 5 * 16 * 2 * 128 * 4


def test_out_of_pages_changes_nothing():
    cache = make(3)
    first, second = cache.add(), cache.add()
    cache.append([first], [16])
    before = state(cache)
    message = "must have 3 free pages of 16 tokens for 18 new tokens, got 2 free of 3"
    with pytest.raises(RuntimeError, match=message):
        cache.append([first, second], [1, 17])
    assert state(cache) == before
    assert cache.append([first, second], [1, 16]).block_table.tolist() == [[0, 1], [2, 0]]


@pytest.mark.parametrize(
    ("handles", "new_tokens", "message"),
    [
        ([], [], r"handles must be distinct and not empty, got \[\]"),
        ([0, 0], [1, 1], r"handles must be distinct and not empty, got \[0, 0\]"),
        ([0], [0], r"new_tokens must hold 1 positive counts, got \[0\]"),
        ([0, 1], [1], r"new_tokens must hold 2 positive counts, got \[1\]"),
        ([0, 7], [1, 1], "handle must be of a sequence in the cache, got 7"),
    ],
    ids=["none", "doubled", "no tokens", "counts missing", "unknown"],
)
def test_step_errors(handles, new_tokens, message):
    cache = make()
    assert [cache.add(), cache.add()] == [0, 1]
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        cache.append(handles, new_tokens)
    assert state(cache) == before


def test_freed_handles_are_gone():
    cache = make()
    handle = cache.add()
    cache.free(handle)
    uses = (cache.free, cache.num_tokens, cache.pages)
    for use in (*uses, lambda h: cache.append([h], [1]), lambda h: cache.advance([h])):
        with pytest.raises(ValueError, match=f"a sequence in the cache, got {handle}"):
            use(handle)


def fill(cache, name, *, shared=(), end=True):
    """A sequence of a page for each letter; ``end``: freed, its pages can be found."""
    handle = cache.add(16 * len(name), shared)
    if len(name) > len(shared):
        cache.append([handle], [16 * (len(name) - len(shared))])
    pages = cache.pages(handle).tolist()
    if end:
        cache.free(handle, name.__getitem__)
    check(cache)
    return pages if end else (handle, pages)


def test_pages_are_found_by_all_that_comes_before():
    cache = make(8)
    first = fill(cache, "abc")
    assert cache.find("abc") == (first, None)
    assert cache.find("abd") == (first[:2], (first[1], "d"))
    assert cache.find("bc") == ([], (-1, "b"))
    assert cache.find("") == ([], None)
    assert cache.num_free_pages == 8
    second = fill(cache, "abd", shared=first[:2])
    assert second[:2] == first[:2]
    assert cache.find("abd")[0] == second
    assert cache.find("abc")[0] == first


def test_only_full_pages_are_found():
    cache = make(4)
    handle = cache.add(40)
    cache.append([handle], [31])
    cache.publish(handle, "ab".__getitem__)
    assert cache.find("ab")[0] == [0]
    cache.append([handle], [1])
    cache.free(handle, "ab".__getitem__)
    assert cache.find("abc") == ([0, 1], (1, "c"))
    check(cache)


def test_the_least_recently_used_pages_go_first_and_the_last_of_a_sequence_before_others():
    cache = make(6)
    fill(cache, "abc")
    fill(cache, "xyz")
    fill(cache, "a", shared=cache.find("a")[0])  # used again
    fill(cache, "n")
    assert [len(cache.find(name)[0]) for name in ("abc", "xyz")] == [2, 3]
    fill(cache, "mm")
    assert [len(cache.find(name)[0]) for name in ("abc", "xyz")] == [1, 2]


def test_pages_in_use_stay():
    cache = make(4)
    fill(cache, "ab")
    handle, pages = fill(cache, "abc", shared=cache.find("ab")[0], end=False)
    assert cache.num_free_pages == 1
    assert cache.has_room(16)
    assert not cache.has_room(17)
    with pytest.raises(RuntimeError, match="must have 2 free pages of 16 tokens for 32 new tokens"):
        cache.add(32)
    fill(cache, "x")
    assert cache.find("ab")[0] == pages[:2]
    cache.free(handle)
    assert cache.find("abc")[0] == pages[:2], "the third was never to be found"
    check(cache)


def test_shared_pages_count_as_room_only_once():
    """The pages that a sequence shares cannot be evicted for its other ones."""
    cache = make(3)
    pages = fill(cache, "abc")
    assert cache.has_room(48, pages)
    assert cache.has_room(48, pages[:1])
    assert not cache.has_room(64, pages)
    with pytest.raises(RuntimeError, match="must have 1 free pages"):
        cache.add(64, pages)
    check(cache)
    assert cache.find("abc")[0] == pages


def test_equal_pages_written_twice():
    """The second is not found, and what comes after it is found behind the first."""
    cache = make(8)
    first, _ = fill(cache, "abc", end=False)
    second, pages = fill(cache, "abd", end=False)
    for handle, name in ((first, "abc"), (second, "abd")):
        cache.publish(handle, name.__getitem__)
        check(cache)
    assert cache.find("abd") == ([0, 1], (1, "d"))
    cache.free(second, "abd".__getitem__)
    check(cache)
    assert cache.find("abd")[0] == [0, 1, pages[2]]
    cache.free(first, "abc".__getitem__)
    check(cache)
    assert cache.find("abc")[0] == [0, 1, 2]


def test_a_page_is_not_older_than_those_found_behind_it():
    """The equal page of a sequence that ended earlier counts as used again."""
    cache = make(6)
    first, _ = fill(cache, "abc", end=False)
    second, pages = fill(cache, "abd", end=False)
    cache.free(first, "abc".__getitem__)
    cache.free(second, "abd".__getitem__)
    check(cache)
    fill(cache, "xyz")
    assert cache.find("abd")[0] == [0, 1, pages[2]]
    assert cache.find("abc")[0] == [0, 1]


def test_forgetting_and_starting_over():
    cache = make(8)
    fill(cache, "ab")
    handle, pages = fill(cache, "abc", shared=cache.find("ab")[0], end=False)
    cache.forget()
    check(cache)
    assert cache.find("abc")[0] == []
    cache.free(handle, "abc".__getitem__)
    assert cache.find("abc")[0] == pages
    fill(cache, "x", end=False)
    cache.reset()
    check(cache)
    assert (cache.num_free_pages, cache.find("abc")[0]) == (8, [])


class Mirror(RuleBasedStateMachine):
    """Sequences come and go at random; what is found is what was written there."""

    def __init__(self):
        super().__init__()
        self.cache, self.live = make(7), {}
        self.written = {}  # page to all that it and the pages before it hold

    @rule(name=st.text("ab", min_size=1, max_size=5), answer=st.integers(0, 15))
    def add(self, name, answer):
        pages, _ = self.cache.find(name)
        assert [self.written[page] for page in pages] == [name[: k + 1] for k in range(len(pages))]
        new = 16 * len(name) + answer
        if not self.cache.has_room(new, pages):
            return
        handle = self.cache.add(new, pages)
        if new > 16 * len(pages):
            self.cache.append([handle], [new - 16 * len(pages)])
        for k, page in enumerate(self.cache.pages(handle).tolist()):
            if k >= len(pages):
                self.written[page] = name[: k + 1] if k < len(name) else None
        self.live[handle] = name

    @rule(data=st.data(), how=st.sampled_from(["publish", "free", "drop"]))
    def end(self, data, how):
        if not self.live:
            return
        handle = data.draw(st.sampled_from(sorted(self.live)))
        name = self.live[handle]
        if how == "publish":
            self.cache.publish(handle, name.__getitem__)
            return
        self.cache.free(handle, name.__getitem__ if how == "free" else None)
        del self.live[handle]

    @rule()
    def forget(self):
        self.cache.forget()

    @invariant()
    def adds_up(self):
        check(self.cache)


Mirror.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestMirror = Mirror.TestCase


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 0}, "num_pages must be positive, got 0"),
        ({"page_size": 8}, "page_size must be a positive multiple of 16, got 8"),
        ({"page_size": 0}, "page_size must be a positive multiple of 16, got 0"),
        ({"num_layers": 3}, "num_layers must be None, 1 or 2, got 3"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
