"""paged_prefill_attention against a naive one that walks over tokens, the unused poisoned."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels import _attention
from tests.compare import assert_close, assert_same
from tests.kernels.paged import (
    Cache,
    check_longer_maxima,
    check_lse,
    check_shared_contents,
    check_shared_errors,
    merged,
    naive,
)
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def prefill(q, lens_q, cache, **keywords):
    cu = torch.tensor([0, *lens_q]).cumsum(0).to(device=q.device, dtype=torch.int32)
    return kk.paged_prefill_attention(
        q,
        cache.k,
        cache.v,
        cache.table,
        cu,
        cache.lengths,
        max(lens_q, default=0),
        cache.max_seqlen,
        **keywords,
    )


PREFILL = {
    # new tokens, cached tokens with them, page_size, heads, kv_heads, head_dim
    "one token": ([1], [1], 16, 1, 1, 8),
    "prompts": ([20, 16], [20, 16], 16, 2, 2, 32),
    "chunk and reused prefix": ([7, 1], [39, 17], 16, 4, 2, 24),
    "decoder": ([5, 0, 2], [5, 33, 40], 32, 4, 1, 128),  # the second has nothing new
    "past two tiles": ([70], [135], 64, 2, 1, 72),  # a page is a tile of keys
    "pages across tiles": ([3], [100], 48, 1, 1, 80),
    "widest head": ([3], [70], 16, 1, 1, 256),
}


@by_dtype
@pytest.mark.parametrize("case", PREFILL)
def test_matches_naive(case, dtype, device):
    lens_q, lengths, page_size, heads, kv_heads, head_dim = PREFILL[case]
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, device)
    q = torch.randn(sum(lens_q), heads, head_dim, device=device).mul_(1.5).to(dtype)
    scale = head_dim**-0.5
    got, lse = prefill(q, lens_q, cache, return_lse=True)
    assert got.is_contiguous()
    check_lse((got, lse), q, lens_q, cache, scale)
    plain = naive(q, lens_q, cache, scale, dtype)
    assert_close(got, plain, naive(q, lens_q, cache, scale, torch.float64))
    if dtype != torch.float32:  # the same again, from a table without a column to spare
        cache.table = cache.table[:, : -(-max(lengths) // page_size)].clone()
        assert torch.equal(prefill(q, lens_q, cache), got)


def test_chunks_equal_one_prefill(device):
    cache = Cache([29], 16, 2, 32, torch.float32, device)
    q = torch.randn(29, 4, 32, device=device)
    whole = prefill(q, [29], cache)
    for start, stop in ((0, 11), (11, 28), (28, 29)):
        cache.lengths.fill_(stop)
        chunk = prefill(q[start:stop], [stop - start], cache)
        torch.testing.assert_close(chunk, whole[start:stop], rtol=1e-5, atol=1e-6)


@pytest.fixture(params=[2, 3, 40], ids=lambda count: f"{count}-pieces")
def pieces(request, monkeypatch, backend):
    """Split all launches into so many pieces; 40 are more than there are tiles of keys."""
    if backend != "triton":
        pytest.skip("has no pieces")
    monkeypatch.setattr(_attention, "choose_num_pieces", lambda *_: request.param)
    return request.param


SPLIT = {
    "few of many": ([5, 0, 1], [300, 33, 1], 4, 2, 128),
    "two tiles of queries": ([70, 2], [200, 65], 2, 1, 72),  # the first tile does not see the end
    "no key seen by some pieces": ([3], [66], 1, 1, 80),
}


@by_dtype
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("case", SPLIT)
@pytest.mark.usefixtures("pieces")
def test_pieces_add_up(case, page_size, dtype, device):
    lens_q, lengths, heads, kv_heads, head_dim = SPLIT[case]
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, device)
    q = torch.randn(sum(lens_q), heads, head_dim, device=device).mul_(1.5).to(dtype)
    scale = head_dim**-0.5
    got, lse = prefill(q, lens_q, cache, return_lse=True)
    check_lse((got, lse), q, lens_q, cache, scale)
    plain = naive(q, lens_q, cache, scale, dtype)
    assert_close(got, plain, naive(q, lens_q, cache, scale, torch.float64))
    assert torch.equal(prefill(q, lens_q, cache), got)
    # The last queries alone, as another chunk: where pieces begin follows from the keys.
    first = sum(lens_q[:-1])
    cache.table, cache.lengths = cache.table[-1:], cache.lengths[-1:]
    assert torch.equal(prefill(q[first:], lens_q[-1:], cache), got[first:])


@pytest.mark.usefixtures("pieces")
def test_chunks_in_pieces_equal_one_prefill(device, monkeypatch):
    cache = Cache([150], 16, 2, 32, torch.float32, device)
    q = torch.randn(150, 4, 32, device=device)
    with monkeypatch.context() as whole_sequences:
        whole_sequences.setattr(_attention, "choose_num_pieces", lambda *_: 1)
        whole = prefill(q, [150], cache)
    for start, stop in ((0, 70), (70, 149), (149, 150)):
        cache.lengths.fill_(stop)
        chunk = prefill(q[start:stop], [stop - start], cache)
        torch.testing.assert_close(chunk, whole[start:stop], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("pieces")
def test_pieces_of_large_scores_do_not_overflow(device):
    cache = Cache([200], 16, 1, 16, torch.float16, device)
    q = torch.randn(3, 1, 16, device=device).mul_(3000).half()
    got, lse = prefill(q, [3], cache, return_lse=True)
    exact = naive(q, [3], cache, 0.25, torch.float64)
    assert_close(got, naive(q, [3], cache, 0.25, torch.float16), exact)
    assert lse.isfinite().all()


@pytest.mark.usefixtures("pieces")
def test_pieces_without_a_visible_key(device):
    cache = Cache([2], 16, 1, 16, torch.float32, device)
    out, lse = prefill(torch.randn(5, 2, 16, device=device), [5], cache, return_lse=True)
    assert (out[:3] == 0).all()
    assert (lse[:, :3] == float("-inf")).all()
    assert lse[:, 3:].isfinite().all()


@pytest.mark.usefixtures("pieces")
def test_opcheck_of_pieces(device):
    cache = Cache([70], 16, 1, 16, torch.float32, device)
    q, cu = torch.randn(2, 2, 16, device=device), torch.tensor([0, 2], dtype=torch.int32)
    arguments = (q, cache.k, cache.v, cache.table.clamp(max=0), cu.to(device), cache.lengths)
    lse = torch.empty(2, 2, device=device)
    torch.library.opcheck(
        torch.ops.keye.paged_prefill_attention.default,
        (*arguments, 2, 70, 0.25, torch.empty_like(q), lse),
    )


@pytest.mark.parametrize(
    ("num_programs", "max_seqlen_k", "block_m", "pieces"),
    [
        (32, 32768, 64, 8),  # up to 64 new tokens of 32 heads: two programs per multiprocessor
        (32, 32768, 128, 4),
        (32, 8192, 64, 4),  # one program per multiprocessor, of 2048 keys
        (32, 3000, 64, 2),
        (32, 2047, 64, 1),  # of 1024 keys or more
        (132, 4096, 64, 2),  # two, of 2048 keys or more
        (132, 4095, 64, 1),
        (133, 32768, 64, 1),  # some would run after all others
        (544, 32768, 64, 1),
        (1, 2**20, 64, 264),
    ],
)
def test_pieces_fill_the_gpu_once(num_programs, max_seqlen_k, block_m, pieces):
    chosen = _attention.choose_num_pieces(num_programs, max_seqlen_k, block_m, 132)
    assert chosen == pieces


@pytest.mark.skipif(torch.cuda.is_available(), reason="assumes 132 multiprocessors")
def test_few_new_tokens_of_a_long_cache_are_split(device, backend, monkeypatch):
    if backend != "triton":
        pytest.skip("has no pieces")
    combined, combine = [], _attention.combine
    monkeypatch.setattr(
        _attention, "combine", lambda sums, *rest: (combined.append(sums), combine(sums, *rest))
    )
    cache = Cache([2100, 7], 16, 1, 16, torch.float16, device)
    q = torch.randn(4, 2, 16, device=device).half()
    got = prefill(q, [3, 1], cache)
    assert [tuple(sums.shape) for sums in combined] == [(4, 2, 2, 16)]
    exact = naive(q, [3, 1], cache, 0.25, torch.float64)
    assert_close(got, naive(q, [3, 1], cache, 0.25, torch.float16), exact)


@pytest.mark.parametrize("num_sms", [1, 132], indirect=True)
@pytest.mark.usefixtures("num_sms")
def test_a_sequence_does_not_depend_on_its_neighbours(device, backend):
    """Bit by bit, also where the batch is so large that programs take twice as many queries."""
    if backend == "reference":
        pytest.skip("the reference promises it within rounding only")
    cache = Cache([130, 20], 16, 1, 72, torch.bfloat16, device)
    q = torch.randn(75, 2, 72, device=device).bfloat16()
    together = prefill(q, [70, 5], cache)
    cache.table, cache.lengths = cache.table[1:], cache.lengths[1:]
    assert torch.equal(prefill(q[70:], [5], cache), together[70:])


def check_far_apart(caches, table, lengths, backend):
    """Against the same numbers side by side: one new query of each sequence."""
    device, batch_size, head_dim = table.device, len(lengths), caches[0].shape[3]
    q = torch.randn(batch_size, 1, head_dim, device=device).half()
    cu_q = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def attend(k_cache, v_cache, table):
        return kk.paged_prefill_attention(
            q, k_cache, v_cache, table, cu_q, lengths, 1, int(lengths.max())
        )

    got = attend(*caches, table)
    expected = attend(*(cache.contiguous() for cache in caches), table.contiguous())
    assert expected.isfinite().all()
    assert_same(got, expected, backend)


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_past_2_to_the_31_elements(page_size, device, backend):
    """Page 2 of a cache starts there, and so does the table of sequence 2."""
    caches = [far_apart((3, page_size, 1, 8), torch.float16, device).normal_() for _ in "kv"]
    table = far_apart((3, 2), torch.int32, device)
    table.copy_(torch.tensor([[0, 2], [1, 1], [2, 0]]))
    check_far_apart(caches, table, [20, 1, 20], backend)


# Offsets are counted in elements, or in units of 8 where that divides all strides.
@pytest.mark.parametrize("padding", [0, 1], ids=["in units of 8", "in elements"])
# The pages of a tile are looked up one by one, or it lies within a page.
@pytest.mark.parametrize(("page_size", "row"), [(16, 15), (128, 64)], ids=["page 16", "page 128"])
def test_rows_of_a_page_past_2_to_the_31_elements(page_size, row, padding, device, backend):
    shape = (page_size, 3, 1, 16 + padding)
    caches = [far_apart(shape, torch.float16, device, row=row)[..., :16] for _ in "kv"]
    caches = [cache.transpose(0, 1) for cache in caches]
    for cache in caches:
        cache.normal_()
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    check_far_apart(caches, table, [page_size + 9], backend)


def test_strides_scale_and_out(device, backend):
    cache = Cache([20, 9], 16, 2, 32, torch.bfloat16, device)
    q = torch.randn(5, 6, 32, device=device).bfloat16()
    expected = prefill(q[:, 1:5].contiguous(), [3, 2], cache, softmax_scale=0.3)
    pair = torch.stack((cache.k, cache.v), dim=1)
    cache.k, cache.v = pair[:, 0], pair[:, 1]
    target = torch.full((5, 6, 32), 7.0, device=device).bfloat16()
    out = target[:, 1:5]
    assert prefill(q[:, 1:5], [3, 2], cache, softmax_scale=0.3, out=out) is out
    assert_same(out, expected, backend)
    assert (target[:, [0, 5]] == 7).all()


def test_longer_maxima_are_allowed(device):
    def call(q, cache, **keywords):
        starts = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device)
        tensors = (q, cache.k, cache.v, cache.table, starts, cache.lengths)
        return kk.paged_prefill_attention(*tensors, cache.max_seqlen, cache.max_seqlen, **keywords)

    check_longer_maxima(call, device)


@by_dtype
def test_parts_of_a_cache_add_up_by_their_lse(dtype, device):
    """The pages of earlier tokens by decode, those of the new ones causally."""
    cache = Cache([40, 16], 16, 2, 32, dtype, device)
    q = torch.randn(9, 4, 32, device=device).to(dtype)
    scale = 32**-0.5
    whole, lse = prefill(q, [8, 1], cache, return_lse=True)
    row = torch.tensor([0] * 8 + [1], device=device)
    earlier = kk.paged_decode_attention(
        q, cache.k, cache.v, cache.table[row], torch.tensor([32] * 8 + [0]).int().to(device),
        max_seqlen_k=32, return_lse=True,
    )  # fmt: skip
    table, lengths = cache.table.clone(), cache.lengths.clone()
    cache.table[0] = cache.table[0].roll(-2)
    cache.lengths[0] = 8
    later = prefill(q, [8, 1], cache, return_lse=True)
    torch.testing.assert_close(torch.logaddexp(earlier[1], later[1]), lse, rtol=1e-5, atol=1e-5)
    cache.table, cache.lengths = table, lengths
    got = merged([earlier, later]).to(dtype)
    exact = naive(q, [8, 1], cache, scale, torch.float64)
    assert_close(got, naive(q, [8, 1], cache, scale, dtype), exact)
    assert whole.shape == got.shape


def test_a_query_without_a_visible_key(backend, device):
    """On a GPU nobody looks at lengths; queries before the first key are as in DESIGN."""
    if backend == "reference":
        pytest.skip("the definition refuses such lengths")
    cache = Cache([2], 16, 1, 16, torch.float32, device)
    out, lse = prefill(torch.randn(5, 2, 16, device=device), [5], cache, return_lse=True)
    assert (out[:3] == 0).all()
    assert (lse[:, :3] == float("-inf")).all()
    assert lse[:, 3:].isfinite().all()


def test_no_tokens(device):
    cache = Cache([3], 16, 1, 8, torch.float32, device)
    q = torch.empty(0, 1, 8, device=device)
    assert prefill(q, [0], cache).shape == (0, 1, 8)
    out, lse = prefill(q, [0], cache, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 1, 8), (1, 0))


def test_errors(device):
    check_shared_errors(lambda q, cache, **k: prefill(q, [len(q)], cache, **k), device)
    cache = Cache([20], 16, 2, 32, torch.float32, device)
    q = torch.randn(1, 4, 32, device=device)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must have shape \(2,\), got \(3,\)"):
        prefill(q, [1, 0], cache)
    with pytest.raises(ValueError, match="max_seqlen_q must be a non-negative int, got -1"):
        prefill(q, [-1], cache)


def test_contents_are_checked_on_a_cpu(backend):
    if backend == "triton":
        pytest.skip("a kernel does not read contents to check them")
    check_shared_contents(lambda q, cache: prefill(q, [1], cache))
    cache = Cache([20], 16, 1, 8, torch.float32, "cpu")
    cache.lengths = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_seqlens must count the 3 new tokens of sequence 0"):
        prefill(torch.randn(3, 1, 8), [3], cache)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0 and end at 3 tokens, got 0"):
        prefill(torch.randn(3, 1, 8), [2], cache)
