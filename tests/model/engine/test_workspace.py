"""Runs with captured steps give the tokens of launched ones, whoever comes and goes.

Without a GPU a tape stands in for the CUDA graph.
"""

import copy
import dataclasses
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from keye_kernels import use_backend
from keye_model import Keye
from keye_model.checkpoint.config import PREVIEW
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine import cuda_graph, decode_batch
from keye_model.engine.calls import Engines
from keye_model.engine.cuda_graph import why_no_graphs
from keye_model.engine.decode_batch import DecodeBatch
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import SamplingParams
from keye_model.engine.vision_batch import VisionBatch
from keye_model.engine.workspace import Workspace
from keye_model.inputs.request import Request

ON_GPU = torch.cuda.is_available()
uses_recorder = pytest.mark.usefixtures("recorder")
needs_no_gpu = pytest.mark.skipif(ON_GPU, reason="a GPU captures for itself")


@pytest.fixture(scope="module")
def model(checkpoints):
    return KeyeForConditionalGeneration.from_pretrained(
        checkpoints[PREVIEW.name], device_map="auto"
    )


@pytest.fixture(scope="module")
def requests(model):
    """Words, one token, an image, more than a page of words, words."""
    config = model.config
    pixels = torch.arange(24 * 588, dtype=torch.int64).remainder(251).to(torch.uint8)
    image = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    return [
        Request(torch.arange(5, 12)),
        Request(torch.tensor([42])),
        Request(torch.tensor([9, *image, 3]), pixels.view(24, 3, 14, 14), ((1, 4, 6),)),
        Request(torch.arange(70) * 7 % 90),
        Request(torch.tensor([30, 31])),
    ]


def start(model, requests, params, engines=None, *, eos=(), limits=None):
    """A run with graphs in the engine of ``engines``, or one that launches its kernels."""
    return (engines or Engines()).run(
        model.model,
        model.lm_head,
        requests,
        params,
        eos_token_ids=eos,
        limits=limits,
        cuda_graphs=engines is not None,
        cache=False,
    )


def run(model, requests, params, engines=None, *, stop=(), **options):
    """Tokens of each request; `stop`: (request, after so many tokens)."""
    running = start(model, requests, params, engines, **options)
    ids = [[] for _ in requests]
    for token in running:
        ids[token.request].append(token.token_id)
        if (token.request, len(ids[token.request])) in stop:
            running.stop(token.request)
    assert running.cuda_graphs == (engines is not None)
    return ids


def greedy(*counts):
    return [SamplingParams(count) for count in counts]


def drawn(count, **options):
    return [
        SamplingParams(count, temperature=1.4, top_k=50, top_p=0.97, seed=seed, **options)
        for seed in range(5)
    ]


MIXED = [
    SamplingParams(9, repetition_penalty=1e9),
    SamplingParams(5, temperature=1.4, seed=3),
    SamplingParams(9),
    SamplingParams(7, temperature=0.9, top_k=9, repetition_penalty=1.5, seed=4),
    SamplingParams(8, top_p=0.5, temperature=2.0),
]
CASES = {
    "greedy": (greedy(6, 6, 6, 6, 6), {}),
    "ends one by one": (greedy(9, 2, 5, 7, 3), {}),
    "two at a time": (greedy(4, 6, 5, 4, 6), {"limits": Limits(max_cache_tokens=192)}),
    "stopped in the middle": (greedy(8, 8, 8, 8, 8), {"stop": {(1, 3), (3, 4), (0, 1)}}),
    "drawn": (drawn(7), {}),
    "drawn, two at a time": (drawn(7), {"limits": Limits(max_cache_tokens=192)}),
    "penalties and draws": (MIXED, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_captured_steps_equal_launched_ones(model, requests, recorder, case):
    params, options = CASES[case]
    want = run(model, requests, params, **options)
    engines = Engines()
    assert run(model, requests, params, engines, **options) == want
    # Another run replays what the first has captured, and captures what came up once in it.
    assert run(model, requests, params, engines, **options) == want
    if recorder.captures:
        captures = recorder.captures
        assert run(model, requests, params, engines, **options) == want
        assert recorder.captures == captures


@uses_recorder
def test_stop_ids_end_captured_requests(model, requests):
    params = greedy(6, 6, 6, 6, 6)
    eos = (run(model, requests, params)[2][2],)
    want = run(model, requests, params, eos=eos)
    assert min(map(len, want)) < 6
    assert run(model, requests, params, Engines(), eos=eos) == want


def captured(engines):
    """Keys of the engine's passes, and whether each is captured."""
    graphs = engines.engine.workspace.graphs
    return {key: key in graphs._graphs for key in graphs._seen}


@uses_recorder
def test_a_step_is_captured_when_it_comes_again(model, requests):
    engines, found = Engines(), {}
    run(model, requests[:1], greedy(2), engines)  # one token by prefill, one by a step
    assert captured(engines) == (found := {("decode", 1, 2048, False): False})
    run(model, requests[:1], greedy(4), engines)
    assert captured(engines) == (found := {key: True for key in found})
    run(model, requests[3:], greedy(3, 3), engines)
    assert captured(engines) == (found := found | {("decode", 2, 2048, False): True})
    words = [requests[k] for k in (0, 1, 3, 4)]
    run(model, words[:3], greedy(4, 4, 4), engines)
    assert captured(engines) == (found := found | {("decode", 4, 2048, False): True})
    run(model, words, greedy(4, 4, 4, 4), engines)
    assert captured(engines) == found


@uses_recorder
def test_small_images_are_captured_too(model, requests):
    engines = Engines()
    want = run(model, requests[2:3], greedy(1))
    for again in (False, True, True):
        assert run(model, requests[2:3], greedy(1), engines) == want
        assert captured(engines) == {("vision", 64, 2): again}


def test_few_graphs_are_kept(model, requests, recorder, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_MAX_GRAPHS", 2)
    params, engines = greedy(9, 2, 5, 7, 3), Engines()
    want = run(model, requests, params)
    for _ in range(4):
        assert run(model, requests, params, engines) == want  # the tower, then 8 rows, 4, 2, 1
        assert 0 < sum(captured(engines).values()) <= 2
    assert ON_GPU or recorder.captures > 5


@uses_recorder
def test_longer_sequences_have_graphs_of_their_own(model, monkeypatch):
    monkeypatch.setattr(decode_batch, "_MIN_CAPACITY", 64)
    prompts = [Request(torch.arange(60) % 50), Request(torch.arange(10))]
    params, engines = greedy(9, 9), Engines()
    want = run(model, prompts, params)
    assert run(model, prompts, params, engines) == want
    assert captured(engines) == {("decode", 2, size, False): True for size in (64, 256)}


def test_on_a_gpu_launched_steps_have_the_padding_of_captured_ones(model, monkeypatch):
    made, rows = Workspace.new(model.model, model.lm_head, 1), []
    assert (made.vision is not None) == ON_GPU
    monkeypatch.setattr(DecodeBatch, "step", lambda *_, num_rows, **__: rows.append(num_rows))
    for vision in (None, VisionBatch(model.model.visual)):
        dataclasses.replace(made, vision=vision).step(model.model, model.lm_head, 3, 10)
    assert rows == [3, 4]


@uses_recorder
def test_an_engine_stays_for_the_next_call(model, requests):
    engines = Engines()
    assert engines.engine is None
    run(model, requests, greedy(2, 2, 2, 2, 2), engines)
    first = engines.engine
    context = model.config.text_config.max_position_embeddings
    assert first.workspace.cache.num_pages == context // 64
    run(model, requests[:1], greedy(2), engines)
    assert engines.engine is first
    run(model, requests[:1], greedy(2), engines, limits=Limits(max_cache_tokens=192))
    assert engines.engine is not first
    assert engines.engine.workspace.cache.num_pages == 3


@uses_recorder
def test_calls_that_need_more_together_get_a_larger_engine(model):
    """But not while another call runs, and not for a little more."""
    context = model.config.text_config.max_position_embeddings
    engines, pages = Engines(), context // 64
    words = [Request(torch.full((context - 5,), 7))] * 3
    start(model, words[:1], greedy(5), engines)
    first = engines.engine
    start(model, [*words[:1], Request(torch.arange(300))], greedy(5, 5), engines)
    assert engines.engine is first
    running = iter(start(model, [Request(torch.arange(5))], greedy(5), engines))
    next(running)
    start(model, words, greedy(5, 5, 5), engines)
    assert engines.engine is first
    running.close()
    start(model, words, greedy(5, 5, 5), engines)
    assert engines.engine.workspace.cache.num_pages == 3 * pages
    start(model, words[:1], greedy(5), engines)
    assert engines.engine.workspace.cache.num_pages == 3 * pages


@uses_recorder
def test_two_runs_at_once(model, requests):
    params, engines = greedy(8), Engines()
    prompts = [requests[:1], requests[2:3]]
    want = [[run(model, prompt, params)] for prompt in prompts]
    runs = [start(model, prompt, params, engines) for prompt in prompts * 2]
    for pair in (runs[:2], runs[2:]):
        ids = [[], []]
        for tokens in itertools.zip_longest(*pair):
            for k, token in enumerate(tokens):
                ids[k].append(token.token_id)
        assert [[[row]] for row in ids] == want


@uses_recorder
def test_moved_weights_are_captured_again(model, requests):
    model, params, engines = copy.deepcopy(model), greedy(5), Engines()
    want = run(model, requests[:1], params, engines)
    first = engines.engine
    assert run(model, requests[:1], params, engines) == want
    assert engines.engine is first
    model.lm_head.weight.data = -model.lm_head.weight.data
    changed = run(model, requests[:1], params, engines)
    assert changed == run(model, requests[:1], params) != want
    second = engines.engine
    model.lm_head.weight.neg_()
    assert run(model, requests[:1], params, engines) == want
    assert engines.engine is not second, "keys and values of other weights must not be found"
    model.half()
    assert run(model, requests[:1], params, engines) == run(model, requests[:1], params)
    assert first is not second
    assert engines.engine.workspace.cache.k.dtype == torch.float16


@needs_no_gpu
@uses_recorder
def test_another_backend_is_captured_again(model, requests):
    engines = Engines()
    start(model, requests, greedy(2, 2, 2, 2, 2), engines)
    first = engines.engine
    with use_backend("triton"):
        start(model, requests, greedy(2, 2, 2, 2, 2), engines)
    assert engines.engine is not first


@uses_recorder
def test_threads_share_what_is_kept(model, requests):
    """Each on a stream of its own, where there are streams."""
    engines, prompts = Engines(), [requests[:1], requests[2:3]]
    want = [run(model, prompt, greedy(6)) for prompt in prompts]

    def work(prompt):
        with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext():
            return [run(model, prompt, greedy(6), engines) for _ in range(5)]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(work, prompts))
    assert found == [[one] * 5 for one in want]
    assert sum(captured(engines).values()) > 0


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: memory that a graph writes to")
@uses_recorder
def test_graphs_survive_what_others_do_with_memory(model, requests):
    params, engines = greedy(6, 6, 6, 6, 6), Engines()
    want = run(model, requests, params)
    for _ in range(3):
        assert run(model, requests, params, engines) == want
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        torch.full((free // 8,), torch.nan, device="cuda")  # half of it


@uses_recorder
def test_a_run_that_was_stopped_before_it_began(model, requests):
    engines = Engines()
    running = start(model, requests[:1], greedy(5), engines)
    running.stop(0)
    assert list(running) == []
    assert captured(engines) == {}


@uses_recorder
def test_an_abandoned_run_leaves_nothing(model, requests):
    engines = Engines()
    tokens = iter(start(model, requests[:1], greedy(5), engines))
    next(tokens)
    cache = engines.engine.workspace.cache
    assert cache.num_free_pages < cache.num_pages
    del tokens
    assert cache.num_free_pages == cache.num_pages


@uses_recorder
def test_a_copied_model_captures_its_own(model, requests):
    own = copy.copy(model)
    own.engines = Engines()
    run(own, requests[:1], greedy(3), own.engines)
    assert own.engines.engine is not None
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert copied.engines.engine is None
        want = run(model, requests[:1], greedy(3))
        assert run(copied, requests[:1], greedy(3), copied.engines) == want
        assert any(captured(copied.engines).values())


@pytest.mark.parametrize("stop_strings", [None, "e"])
@uses_recorder
def test_answers_say_whether_graphs_were_used(checkpoints, stop_strings):
    keye = Keye.from_pretrained(checkpoints[PREVIEW.name])
    launching = Keye(keye.model, keye.processor, cuda_graphs=False)
    chats = [[{"role": "user", "content": text}] for text in ("Hello.", "What is this?", "1 2 3")]
    options = {"max_new_tokens": 12, "seed": 5, "temperature": 1.5, "stop_strings": stop_strings}
    want = launching.generate(chats, **options)
    assert not any(answer.timings.cuda_graphs for answer in want)
    assert keye.model.engines.engine.workspace.graphs is None
    for _ in range(2):
        answers = keye.generate(chats, **options)
        assert all(answer.timings.cuda_graphs for answer in answers)
        assert [a.token_ids for a in answers] == [a.token_ids for a in want]
        assert [a.text for a in answers] == [a.text for a in want]
    engine = keye.model.engines.engine
    ids = torch.arange(5, 10)[None]
    found = keye.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert keye.model.engines.engine is engine
    assert found[0, 5:].tolist() == run(keye.model, [Request(ids[0])], greedy(4))[0]


def test_without_a_gpu_nothing_is_captured(model, requests):
    if ON_GPU:
        pytest.skip("there is one")
    running = start(model, requests[:1], greedy(2), Engines())
    assert len(list(running)) == 2
    assert not running.cuda_graphs
    assert why_no_graphs(torch.device("cpu")) == "needs a GPU"
