"""paged_decode_attention against a naive one that walks over tokens, the unused poisoned."""

import sys

import pytest
import torch

import keye_kernels as kk
from keye_kernels.paged_decode_attention import LaunchConfig, launch_config
from testing import triton_interpreter
from tests.compare import assert_close, assert_same
from tests.kernels.paged import (
    HUGE,
    Cache,
    check_longer_maxima,
    check_lse,
    check_shared_contents,
    check_shared_errors,
    merged,
    naive,
)
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend", "num_sms")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def tiles(monkeypatch):
    """Give every launch these tiles: ``tiles(num_splits=3)``."""

    def fix(num_splits, heads=16, keys=16):
        module = sys.modules["keye_kernels.paged_decode_attention"]  # the package's name is the op
        monkeypatch.setattr(
            module, "launch_config", lambda *_: LaunchConfig(num_splits, heads, keys)
        )

    return fix


def decode(q, cache, **keywords):
    keywords = {"max_seqlen_k": cache.max_seqlen} | keywords
    return kk.paged_decode_attention(q, cache.k, cache.v, cache.table, cache.lengths, **keywords)


def queries(batch, heads, head_dim, dtype, device):
    return torch.randn(batch, heads, head_dim, device=device).mul_(1.5).to(dtype)


def check(got, q, cache):
    """Against fp64, by what the naive one loses in the dtype of ``q``."""
    ones, scale = [1] * len(q), q.shape[2] ** -0.5
    plain, exact = (naive(q, ones, cache, scale, dtype) for dtype in (q.dtype, torch.float64))
    assert_close(got, plain, exact)
    for row, (k, _) in zip(got, cache.sequences, strict=True):
        if len(k) == 0:
            assert (row == 0).all()


DECODE = {
    # cached tokens, page_size, heads, kv_heads, head_dim
    "one token": ([1], 16, 1, 1, 8),
    "page edges": ([15, 16, 17, 33], 16, 4, 2, 64),
    "padding row": ([5, 0, 48], 48, 8, 1, 128),
    "every head its own": ([40, 7], 32, 3, 3, 72),
    "tile edges": ([63, 64, 65, 129], 64, 4, 1, 80),
    "long and short": ([1, 0, 230, 65], 64, 4, 1, 128),
    "wide heads": ([33, 31], 16, 2, 1, 256),
    "more heads than a tile": ([20], 16, 70, 1, 16),
}


# Three multiprocessors get one piece per sequence in some cases, a few in others.
@by_dtype
@pytest.mark.parametrize("num_sms", [3], indirect=True)
@pytest.mark.parametrize("case", DECODE)
def test_matches_naive(case, dtype, device):
    lengths, page_size, heads, kv_heads, head_dim = DECODE[case]
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, device)
    q = queries(len(lengths), heads, head_dim, dtype, device)
    got, lse = decode(q, cache, return_lse=True)
    assert got.is_contiguous()
    check(got, q, cache)
    check_lse((got, lse), q, [1] * len(q), cache, head_dim**-0.5)
    # The same again, from a table without a column to spare.
    cache.table = cache.table[:, : -(-max(lengths) // page_size)].clone()
    assert torch.equal(decode(q, cache), got)


@pytest.mark.parametrize(
    ("num_splits", "dtype"),
    [(1, torch.bfloat16), (2, torch.float16), (7, torch.float32), (33, torch.bfloat16)],
    ids=str,
)
def test_pieces_agree(num_splits, dtype, tiles, backend, device):
    """33 pieces: more than some have tiles, and than the second launch adds up at once."""
    if backend == "reference":
        pytest.skip("has no pieces")
    tiles(num_splits)
    cache = Cache([20, 530], 48, 1, 16, dtype, device)
    q = queries(2, 3, 16, dtype, device)
    page, row = divmod(529, 48)  # the largest score of the first head comes last
    cache.k[cache.table[1, page], row, 0] = cache.sequences[1][0][529, 0] = q[1, 0]
    got = decode(q, cache, return_lse=True)
    check(got[0], q, cache)
    check_lse(got, q, [1, 1], cache, 0.25)


@by_dtype
@pytest.mark.parametrize("num_splits", [1, 2])
def test_parts_of_a_cache_add_up_by_their_lse(num_splits, dtype, tiles, device):
    """As when a prefix shared by many requests is attended to once, or is on another GPU."""
    tiles(num_splits)
    cache = Cache([50, 16, 0, 90], 16, 2, 32, dtype, device)
    q = queries(4, 4, 32, dtype, device)
    _, lse = decode(q, cache, return_lse=True)
    table, lengths = cache.table, cache.lengths
    parts = []
    for first, count in ((0, 2), (2, 4)):  # pages
        cache.table = table[:, first : first + count].contiguous()
        cache.lengths = (lengths - 16 * first).clamp(0, 16 * count)
        parts.append(decode(q, cache, return_lse=True))
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse, rtol=1e-5, atol=1e-5)
    check(merged(parts).to(dtype), q, cache)


def test_longer_maxima_are_allowed(device):
    check_longer_maxima(decode, device)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_neighbours_do_not_matter(num_splits, tiles, device, backend):
    tiles(num_splits)
    cache = Cache([17, 0, 60], 16, 1, 32, torch.bfloat16, device)
    q = queries(3, 3, 32, torch.bfloat16, device)
    together = decode(q, cache)
    tables, lengths = cache.table, cache.lengths
    for row in range(3):
        cache.table, cache.lengths = tables[row : row + 1], lengths[row : row + 1]
        assert_same(decode(q[row : row + 1], cache)[0], together[row], backend)


def replayed(call, device):
    """What repeats ``call`` for new contents of its tensors: a captured graph on a GPU."""
    if device.type != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def test_lengths_and_pages_change_in_place(tiles, device):
    """One launch, made for 130 tokens, serves every length up to there."""
    tiles(num_splits=3, keys=32)
    cache = Cache([130, 130], 16, 1, 16, torch.float16, device)
    q = queries(2, 2, 16, torch.float16, device)
    step = replayed(lambda: decode(q, cache), device)
    whole, pages = cache.sequences, cache.table.clone()
    for lengths in ([1, 130], [32, 65], [0, 33]):
        cache.lengths.copy_(torch.tensor(lengths))
        cache.table.fill_(HUGE)
        for row, length in enumerate(lengths):
            used = -(-length // 16)
            cache.table[row, :used] = pages[row, :used]
        cache.sequences = [(k[:n], v[:n]) for (k, v), n in zip(whole, lengths, strict=True)]
        check(step(), q, cache)


def test_a_length_out_of_range_reads_nothing_out_of_range(backend, device):
    """The definition refuses such lengths on a CPU; on a GPU nobody looks at them."""
    if backend == "reference":
        pytest.skip("the definition refuses them, as test_contents_are_checked_on_a_cpu shows")
    cache = Cache([48, 48], 16, 1, 16, torch.float32, device)
    cache.table = cache.table[:, :3].contiguous()
    q = queries(2, 2, 16, torch.float32, device)
    expected = decode(q, cache)
    cache.lengths.copy_(torch.tensor([2**31 - 1, -100]))
    got = decode(q, cache)
    assert torch.equal(got[0], expected[0])
    assert (got[1] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_offsets_past_2_to_the_31(num_splits, tiles, device, backend):
    """Pages, rows in a page, queries and results, each further apart than int32 can say."""
    tiles(num_splits)
    shape = (3, 16, 1, 16)
    k_cache = far_apart(shape, torch.bfloat16, device)
    rows = far_apart((16, 3, 1, 16), torch.bfloat16, device)
    v_cache = rows.transpose(0, 1)
    k_cache.normal_(), v_cache.normal_()
    q, out = (far_apart((3, 4, 16), torch.bfloat16, device) for _ in range(2))
    q.normal_()
    table = torch.tensor([[0, 1, 2], [2, 0, 1], [2, 1, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([5, 48, 33], dtype=torch.int32, device=device)
    arguments = (q, k_cache, v_cache, table, lengths)
    kk.paged_decode_attention(*arguments, max_seqlen_k=48, out=out)
    near = [x.contiguous() for x in arguments]  # the same numbers, so the same bits
    assert_same(out, kk.paged_decode_attention(*near, max_seqlen_k=48), backend)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_heads_past_2_to_the_31(num_splits, tiles, device, backend):
    tiles(num_splits)
    q, out = (far_apart((3, 2, 16), torch.bfloat16, device).transpose(0, 1) for _ in range(2))
    caches = [far_apart((3, 3, 16, 16), torch.bfloat16, device) for _ in "kv"]
    caches = [cache.permute(1, 2, 0, 3) for cache in caches]
    for x in (q, *caches):
        x.normal_()
    table = torch.tensor([[0, 1, 2], [2, 0, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([5, 33], dtype=torch.int32, device=device)
    arguments = (q, *caches, table, lengths)
    kk.paged_decode_attention(*arguments, max_seqlen_k=48, out=out)
    near = [x.contiguous() for x in arguments]
    assert_same(out, kk.paged_decode_attention(*near, max_seqlen_k=48), backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_each_key_is_read_once(tiles, backend):
    """Whatever the group; and of a page nothing past the length."""
    if backend == "reference":
        pytest.skip("launches nothing to count")
    tiles(num_splits=2)
    cache = Cache([37], 16, 2, 32, torch.float16, torch.device("cpu"))
    q = queries(1, 16, 32, torch.float16, "cpu")
    with triton_interpreter.traffic() as moved:
        decode(q, cache)
    keys_and_values = 2 * 37 * 2 * 32 * 2
    pieces = 2 * 16 * (32 + 2) * 4
    entries = 2 * 3 * 4  # of each head
    lengths = (2 * 2 + 16) * 4  # in each program
    assert moved.loaded == keys_and_values + pieces + 2 * q.nbytes + entries + lengths
    assert moved.stored == pieces + q.nbytes


@pytest.mark.parametrize(
    ("batch", "max_seqlen_k", "num_splits"),
    [
        (1, 0, 1), (1, 64, 1), (1, 1024, 16), (1, 4096, 32), (1, 32768, 32), (1, 131072, 64),
        (8, 1024, 4), (8, 16384, 8), (8, 131072, 33), (64, 1024, 1), (64, 4096, 2), (64, 131072, 4),
    ],
)  # fmt: skip
def test_launches_fill_the_gpu(batch, max_seqlen_k, num_splits):
    config = launch_config(batch, 4, 8, 128, 2, max_seqlen_k, 132)
    assert config == LaunchConfig(num_splits, 16, 64)


@pytest.mark.parametrize(
    ("group", "block", "itemsize", "heads", "keys"),
    [(1, 128, 2, 16, 64), (8, 64, 2, 16, 64), (20, 256, 2, 32, 32), (128, 128, 2, 64, 64),
     (64, 256, 2, 32, 32), (4, 128, 4, 16, 16), (64, 256, 4, 16, 16)],
)  # fmt: skip
def test_tiles_by_group_and_width(group, block, itemsize, heads, keys):
    config = launch_config(1, group, 2, block, itemsize, 1, 132)
    assert config == LaunchConfig(1, heads, keys)


def test_equals_prefill_of_one_token(device):
    cache = Cache([21, 40], 16, 2, 32, torch.float32, device)
    q = torch.randn(2, 4, 32, device=device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    with kk.use_backend("reference"):
        prefilled = kk.paged_prefill_attention(
            q, cache.k, cache.v, cache.table, starts, cache.lengths, 1, cache.max_seqlen
        )
    torch.testing.assert_close(decode(q, cache), prefilled, rtol=1e-5, atol=1e-6)


def test_shared_pages(device, backend):
    """Two sequences with one prefix may name the same pages."""
    cache = Cache([16, 16], 16, 1, 16, torch.float32, device)
    cache.table[1] = cache.table[0]
    q = torch.randn(1, 2, 16, device=device).expand(2, 2, 16).contiguous()
    got = decode(q, cache)
    assert_same(got[0], got[1], backend)


def test_strides_scale_and_out(device, backend):
    cache = Cache([20, 9], 16, 2, 32, torch.bfloat16, device)
    q = torch.randn(2, 6, 32, device=device).bfloat16()
    expected = decode(q[:, 1:5].contiguous(), cache, softmax_scale=0.3)
    pair = torch.stack((cache.k, cache.v), dim=1)
    cache.k, cache.v = pair[:, 0], pair[:, 1]
    target = torch.full((2, 6, 32), 7.0, device=device).bfloat16()
    out = target[:, 1:5]
    assert decode(q[:, 1:5], cache, softmax_scale=0.3, out=out) is out
    assert_same(out, expected, backend)
    assert (target[:, [0, 5]] == 7).all()


def test_no_tokens(device):
    q = torch.empty(0, 1, 8, device=device)
    empty = Cache([], 16, 1, 8, torch.float32, device)
    assert decode(q, empty).shape == (0, 1, 8)
    out, lse = decode(q, empty, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 1, 8), (1, 0))


def test_errors(device):
    check_shared_errors(decode, device)
    cache = Cache([20], 16, 2, 32, torch.float32, device)
    q = torch.randn(2, 4, 32, device=device)
    message = r"q must have one row per row of block_table \(1\), got 2"
    with pytest.raises(ValueError, match=message):
        decode(q, cache)


def test_contents_are_checked_on_a_cpu(backend):
    if backend == "triton":
        pytest.skip("the definition checks")
    check_shared_contents(decode)
    cache = Cache([20], 16, 1, 8, torch.float32, "cpu")
    cache.lengths = torch.tensor([-3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens must hold values in \[0, 21\), got -3"):
        decode(torch.randn(1, 1, 8), cache)
