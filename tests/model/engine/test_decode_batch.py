"""One decode step on the device's own state: rows, padding, and nothing from or to the host."""

from functools import partial

import pytest
import torch

from keye_kernels import _backends, _device
from keye_model.checkpoint.config import PREVIEW
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.cuda_graph import CudaGraphs, why_no_graphs
from keye_model.engine.decode_batch import MAX_ROWS, DecodeBatch, Sequence
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.request import Request
from keye_model.network.cache import PagedCache
from tests.model.tape import OnlyMeta

ON_GPU = torch.cuda.is_available()
WORDS = [Request(torch.tensor(ids)) for ids in ([5, 6, 7, 8, 9, 10, 11], [42], [30, 31])]


@pytest.fixture(scope="module")
def model(checkpoints):
    return KeyeForConditionalGeneration.from_pretrained(
        checkpoints[PREVIEW.name], device_map="auto"
    )


@pytest.mark.parametrize("penalised", [False, True])
def test_a_step_neither_reads_nor_uploads(model, penalised):
    """A meta tensor has no values to read, and nothing else takes part."""
    config = model.config.text_config
    with torch.device("meta"):
        on_meta = KeyeForConditionalGeneration(model.config).requires_grad_(False)
    cache = PagedCache(config, 40, dtype=torch.float32, device="meta")
    batch = DecodeBatch(cache, config.max_position_embeddings, config.vocab_size)
    batch._seen = torch.zeros(MAX_ROWS, config.vocab_size, dtype=torch.bool, device="meta")
    with OnlyMeta():
        batch.step(on_meta.model, on_meta.lm_head, num_rows=4, capacity=2048, penalised=penalised)


def placed(model, requests, params):
    """A batch after prefill, with pages that hold NaN where nothing was stored."""
    text, device = model.config.text_config, model.device
    cache = PagedCache(text, 8, dtype=model.dtype, device=device)
    for pages in (cache.k, cache.v):
        pages.fill_(float("nan"))
    batch = DecodeBatch(cache, text.max_position_embeddings, text.vocab_size)
    running = []
    for k, (request, one) in enumerate(zip(requests, params, strict=True)):
        ids, num_tokens = request.input_ids, request.input_ids.numel()
        running.append(Sequence(k, cache.add(num_tokens + 4), ids, one, num_tokens, [7 + k]))
        hidden = model.model.language_model.embed_tokens(ids.to(device))
        positions = torch.arange(num_tokens, device=device).expand(3, -1)
        model.model(hidden, positions, cache, cache.append([running[-1].handle], [num_tokens]))
    batch.place(running)
    return batch


def mixed_params(penalised):
    return [
        SamplingParams(9),
        SamplingParams(9, temperature=1.3, seed=5),
        SamplingParams(9, repetition_penalty=1e9 if penalised else 1.0),
    ]


@pytest.mark.parametrize("penalised", [False, True])
@torch.inference_mode()
def test_padding_changes_nothing(model, penalised):
    params = mixed_params(penalised)
    exact, padded = placed(model, WORDS, params), placed(model, WORDS, params)
    before = [buffer.clone() for buffer in (padded._ints, padded._block_table)]
    options = {"capacity": 512, "penalised": penalised}
    for _ in range(3):
        exact.step(model.model, model.lm_head, num_rows=3, **options)
        padded.step(model.model, model.lm_head, num_rows=8, **options)
        assert padded.tokens(3) == exact.tokens(3)
        assert min(padded.tokens(8)) >= 0
    assert padded._stored.tolist()[:4] == [10, 4, 5, 0]
    for name in ("counters", "_active"):
        rows = getattr(padded, name)
        assert torch.equal(rows, getattr(exact, name))
    assert torch.equal(padded.counters[:, 3:], before[0][:3, 3:])
    assert torch.equal(padded._block_table, before[1])
    for mine, other in ((padded.cache.k, exact.cache.k), (padded.cache.v, exact.cache.v)):
        torch.testing.assert_close(mine, other, equal_nan=True)
        assert mine.isnan().sum() == mine[:, :, :, 0, 0].isnan().sum() * mine[0, 0, 0].numel()
        assert (~mine[0, :, :, 0, 0].isnan()).sum() == 10 + 4 + 5, "one row for each token"


@pytest.mark.skipif(ON_GPU, reason="padding on kernels is tested by every other test here")
@torch.inference_mode()
def test_padding_on_kernels(model, monkeypatch):
    """Under the interpreter, which refuses what lies outside of every tensor."""
    monkeypatch.setattr(_device, "elsewhere", _device.Device((9, 0), 1))  # few programs

    def find(op, _):
        served = _backends._registry[op]
        return served["triton" if "triton" in served else "reference"].run

    params = mixed_params(penalised=True)
    exact, padded = placed(model, WORDS, params), placed(model, WORDS, params)
    options = {"capacity": 64, "penalised": True}
    for _ in range(2):
        exact.step(model.model, model.lm_head, num_rows=3, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_backends, "find", find)
            padded.step(model.model, model.lm_head, num_rows=4, **options)
        assert padded.tokens(3) == exact.tokens(3)
    assert torch.equal(padded.counters, exact.counters)
    torch.testing.assert_close(padded.cache.k, exact.cache.k, equal_nan=True, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.cache.v, exact.cache.v, equal_nan=True, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_padding_that_chose_nothing_stays_harmless(model):
    """-1 in a row that nobody looks at must not be looked up in the embedding."""
    batch = placed(model, WORDS[:1], [SamplingParams(9)])
    batch.token_ids[1:] = -1
    batch.step(model.model, model.lm_head, num_rows=4, capacity=512, penalised=False)
    assert min(batch.tokens(4)) >= 0


@torch.inference_mode()
def test_rows_say_what_the_host_knows(model):
    params = [SamplingParams(9, 0.5, 3, 0.25, 1.5, 2**63 - 1), SamplingParams(9)]
    batch = placed(model, WORDS[:2], params)
    assert batch._ints[:, :3].T.tolist() == [
        [7, 7, 1, 1, 7, 3, 2**63 - 1],  # stored, position, step, active, token, top_k, seed
        [1, 1, 1, 1, 8, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch._floats[:, :3].T.tolist() == [[0.5, 0.25, 1.5], [0, 1, 1], [1, 1, 1]]
    assert batch._seen[0].nonzero()[:, 0].tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch._seen[1].nonzero()[:, 0].tolist() == [8, 42]
    batch.place([])
    assert not batch._ints.any()
    assert not batch.penalised
    assert (batch._block_table == -1).all()


def test_capacities(model):
    cache = PagedCache(model.config.text_config, 700, dtype=torch.float32, device="meta")
    batch = DecodeBatch(cache, 40960, 10)
    found = {batch.capacity(longest) for longest in range(1, 40961)}
    assert found == {2048, 8192, 32768, 40960}
    assert [batch.capacity(n) for n in (1, 2048, 2049, 32769)] == [2048, 2048, 8192, 40960]
    options = {"page_size": 48, "dtype": torch.float32, "device": "meta"}
    cache = PagedCache(model.config.text_config, 50, **options)
    batch = DecodeBatch(cache, 40960, 10)
    assert [batch.capacity(n) for n in (1, 2049, 40960)] == [2064, 8208, 40992], "whole pages"


@pytest.mark.parametrize("num_pages", [1, 32, 33, 55, 128, 700, 5000])
def test_a_capacity_does_not_depend_on_the_cache(model, num_pages):
    """It decides into how many pieces attention divides a sequence, and so its last bits."""
    cache = PagedCache(model.config.text_config, num_pages, dtype=torch.float32, device="meta")
    batch = DecodeBatch(cache, 40960, 10)
    longest = min(num_pages * 64, 40960)
    expected = next(size for size in (2048, 8192, 32768, 40960) if longest <= size)
    assert batch.capacity(longest) == expected
    assert batch._block_table.shape[1] * 64 == expected, "it holds the pages of each capacity"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: a CUDA graph against the launches it holds")
@torch.inference_mode()
def test_a_graph_is_the_launches_it_holds(model):
    if why := why_no_graphs(model.device):
        pytest.skip(f"steps cannot be captured: {why}")
    params = mixed_params(penalised=True)
    launched, captured = placed(model, WORDS, params), placed(model, WORDS, params)
    graphs = CudaGraphs(model.device)
    options = {"num_rows": 8, "capacity": 512, "penalised": True}
    for _ in range(4):
        launched.step(model.model, model.lm_head, **options)
        graphs.run("step", partial(captured.step, model.model, model.lm_head, **options))
        assert captured.tokens(8) == launched.tokens(8)
    assert torch.equal(captured._ints, launched._ints)
    for name in "kv":
        pages = [getattr(batch.cache, name).nan_to_num(7) for batch in (launched, captured)]
        assert torch.equal(*pages)
