"""Captured decode steps give the tokens of launched ones, whoever comes and goes.

Without a GPU a tape stands in for the CUDA graph: it holds the ops of a step with the very tensors
they had, and runs those again. What a step takes from the host is frozen at its capture, as in a
graph, and what it gets from a tensor that has moved is stale.
"""

import copy
import itertools
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keye_kernels import use_backend
from keye_model import Keye, decode_batch, decode_graph
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.config import PREVIEW
from keye_model.decode_batch import MAX_ROWS
from keye_model.decode_graph import Decoders, padded_rows, why_no_graphs
from keye_model.generation import Generation
from keye_model.inputs import Request
from keye_model.plan import Limits
from keye_model.sampling import SamplingParams

ON_GPU = torch.cuda.is_available()
uses_recorder = pytest.mark.usefixtures("recorder")
needs_no_gpu = pytest.mark.skipif(ON_GPU, reason="a GPU captures for itself")


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.ran = [], True  # a capture here runs the step; a graph's does not

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        if self.ran:
            self.ran = False
            return
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(x, torch.Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)


class Recorder:
    """Counts; `Tape` in the place of a graph."""

    runs = captures = 0

    def __init__(self, device):
        pass

    def run(self, step):
        Recorder.runs += 1
        step()

    def capture(self, step):
        Recorder.captures += 1
        with (tape := Tape()):
            step()
        return tape


@pytest.fixture
def recorder(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(decode_graph, "why_no_graphs", lambda _: "")
        monkeypatch.setattr(decode_graph, "CudaRecorder", Recorder)
    elif why := why_no_graphs(torch.device("cuda")):
        pytest.skip(f"steps cannot be captured: {why}")
    Recorder.runs = Recorder.captures = 0
    return Recorder


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


def run(model, requests, params, decoders=None, *, eos=(), limits=None, stop=()):
    """Tokens of each request; `stop`: (request, after so many tokens)."""
    generation = Generation(
        model.model,
        model.lm_head,
        requests,
        params,
        eos_token_ids=eos,
        limits=limits,
        decoders=decoders,
    )
    ids = [[] for _ in requests]
    for token in generation:
        ids[token.request].append(token.token_id)
        if (token.request, len(ids[token.request])) in stop:
            generation.stop(token.request)
    assert generation.cuda_graphs == (decoders is not None)
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
    decoders = Decoders()
    assert run(model, requests, params, decoders, **options) == want
    # Another run replays what the first has captured, and captures what came up once in it.
    assert run(model, requests, params, decoders, **options) == want
    if recorder.captures:
        captures = recorder.captures
        assert run(model, requests, params, decoders, **options) == want
        assert recorder.captures == captures


@uses_recorder
def test_stop_ids_end_captured_requests(model, requests):
    params = greedy(6, 6, 6, 6, 6)
    eos = (run(model, requests, params)[2][2],)
    want = run(model, requests, params, eos=eos)
    assert min(map(len, want)) < 6
    assert run(model, requests, params, Decoders(), eos=eos) == want


@needs_no_gpu
def test_a_step_runs_before_it_is_captured(model, requests, recorder):
    decoders = Decoders()
    run(model, requests[:1], greedy(2), decoders)  # one token by prefill, one by a step
    assert (recorder.runs, recorder.captures) == (1, 0)
    run(model, requests[:1], greedy(4), decoders)
    assert (recorder.runs, recorder.captures) == (1, 1)
    run(model, requests[2:4], greedy(3, 3), decoders)
    assert (recorder.runs, recorder.captures) == (2, 2)
    run(model, requests[:3], greedy(4, 4, 4), decoders)  # 4 rows
    assert (recorder.runs, recorder.captures) == (3, 3)
    run(model, requests[:4], greedy(4, 4, 4, 4), decoders)
    assert (recorder.runs, recorder.captures) == (3, 3)


@needs_no_gpu
def test_few_graphs_are_kept(model, requests, recorder, monkeypatch):
    monkeypatch.setattr(decode_graph, "_MAX_GRAPHS", 1)
    params, decoders = greedy(9, 2, 5, 7, 3), Decoders()
    want = run(model, requests, params)
    assert run(model, requests, params, decoders) == want
    runs, captures = recorder.runs, recorder.captures
    assert min(runs, captures) > 1
    assert run(model, requests, params, decoders) == want
    assert (recorder.runs, recorder.captures) == (2 * runs, 2 * captures), "from 8 rows to 1 again"
    (decoder,) = decoders._idle
    assert list(decoder.graphs._graphs) == [(1, 2048, False)]


@needs_no_gpu
def test_the_least_recently_used_graph_goes(recorder, monkeypatch):
    monkeypatch.setattr(decode_graph, "_MAX_GRAPHS", 2)
    graphs, steps = decode_graph.StepGraphs(torch.device("cpu")), []
    for key in "aabbacc":
        graphs.run(key, lambda key=key: steps.append(key))
    assert "".join(graphs._graphs) == "ac"
    assert "".join(steps) == "aabbcc", "a was replayed once"
    assert (recorder.runs, recorder.captures) == (3, 3)


@needs_no_gpu
def test_recorder_works_on_its_own_stream(monkeypatch):
    """With a CUDA that only writes down what is asked of it."""
    log = []

    class Stream:
        def __init__(self, device, name="own"):
            self.device, self.name = device, name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what):
        log.append(f"begin {what}")
        yield
        log.append(f"end {what}")

    fakes = {
        "Stream": Stream,
        "current_stream": lambda device: Stream(device, "current"),
        "stream": lambda stream: within(stream.name),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: "graph",
        "graph": lambda graph, pool, stream, capture_error_mode: within(
            f"{graph} {pool} {stream.name} {capture_error_mode}"
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorder = decode_graph.CudaRecorder(torch.device("cuda:1"))
    recorder.run(lambda: log.append("step"))
    assert log == [
        "own waits for current", "begin own", "step", "end own", "current waits for own"
    ]  # fmt: skip
    log.clear()
    assert recorder.capture(lambda: log.append("step")) == "graph"
    assert log == ["begin graph pool own thread_local", "step", "end graph pool own thread_local"]


@uses_recorder
def test_longer_sequences_have_graphs_of_their_own(model, monkeypatch):
    monkeypatch.setattr(decode_batch, "_MIN_CAPACITY", 64)
    prompts = [Request(torch.arange(60) % 50), Request(torch.arange(10))]
    params, decoders = greedy(9, 9), Decoders()
    want = run(model, prompts, params)
    assert run(model, prompts, params, decoders) == want
    (decoder,) = decoders._idle
    assert list(decoder.graphs._graphs) == [(2, 64, False), (2, 256, False)]


def take(decoders, model, num_pages=1, max_pages=2**31):
    return decoders.take(model.model, model.lm_head, num_pages, max_pages)


@uses_recorder
def test_a_decoder_is_kept_for_the_next_run(model):
    decoders = Decoders()
    assert decoders.idle_bytes == 0
    first = take(decoders, model)
    assert first.cache.num_pages == 128, "8192 tokens"
    decoders.keep(first)
    assert decoders.idle_bytes == first.cache.k.nbytes + first.cache.v.nbytes
    assert take(decoders, model) is first
    assert decoders.idle_bytes == 0
    assert take(decoders, model) is not first, "it is in use"


@uses_recorder
@pytest.mark.parametrize(
    ("num_pages", "max_pages", "pages"),
    [(128, 128, 128), (129, 1000, 129), (5, 100, 100), (100, 100, 100)],
    ids=["it fits", "too small", "too large", "too large, all used"],
)
def test_pages_of_a_decoder(model, num_pages, max_pages, pages):
    decoders = Decoders()
    decoders.keep(idle := take(decoders, model))
    decoder = take(decoders, model, num_pages, max_pages)
    assert decoder.cache.num_pages == pages
    assert (decoder is idle) == (pages == 128)
    decoders.keep(decoder)
    assert bool(decoders._idle) == (pages <= 128), "a large one is not kept"


@uses_recorder
def test_two_runs_at_once(model, requests):
    params, decoders = greedy(8), Decoders()
    prompts = [requests[:1], requests[2:3]]
    want = [[run(model, prompt, params)] for prompt in prompts]
    runs = [
        Generation(model.model, model.lm_head, prompt, params, eos_token_ids=(), decoders=decoders)
        for prompt in prompts * 2
    ]
    for pair in (runs[:2], runs[2:]):
        ids = [[], []]
        for tokens in itertools.zip_longest(*pair):
            for k, token in enumerate(tokens):
                ids[k].append(token.token_id)
        assert [[[row]] for row in ids] == want


@uses_recorder
def test_moved_weights_are_captured_again(model, requests):
    model, params, decoders = copy.deepcopy(model), greedy(5), Decoders()
    want = run(model, requests[:1], params, decoders)
    (first,) = decoders._idle
    assert run(model, requests[:1], params, decoders) == want
    assert list(decoders._idle) == [first]
    model.lm_head.weight.data = -model.lm_head.weight.data
    changed = run(model, requests[:1], params, decoders)
    assert changed == run(model, requests[:1], params) != want
    (second,) = decoders._idle
    model.half()
    assert run(model, requests[:1], params, decoders) == run(model, requests[:1], params)
    (third,) = decoders._idle
    assert first is not second is not third
    assert third.cache.k.dtype == torch.float16


@needs_no_gpu
@uses_recorder
def test_another_backend_is_captured_again(model):
    decoders = Decoders()
    decoders.keep(first := take(decoders, model))
    with use_backend("reference"):
        assert take(decoders, model) is first, "a CPU has no other"
    decoders.keep(first)
    with use_backend("triton"):
        assert take(decoders, model) is not first


@uses_recorder
def test_an_abandoned_run_leaves_nothing(model, requests):
    decoders = Decoders()
    generation = Generation(
        model.model, model.lm_head, requests[:1], greedy(5), eos_token_ids=(), decoders=decoders
    )
    next(iter(generation))
    del generation
    assert not decoders._idle


@uses_recorder
def test_a_copied_model_captures_its_own(model, requests):
    own = copy.copy(model)
    own.decoders = Decoders()
    run(own, requests[:1], greedy(3), own.decoders)
    assert own.decoders._idle
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert not copied.decoders._idle
        assert run(copied, requests[:1], greedy(3)) == run(model, requests[:1], greedy(3))


@pytest.mark.parametrize("stop_strings", [None, "e"])
@uses_recorder
def test_answers_say_whether_graphs_were_used(checkpoints, stop_strings):
    keye = Keye.from_pretrained(checkpoints[PREVIEW.name])
    launching = Keye(keye.model, keye.processor, cuda_graphs=False)
    chats = [[{"role": "user", "content": text}] for text in ("Hello.", "What is this?", "1 2 3")]
    options = {"max_new_tokens": 12, "seed": 5, "temperature": 1.5, "stop_strings": stop_strings}
    want = launching.generate(chats, **options)
    assert not any(answer.timings.cuda_graphs for answer in want)
    assert not keye.model.decoders._idle
    for _ in range(2):
        answers = keye.generate(chats, **options)
        assert all(answer.timings.cuda_graphs for answer in answers)
        assert [a.token_ids for a in answers] == [a.token_ids for a in want]
        assert [a.text for a in answers] == [a.text for a in want]
    (decoder,) = keye.model.decoders._idle
    ids = torch.arange(5, 10)[None]
    found = keye.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert list(keye.model.decoders._idle) == [decoder]
    assert found[0, 5:].tolist() == run(keye.model, [Request(ids[0])], greedy(4))[0]


def test_without_a_gpu_nothing_is_captured(model, requests):
    if ON_GPU:
        pytest.skip("there is one")
    decoders = Decoders()
    generation = Generation(
        model.model, model.lm_head, requests[:1], greedy(2), eos_token_ids=(), decoders=decoders
    )
    assert len(list(generation)) == 2
    assert not generation.cuda_graphs
    assert decoders.idle_bytes == 0
    assert why_no_graphs(torch.device("cpu")) == "needs a GPU"


def test_definitions_are_not_captured():
    with use_backend("reference"):
        assert why_no_graphs(torch.device("cuda")) == (
            "no kernel serves qk_norm_mrope_store, paged_decode_attention, sample"
        )


def test_padded_rows():
    rows = [padded_rows(n) for n in range(1, MAX_ROWS + 1)]
    assert all(n <= padded < 2 * n for n, padded in enumerate(rows, 1))
    assert sorted(set(rows)) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
