"""sample: its filters against transformers, its noise against published vectors and statistics.

Kernels are compared with the reference token by token; so in the interpreter, where a row takes a
tenth of a second, the tests that need hundreds of draws are left to the reference.
"""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import keye_kernels as kk
from keye_kernels import _sampling, reference, sampling
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def many_rows(backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("hundreds of rows take minutes in the interpreter")


def run(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, step=0, **keywords):
    """Numbers stand for every row, lists for one row each."""
    batch, device = len(logits), logits.device

    def column(value, dtype):
        values = value if isinstance(value, list) else [value] * batch
        return torch.tensor(values, dtype=dtype, device=device)

    if "repetition_penalty" in keywords:
        penalty = column(keywords["repetition_penalty"], torch.float32)
        keywords["repetition_penalty"] = penalty
    return kk.sample(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int64),
        column(top_p, torch.float32),
        column(seed, torch.int64),
        column(step, torch.int64),
        **keywords,
    )


def support(row, draws=400, **options):
    """Tokens that come up in many draws from one row of logits."""
    tokens = run(row.expand(draws, -1), seed=list(range(draws)), **options)
    return set(tokens.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 101), (2, 5000)], ids=str)
def test_temperature_zero_is_argmax(shape, dtype, device):
    logits = torch.randn(shape, device=device).to(dtype)
    tokens = run(logits, temperature=0.0, top_k=3, top_p=0.1, seed=9)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(dim=1))


def test_greedy_takes_the_lowest_token_on_ties(device):
    logits = torch.zeros(4, 1000, device=device)
    logits[1, [700, 31, 999]] = 2.5
    logits[2, 999] = 1
    logits[3] -= 1
    logits[3, 40], logits[3, 41] = -0.0, 0.0
    assert run(logits, temperature=0.0).tolist() == [0, 31, 999, 40]


def expected_probabilities(row, temperature, top_k, top_p, seen=None, penalty=1.0):
    """Distribution left by the logits processors of transformers."""
    processors = LogitsProcessorList()
    if penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    prompt = torch.tensor([seen if seen is not None else [0]], device=row.device)
    return processors(prompt, row[None].float())[0].softmax(0)


SETTINGS = {
    "softmax": (1.0, 0, 1.0),
    "temperature": (0.6, 0, 1.0),
    "hot": (2.5, 0, 1.0),
    "top-k": (1.0, 4, 1.0),
    "top-p": (1.0, 0, 0.7),
    "all": (0.6, 6, 0.95),
}


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_follow_the_probabilities(setting, device):
    """Chi-square at fixed seeds: deterministic, and far below the 1e-4 quantile when right."""
    temperature, top_k, top_p = SETTINGS[setting]
    row = torch.tensor([2.0, 1.5, 0.1, -1.0, 0.7, 1.9, -0.4, 0.3, -2.0, 1.1], device=device)
    probs = expected_probabilities(row, temperature, top_k, top_p).double().cpu()
    draws = 2000
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    by_seed = run(row.expand(draws, -1), seed=list(range(draws)), **options)
    by_step = run(row.expand(draws, -1), seed=12345, step=list(range(draws)), **options)
    for tokens in (by_seed, by_step):
        counts = torch.bincount(tokens.cpu(), minlength=len(row)).double()
        kept = probs > 0
        assert counts[~kept].sum() == 0
        chi_square = ((counts - draws * probs)[kept].square() / (draws * probs[kept])).sum()
        freedom = int(kept.sum()) - 1
        # Wilson-Hilferty: the 1e-4 quantile of chi-square
        quantile = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
        assert chi_square < quantile


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 1, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.5), (0.9, 20, 0.8), (1.0, 0, 0.05)],
    ids=str,
)
def test_kept_tokens_are_those_of_transformers(temperature, top_k, top_p, device):
    row = torch.randn(200, device=device)
    probs = expected_probabilities(row, temperature, top_k, top_p)
    allowed = set(probs.nonzero().squeeze(1).tolist())
    drawn = support(row, temperature=temperature, top_k=top_k, top_p=top_p)
    assert drawn <= allowed
    likely = set((probs > 0.05).nonzero().squeeze(1).tolist())
    assert likely <= drawn


@pytest.mark.usefixtures("many_rows")
def test_ties_stay(device):
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0], device=device)
    assert support(row, top_k=2) == {1, 2, 3, 5}
    even = torch.zeros(6, device=device)
    assert support(even, top_p=0.01) == set(range(6))
    assert support(row, top_k=1) == {1}
    assert support(row, top_p=0.0) == {1}


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("top_k", [0, 6, 100])
def test_top_k_off(top_k, device):
    row = torch.tensor([0.3, 0.0, 0.1, -0.2, 0.2, -0.1], device=device)
    assert support(row, top_k=top_k) == set(range(6))


@pytest.mark.usefixtures("many_rows")
def test_top_p_acts_on_what_top_k_left_and_after_temperature(device):
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device)
    # Of the two left by top-k the first has 4/7 > 0.5; of all four it would need the second.
    assert support(probs.log(), top_k=2, top_p=0.5) == {0}
    assert support(probs.log(), top_p=0.5) == {0, 1}
    # At temperature 1/4 the first alone has 0.72.
    assert support(probs.log(), temperature=0.25, top_p=0.7) == {0}


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_equals_transformers(penalty, backend, device):
    logits = torch.randn(4, 60, device=device).mul_(3)
    seen = torch.rand(4, 60, device=device) < 0.5
    penalties = [penalty, 1.0, penalty, 2.0]
    processed = torch.stack(
        [
            RepetitionPenaltyLogitsProcessor(value)(row_seen.nonzero().T, row[None])[0]
            for row, row_seen, value in zip(logits, seen, penalties, strict=True)
        ]
    )
    greedy = run(logits, temperature=0.0, repetition_penalty=penalties, seen=seen)
    assert torch.equal(greedy, processed.argmax(dim=1))
    # Hot enough to draw from the negative logits too, which the penalty multiplies.
    copies = 2 if backend == "triton" and device.type == "cpu" else 30
    hot = {"temperature": 4.0, "seed": list(range(4 * copies))}
    penalties, seen = penalties * copies, seen.repeat(copies, 1)
    drawn = run(logits.repeat(copies, 1), repetition_penalty=penalties, seen=seen, **hot)
    assert torch.equal(drawn, run(processed.repeat(copies, 1), **hot))


def philox(counter, key):
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def gumbel(token, seed, step):
    """The formula of the docstring."""
    w0, w1, _, _ = philox(
        [token, step % 2**32, step >> 32, 0], [seed % 2**32, seed >> 32 & 2**32 - 1]
    )
    return -math.log(-math.log((w0 * 2**20 + w1 // 2**12 + 0.5) / 2**52))


def test_philox_known_answers():
    """Vectors of the Random123 distribution, philox4x32 with 10 rounds."""
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    expected = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert philox(pi, [0xA4093822, 0x299F31D0]) == expected
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference.sampling.philox(zero, zero, zero)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D]


SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
STEPS = [0, 7, 2**31, 2**33 + 5, 1, 99]


@triton.jit
def _gumbel_kernel(seed_ptr, step_ptr, out_ptr, BLOCK: tl.constexpr):
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    tokens = tl.arange(0, BLOCK)
    tl.store(out_ptr + tokens, _sampling.gumbel(tokens, seed, step))


def test_noise_of_the_kernel_is_the_documented_function(backend, device):
    if backend != "triton":
        pytest.skip("of a kernel")
    for seed, step in zip(SEEDS, STEPS, strict=True):
        out = torch.empty(128, dtype=torch.float64, device=device)
        scalars = [torch.tensor(value, device=device) for value in (seed, step)]
        _gumbel_kernel[(1,)](*scalars, out, BLOCK=128)
        expected = [gumbel(token, seed, step) for token in range(128)]
        np.testing.assert_allclose(out.tolist(), expected, rtol=1e-13)


@triton.jit
def _bound_kernel(
    logits_ptr, tops_ptr, words_ptr, temperature_ptr, row_top_ptr, out_ptr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = _sampling.bound_scale(tl.load(temperature_ptr))
    logits, tops = tl.load(logits_ptr + at), tl.load(tops_ptr + at)
    words = tl.load(words_ptr + at).to(tl.uint32)
    bounds = _sampling.bound_of(logits, tops, scale, words)
    tl.store(out_ptr + at, bounds + _sampling.score_bound(tops, tl.load(row_top_ptr), scale))


def first_words():
    """2^18 first words of the generator, many where bits of fp32 change their meaning or round."""
    powers = 2 ** torch.arange(33)
    spacing = (powers >> 23).clamp(min=1)  # of fp32 numbers from there on
    near = (powers[:, None] + spacing[:, None] * torch.arange(-1000, 1000)).flatten()
    near = near[(near > 0) & (near < 2**32)]
    spread = torch.randint(2**32, (2**18 - 2**16 - len(near),))
    return 2**32 - 1 - torch.cat([torch.arange(2**16), near, spread])


@pytest.mark.parametrize(
    ("row_top", "temperature"),
    [
        (0.0, 1.0), (17.3, 0.7), (-4e4, 0.01), (1e30, 1e20), (3e38, 3e38), (3.4e38, 1e37),
        (1e-38, 1e-39), (1e-43, 1e-44),
    ],
)  # fmt: skip
def test_bound_of_the_noise(row_top, temperature, backend, device):
    if backend != "triton":
        pytest.skip("of a kernel")
    words = first_words()
    row_top, temperature = torch.tensor([row_top, temperature])
    # No token is drawn from further down: score + noise of the largest logit is more.
    lowest = -53 * math.log(2) - math.log(53 * math.log(2))
    logits = row_top + lowest * torch.rand(len(words), dtype=torch.float64) * temperature
    logits = logits.clamp(min=-3.4e38).float()
    logits[::2] = row_top
    tops = (logits.double() + (row_top - logits.double()) * torch.rand(len(words))).float()
    out = torch.empty(len(words), device=device)
    inputs = [x.to(device) for x in (logits, tops, words, temperature, row_top)]
    _bound_kernel[(len(words) // 2**14,)](*inputs, out, BLOCK=2**14)
    bounds = (out.cpu().double() + _sampling.BOUND_OFFSET.value) * math.log(2)
    # 1 - u where the second word is all ones: exact, and log1p loses nothing where it is small.
    below_one = ((2**32 - 1 - words).double() * 2**20 + 0.5) / 2**52
    noise = -torch.log(-torch.log1p(-below_one))
    excess = bounds - (logits.double() - row_top) / temperature.double() - noise
    assert excess.min() >= 0
    usual = (below_one > 2**-22) & (below_one < 2**-10) & (logits == row_top)
    assert excess[usual].max() < 0.061  # few groups reach the best token by this


def test_noise_is_computed_for_few_tokens(backend, device, monkeypatch):
    if backend != "triton" or device.type != "cpu":
        pytest.skip("counted in the interpreter")
    gumbel, counts = _sampling.gumbel, []

    def counted(tokens, seed, step):
        counts.append(tokens.numel.value)
        return gumbel(tokens, seed, step)

    monkeypatch.setattr(_sampling, "gumbel", counted)
    logits = torch.randn(8, 20_000)
    run(logits, temperature=[0.0, 1.0, 1.0, 0.7, 0.7, 0.3, 2.0, 1e9], seed=list(range(8)))
    span = _sampling.SPAN.value * _sampling.GROUP.value
    assert set(counts) == {span}
    assert 7 <= len(counts) <= 9


def test_noise_is_the_documented_function(device):
    logits = torch.randn(6, 50, device=device)
    tokens = run(logits, temperature=0.8, seed=SEEDS, step=STEPS)
    for row, seed, step, token in zip(logits.tolist(), SEEDS, STEPS, tokens.tolist(), strict=True):
        temperature = torch.tensor(0.8).item()
        scores = [
            (logit - max(row)) / temperature + gumbel(i, seed, step) for i, logit in enumerate(row)
        ]
        assert token == max(range(50), key=scores.__getitem__)


# Temperature, top-k, top-p. 2500 tokens are 40 groups, two tiles of the search.
ROWS = [
    (0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 20, 1.0), (0.6, 20, 0.95), (1.0, 0, 0.9), (9.0, 0, 0.05),
    (2.0, 700, 0.8), (1.0, 1, 1.0), (1.0, 0, 0.0), (5.0, 2499, 0.3), (1e20, 0, 0.5),
]  # fmt: skip


def both_ways(logits, **keywords):
    """Tokens for ROWS of the backend and of the reference."""
    device = logits.device
    columns = [torch.tensor(column, device=device) for column in zip(*ROWS, strict=True)]
    seeds = torch.randint(-(2**62), 2**62, (2, len(ROWS)), device=device)
    args = [logits, *columns, seeds[0], seeds[1].abs()]
    return kk.sample(*args, **keywords), reference.sample(*args, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_those_of_the_reference(dtype, backend, device):
    if backend == "reference":
        pytest.skip("the reference itself")
    logits = torch.randn(len(ROWS), 2500, device=device).mul_(3).to(dtype)
    seen = torch.rand(logits.shape, device=device) < 0.3
    penalty = torch.tensor([1.0, 1.3, 0.7] * 4, device=device)[: len(ROWS)]
    got, expected = both_ways(logits, repetition_penalty=penalty, seen=seen)
    assert torch.equal(got, expected)


def test_ties_and_few_logits_as_in_the_reference(backend, device):
    if backend == "reference":
        pytest.skip("the reference itself")
    levels = torch.randint(0, 3, (len(ROWS), 2500), device=device).half()
    got, expected = both_ways(levels)
    assert torch.equal(got, expected)
    few = torch.full_like(levels, -math.inf)
    few[:, 1000:1700:100] = levels[:, :7]  # fewer than top-k asks for
    got, expected = both_ways(few)
    assert torch.equal(got, expected)


def test_many_draws_from_all_tokens_are_those_of_the_reference(backend, device):
    if backend == "reference":
        pytest.skip("the reference itself")
    logits = torch.randn(48, 2500, device=device)
    logits[::4] = 1.5
    temperature = [0.3, 1.0, 2.0, 50.0] * 12
    options = {"temperature": temperature, "seed": list(range(48)), "step": 3}
    got = run(logits, **options)
    with kk.use_backend("reference"):
        assert torch.equal(got, run(logits, **options))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draws_from_extreme_logits_are_those_of_the_reference(top_p, backend, device):
    if backend == "reference":
        pytest.skip("the reference itself")
    inf, largest, least = math.inf, torch.finfo(torch.float32).max, 2.0**-149
    spread = torch.rand(2500, device=device) * 2 - 1
    levels = torch.randint(0, 9, (2500,), device=device)
    sparse = torch.full_like(spread, -inf)
    sparse[7::500] = 0
    mixed = spread.where(levels > 0, -inf).where(levels != 1, math.nan)
    rows = [  # logits, temperature
        (spread * largest, 3e38), (spread * largest, largest), (spread * largest, 1e30),
        (spread * 1e6, 1e5), (spread * 1e6, 0.1), (spread + 1e6, 1.0),
        (levels * least, least), (levels * least, 4 * least), (levels * least, 1.0),
        (sparse, 1.0), (sparse, least), (sparse, largest), (mixed, 1.0), (mixed - 1e38, 1e37),
        (mixed.where(levels != 2, inf), 2.0), (mixed.where(levels != 2, inf), largest),
        (sparse.where(levels > 0, inf), 1.0), (sparse - inf, 1.0),
    ]  # fmt: skip
    options = {"temperature": [t for _, t in rows], "top_p": top_p, "seed": list(range(len(rows)))}
    logits = torch.stack([row for row, _ in rows])
    got = run(logits, **options)
    with kk.use_backend("reference"):
        assert torch.equal(got, run(logits, **options))


def test_rows_past_2_to_the_31_elements(device):
    logits = far_apart((3, 80), torch.bfloat16, device).normal_()
    seen = far_apart((3, 80), torch.bool, device).copy_(logits > 1)
    options = {"temperature": [1.0, 0.0, 0.9], "top_k": [0, 0, 9], "repetition_penalty": 3.0}
    near = run(logits.contiguous(), seen=seen.contiguous(), **options)
    assert torch.equal(run(logits, seen=seen, **options), near)


def test_launch_of_the_real_vocabulary():
    assert sampling.launch_config(2384) == (4096, 4, 8)
    assert sampling.launch_config(16) == (16, 4, 8)
    assert sampling.launch_config(60_000) == (65536, 4, 32)


def test_neighbours_and_order_do_not_matter(device):
    logits = torch.randn(5, 300, device=device)
    options = {
        "temperature": [1.0, 0.0, 0.7, 1.5, 1.0],
        "top_k": [0, 0, 40, 5, 0],
        "top_p": [1.0, 1.0, 0.9, 1.0, 0.8],
        "seed": [5, 6, 7, 8, 5],
        "step": [0, 1, 2, 3, 4],
    }
    together = run(logits, **options)
    assert torch.equal(run(logits, **options), together)
    for i in range(5):
        one = {name: values[i : i + 1] for name, values in options.items()}
        assert run(logits[i : i + 1], **one).item() == together[i].item()
    order = [3, 0, 4, 2, 1]
    shuffled = {name: [values[i] for i in order] for name, values in options.items()}
    assert torch.equal(run(logits[order], **shuffled), together[order])


@pytest.mark.usefixtures("many_rows")
def test_seed_and_step_matter(device):
    logits = torch.zeros(64, 1000, device=device)
    same = run(logits, seed=3, step=4)
    assert same.unique().numel() == 1
    assert run(logits, seed=list(range(64))).unique().numel() > 55
    assert run(logits, seed=3, step=list(range(64))).unique().numel() > 55


def test_logits_that_are_not_finite(device):
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [
            [nan, 1.0, -inf, 0.5],
            [-inf, -inf, 2.0, -inf],
            [0.0, inf, 1.0, nan],
            [nan, -inf, nan, nan],
            [-inf, -inf, -inf, -inf],
        ],
        device=device,
    )
    assert run(logits, temperature=0.0).tolist() == [1, 2, 1, -1, -1]
    for filters in ({"top_k": 2, "top_p": 0.9}, {"top_p": 0.9}):
        assert run(logits[1:], **filters).tolist() == [2, 1, -1, -1]
    assert support(logits[0], draws=8) == {1, 3}
    both = torch.tensor([inf, 0.0, inf], device=device)
    assert support(both, draws=8) == {0, 2}
    assert support(both, draws=8, temperature=0.5, top_p=0.9) == {0, 2}


def test_small_temperatures_do_not_overflow(device):
    row = torch.tensor([60000.0, 59000.0, -60000.0], device=device).half()
    assert support(row, draws=4, temperature=1e-6, top_p=0.99) == {0}
    assert support(row.float() * 1e33, draws=4, temperature=1e-30) == {0}


def test_strided_rows_out_and_no_rows(device):
    wide = torch.randn(4, 120, device=device)
    logits, seen = wide[:, 10:110], (wide > 0)[:, 5:105]
    expected = run(logits.contiguous(), repetition_penalty=1.2, seen=seen.contiguous())
    out = torch.empty(4, dtype=torch.int64, device=device)
    assert run(logits, repetition_penalty=1.2, seen=seen, out=out) is out
    assert torch.equal(out, expected)
    assert run(logits[:0]).shape == (0,)


def test_errors(device):
    logits = torch.randn(2, 10, device=device)
    good = {
        "logits": logits,
        "temperature": torch.ones(2, device=device),
        "top_k": torch.zeros(2, dtype=torch.int64, device=device),
        "top_p": torch.ones(2, device=device),
        "seed": torch.zeros(2, dtype=torch.int64, device=device),
        "step": torch.zeros(2, dtype=torch.int64, device=device),
    }
    seen = torch.zeros(2, 10, dtype=torch.bool, device=device)

    def check(message, **changes):
        with pytest.raises(ValueError, match=message):
            kk.sample(**{**good, **changes})

    check(r"logits must have shape \(\*, \*\), got \(10,\)", logits=logits[0])
    check("logits must have at least one column, got 0", logits=logits[:, :0])
    for name in ("temperature", "top_k", "top_p", "seed", "step"):
        check(rf"{name} must have shape \(2,\), got \(1,\)", **{name: good[name][:1]})
        check(f"{name} must have dtype .*, got torch.int16", **{name: good[name].short()})
    check("repetition_penalty and seen must come together, got no seen", repetition_penalty=seen)
    check("repetition_penalty and seen must .* got no repetition_penalty", seen=seen)
    ones = torch.ones(2, device=device)
    check(r"seen must have shape \(2, 10\)", repetition_penalty=ones, seen=seen[:, :9])
    check(r"seen must have dtype torch.bool", repetition_penalty=ones, seen=seen.long())
    check(r"repetition_penalty must have shape \(2,\)", repetition_penalty=ones[:1], seen=seen)
    check(r"out must have dtype torch.int64, got torch.int32", out=torch.zeros(2).to(logits).int())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 1.5}, "top_p must lie between 0 and 1, got 1.5"),
        ({"top_p": math.nan}, "top_p must lie between 0 and 1, got nan"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and positive, got 0.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_values_are_checked_on_a_cpu(options, message):
    if "repetition_penalty" in options:
        options = {**options, "seen": torch.ones(1, 4, dtype=torch.bool)}
    with kk.use_backend("reference"), pytest.raises(ValueError, match=message):
        run(torch.randn(1, 4), **options)
