"""The CUDA kernel of paged_decode_attention, run by g++, with everything unused poisoned."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels._cuda import counters
from keye_kernels.paged_decode_attention import _LIMITS, _MAX_RUNS, _num_runs
from tests.compare import assert_close
from tests.kernels.paged import Cache, check_longer_maxima, check_lse, naive
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("native", "num_sms")


def decode(q, cache, **keywords):
    keywords = {"max_seqlen_k": cache.max_seqlen, **keywords}
    return kk.paged_decode_attention(q, cache.k, cache.v, cache.table, cache.lengths, **keywords)


def make(lengths, page_size, heads, kv_heads, head_dim, dtype):
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, "cpu")
    return torch.randn(len(lengths), heads, head_dim).mul_(1.5).to(dtype), cache


CASES = {
    # cached tokens, page_size, heads, kv_heads, head_dim, dtype
    "one token": ([1], 16, 4, 1, 64, torch.float16),
    "chunk and run edges": ([15, 16, 17, 63, 65, 128, 129], 16, 2, 1, 64, torch.bfloat16),
    "padding row": ([5, 0, 150], 48, 8, 2, 128, torch.bfloat16),
    "vision head_dim": ([40, 7], 32, 3, 3, 72, torch.bfloat16),
    "more heads than rows of a tile": ([70], 16, 20, 1, 80, torch.float16),
    # 33 chunks of a warp: the table is looked up twice
    "long run": ([2100] + [1] * 16, 16, 1, 1, 64, torch.bfloat16),
}


# One multiprocessor: one run per sequence or two. 132: as many as there are 64 keys.
@pytest.mark.parametrize("num_sms", [1, 132], ids=["few-runs", "many-runs"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_decode_matches_naive(case):
    q, cache = make(*CASES[case])
    ones, scale = [1] * len(q), q.shape[-1] ** -0.5
    got, lse = decode(q, cache, return_lse=True)
    assert torch.equal(decode(q, cache), got)
    check_lse((got, lse), q, ones, cache, scale)
    plain = naive(q, ones, cache, scale, q.dtype)
    assert_close(got, plain, naive(q, ones, cache, scale, torch.float64))
    for row, (k, _) in enumerate(cache.sequences):
        if len(k) == 0:
            assert (got[row] == 0).all()
    assert all((pool == 0).all() for pool in counters._slices.values())


@pytest.mark.parametrize("num_sms", [132], indirect=True)
def test_decode_does_not_depend_on_the_schedule(native):
    q, cache = make([200, 33], 16, 4, 2, 72, torch.bfloat16)
    expected = decode(q, cache)
    for schedule in native.schedules():
        with schedule:
            assert torch.equal(decode(q, cache), expected)


@pytest.mark.parametrize("num_sms", [132], indirect=True)
def test_decode_reads_lengths_at_each_launch(num_sms):
    """A captured graph keeps its arguments, while sequences grow up to the capacity."""
    lengths = [1, 64, 65, 300]
    q, cache = make([300] * 4, 16, 4, 2, 64, torch.bfloat16)
    assert _num_runs(4, 2, 1024, num_sms) == 16
    cache.table = torch.nn.functional.pad(cache.table, (0, 64), value=2**30)
    cache.lengths.copy_(torch.tensor(lengths))
    for row, length in enumerate(lengths):
        cache.sequences[row] = tuple(x[:length] for x in cache.sequences[row])
    plain, exact = (naive(q, [1] * 4, cache, 0.125, d) for d in (q.dtype, torch.float64))
    assert_close(decode(q, cache, max_seqlen_k=1024), plain, exact)


def test_decode_strides_scale_and_out():
    q, cache = make([20, 90], 16, 6, 2, 64, torch.bfloat16)
    expected = decode(q[:, 1:5].contiguous(), cache, softmax_scale=0.3)
    pair = torch.stack((cache.k, cache.v), dim=1)
    cache.k, cache.v = pair[:, 0], pair[:, 1]
    target = torch.full((2, 6, 64), 7.0).bfloat16()
    out = target[:, 1:5]
    assert decode(q[:, 1:5], cache, softmax_scale=0.3, out=out) is out
    assert torch.equal(out, expected)
    assert (target[:, [0, 5]] == 7).all()


def test_longer_maxima_are_allowed():
    check_longer_maxima(decode, "cpu", head_dim=64, dtype=torch.bfloat16)


def test_decode_rows_do_not_depend_on_their_neighbours():
    q, cache = make([80, 30, 50], 16, 4, 1, 64, torch.float16)
    expected = decode(q, cache)
    q[[0, 2]] = float("nan")
    got = decode(q, cache)
    assert torch.equal(got[1], expected[1])
    assert got[[0, 2]].isnan().all()


def test_decode_offsets_past_2_to_the_31():
    q, cache = make([40], 16, 2, 1, 64, torch.bfloat16)
    expected = decode(q, cache)
    for name in "kv":
        near = getattr(cache, name)
        far = far_apart(near.shape, near.dtype, near.device)
        far.copy_(near)
        setattr(cache, name, far)
    assert torch.equal(decode(q, cache), expected)


def test_decode_refuses_what_it_has_no_kernel_for():
    def check(message, q, cache):
        with pytest.raises(NotImplementedError, match=message):
            decode(q, cache)

    message = "dtype must be torch.bfloat16 or torch.float16, got torch.float32"
    check(message, *make([3], 16, 1, 1, 64, torch.float32))
    check("head_dim must be 64, 72, 80 or 128, got 32", *make([3], 16, 1, 1, 32, torch.float16))
    _, cache = make([3, 3], 16, 1, 1, 64, torch.float16)
    shifted = torch.zeros(2, 1, 68).half()[..., 4:]
    check("the rows of q must begin at multiples of 16 bytes, got address 0x", shifted, cache)


def test_limits_are_those_of_the_extension(native):
    assert _LIMITS.head_dims == native.module.paged_decode_attention_head_dims
    assert native.module.paged_decode_attention_max_splits == _MAX_RUNS


def test_num_runs():
    # batch 1 at 1k: 64 keys each; at 32k: two blocks per multiprocessor
    assert _num_runs(1, 8, 1024, 132) == 16
    assert _num_runs(1, 8, 32768, 132) == 33
    assert _num_runs(8, 8, 16384, 132) == 8
    assert _num_runs(64, 8, 32768, 132) == 4
    assert _num_runs(512, 8, 32768, 132) == 1
    assert _num_runs(1, 1, 10**6, 132) == 128
    assert _num_runs(1, 8, 1, 132) == 1
