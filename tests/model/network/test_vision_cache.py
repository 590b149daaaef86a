"""Features by content, within their bytes."""

import torch

from keye_model.network.vision_cache import VisionCache


def features(count):
    return torch.zeros(count, 8)  # 32 bytes each


def test_the_least_recently_used_go_first():
    cache = VisionCache(32 * 10)
    for key, count in (("a", 4), ("b", 4)):
        cache.put(key, features(count))
    assert cache.num_bytes == 32 * 8
    assert cache.get("a").shape == (4, 8)
    cache.put("c", features(3))
    assert [key for key in "abc" if cache.get(key) is not None] == ["a", "c"]
    assert cache.num_bytes == 32 * 7
    cache.put("a", features(9))
    assert cache.get("a").shape == (4, 8), "equal keys have equal features"


def test_what_is_too_large_is_not_kept():
    cache = VisionCache(100)
    cache.put("a", features(3))
    assert cache.keeps(100)
    assert not cache.keeps(101)
    cache.put("b", features(4))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.clear()
    assert (cache.get("a"), cache.num_bytes) == (None, 0)
    assert not VisionCache(0).keeps(1)
