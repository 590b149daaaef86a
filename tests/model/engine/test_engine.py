"""The engine on tokens alone: against full recomputation, and against itself."""

import dataclasses
import gc
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from keye_kernels import backends, use_backend
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine import engine as engine_module
from keye_model.engine import memory
from keye_model.engine.calls import Engines
from keye_model.engine.job import Token
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.packing import pack
from keye_model.inputs.request import Request
from tests.model.engine.prompts import check, check_idle

GREEDY = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module", params=[PREVIEW.name, V1_5.name])
def model(request, checkpoints):
    return KeyeForConditionalGeneration.from_pretrained(
        checkpoints[request.param], device_map="auto"
    )


@pytest.fixture(scope="module")
def requests(model):
    """Words alone, one token, an image, an image and a video, a video of two frames."""
    config, generator = model.config, torch.Generator().manual_seed(5)

    def pixels(*grid):
        count = sum(t * h * w for t, h, w in grid)
        return torch.randint(0, 256, (count, 3, 14, 14), generator=generator, dtype=torch.uint8)

    def vision(token_id, count):
        return [config.vision_start_token_id, *[token_id] * count, config.vision_end_token_id]

    image, video = config.image_token_id, config.video_token_id
    picture, clip = (1, 4, 6), (2, 4, 4)
    return [
        Request(torch.tensor([5, 6, 7, 8, 9, 10, 11])),
        Request(torch.tensor([42])),
        Request(torch.tensor([9, *vision(image, 6), 3]), pixels(picture), (picture,)),
        Request(
            torch.tensor([1, 2, *vision(image, 6), 7, *vision(video, 8), 8]),
            pixels(picture),
            (picture,),
            pixels(clip),
            (clip,),
            (0.5,),
        ),
        Request(torch.tensor([*vision(video, 8), 30, 31]), None, (), pixels(clip), (clip,), (1.0,)),
    ]


def start(model, requests, params=GREEDY, eos=(), limits=None, *, engines=None, head=None, **more):
    """A run in an engine of its own, or in that of ``engines``."""
    params = params if isinstance(params, list) else [params] * len(requests)
    engines = Engines() if engines is None else engines
    head = model.lm_head if head is None else head
    return engines.run(
        model.model, head, requests, params, eos_token_ids=eos, limits=limits, **more
    )


def run(model, requests, *args, **options):
    """Token ids and finish reason of each request."""
    ids, reasons = [[] for _ in requests], [None] * len(requests)
    for token in start(model, requests, *args, **options):
        assert reasons[token.request] is None, "a token came after the last one"
        ids[token.request].append(token.token_id)
        reasons[token.request] = token.finish_reason
    return ids, reasons


def recompute(model, request, num_tokens):
    """Greedy tokens with no cache: the whole sequence again for each of them."""
    packed = pack([request], model.config)
    ids = request.input_ids
    position = packed.next_positions[0]
    positions, new = packed.positions, []
    for _ in range(num_tokens):
        out = model(
            ids[None],
            pixel_values=request.pixel_values,
            image_grid_thw=request.image_grid_thw,
            pixel_values_videos=request.pixel_values_videos,
            video_grid_thw=request.video_grid_thw,
            second_per_grid_ts=request.second_per_grid_ts,
            position_ids=positions[:, None],
        )
        new.append(int(out.logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor(new[-1:])])
        positions = torch.cat([positions, torch.full((3, 1), position)], dim=1)
        position += 1
    return new


def test_batch_equals_full_recomputation(model, requests):
    ids, reasons = run(model, requests)
    assert ids == [recompute(model, request, 6) for request in requests]
    assert reasons == ["length"] * len(requests)
    assert len({tuple(row) for row in ids}) == len(ids), "the prompts must matter"


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_prefill_tokens=1),
        Limits(max_prefill_tokens=7),
        Limits(max_patches_per_call=1),
        Limits(max_cache_tokens=64),
        Limits(max_cache_tokens=128),
    ],
    ids=["1 token", "chunks end inside images", "1 patch", "one at a time", "two at a time"],
)
def test_limits_do_not_change_tokens(model, requests, limits):
    assert run(model, requests, limits=limits) == run(model, requests)


@pytest.mark.parametrize("cache", [False, True])
def test_all_pages_come_back(model, requests, cache):
    engines = Engines()
    ids, _ = run(model, requests, engines=engines, cache=cache)
    assert [len(row) for row in ids] == [6] * len(requests)
    pages = engines.engine.workspace.cache
    assert pages.num_pages == model.config.text_config.max_position_embeddings // 64
    assert pages.num_free_pages == pages.num_pages
    assert not pages._sequences
    assert engines.engine.idle


def test_pages_that_do_not_come_back_end_the_call(model, requests):
    """Two requests in turn, each with the whole cache; the first keeps what it had."""
    engines, limits = Engines(), Limits(max_cache_tokens=64)
    tokens = iter(start(model, requests[:2], limits=limits, engines=engines))
    assert next(tokens).request == 0
    engines.engine.workspace.cache.free = lambda *_: None
    with pytest.raises(
        RuntimeError,
        match="the cache must have 1 free pages for request 1 when nothing runs, got 0 of 1",
    ):
        list(tokens)


def test_the_last_token_takes_no_room_in_the_cache(model):
    """59 words and 6 new tokens fill one page of 64 to its last row; 60 words need a second."""
    limits = Limits(max_cache_tokens=64)
    ids, _ = run(model, [Request(torch.arange(59) + 5)] * 2, limits=limits)
    assert [len(row) for row in ids] == [6, 6]
    longer = [Request(torch.arange(60) + 5)]
    assert [len(row) for row in run(model, longer, limits=Limits(max_cache_tokens=128))[0]] == [6]
    message = r"request 0 must fit .* needs 128 tokens, got room for 64"
    with pytest.raises(ValueError, match=message):
        run(model, longer, limits=limits)


def test_so_many_requests_run_at_once(model, requests, monkeypatch):
    whole = run(model, requests)
    monkeypatch.setattr(engine_module, "MAX_ROWS", 2)
    engines = Engines()
    ids = [[] for _ in requests]
    for token in start(model, requests, engines=engines):
        ids[token.request].append(token.token_id)
        assert len(engines.engine._running) <= 2
    assert ids == whole[0]


def test_stop_ids_end_one_request(model, requests):
    greedy, _ = run(model, requests)
    eos = greedy[2][2]
    ids, reasons = run(model, requests, eos=(eos,))
    for row, reason, whole in zip(ids, reasons, greedy, strict=True):
        end = whole.index(eos) + 1 if eos in whole else len(whole)
        assert row == whole[:end]
        assert reason == ("stop" if eos in whole else "length")
    assert len(ids[2]) <= 3


def test_either_stop_id_ends_a_request(model, requests):
    greedy, _ = run(model, requests[:2])
    eos = (greedy[0][1], greedy[1][2])
    ids, reasons = run(model, requests[:2], eos=eos)
    assert reasons == ["stop", "stop"]
    assert [row[-1] in eos for row in ids] == [True, True]
    assert [len(row) for row in ids] == [
        next(n for n, token in enumerate(row, 1) if token in eos) for row in greedy
    ]


def test_a_call_joins_and_leaves_while_others_run(model, requests):
    """Its tokens cost no step of their own while others run, and steps are shared."""
    want, _ = run(model, requests[:3])
    engines = Engines()
    calls = [iter(start(model, [one], engines=engines)) for one in requests[:3]]
    found = [[next(calls[0]).token_id, next(calls[0]).token_id], [next(calls[1]).token_id], []]
    for row, tokens in zip(found, calls, strict=True):
        row += [token.token_id for token in tokens]
    assert found == want
    steps = engines.engine.stats["steps"]
    assert steps < 3 * 5
    check_idle(engines.engine)


def test_first_come_first_served(model):
    """With room for one, in order; a small one behind a large one waits too."""
    engines, limits = Engines(), Limits(max_cache_tokens=192)
    prompts = [Request(torch.arange(count) % 50) for count in (150, 160, 3, 170, 2)]
    firsts = []
    for token in start(model, prompts, limits=limits, engines=engines):
        if token.request not in firsts:
            firsts.append(token.request)
        check(engines.engine.workspace.cache)
    assert firsts == [0, 1, 2, 3, 4]


def test_one_chunk_of_a_prompt_between_two_steps(model, monkeypatch):
    """A long prompt does not keep running requests waiting."""
    passes, forward = [], model.model.language_model.forward

    def recorded(hidden, positions, cache, layout):
        passes.append("step" if layout.is_decode else hidden.shape[0])
        return forward(hidden, positions, cache, layout)

    monkeypatch.setattr(model.model.language_model, "forward", recorded)
    engines, limits = Engines(), Limits(max_prefill_tokens=64)
    short = iter(
        start(model, [Request(torch.arange(9))], [SamplingParams(20)], (), limits, engines=engines)
    )
    next(short)
    del passes[:]
    ids, _ = run(model, [Request(torch.arange(300) % 60)], limits=limits, engines=engines)
    assert ids == run(model, [Request(torch.arange(300) % 60)])[0]
    chunks = [k for k, one in enumerate(passes) if one != "step"]
    assert [passes[k] for k in chunks[:5]] == [64, 64, 64, 64, 44]
    assert all(b - a >= 2 for a, b in itertools.pairwise(chunks[:5]))
    assert len(list(short)) == 19


PROMPT = 150  # tokens, in chunks of 64: two passes of the table and tower, three of the decoder


@pytest.mark.parametrize("events", range(12))
def test_leaving_at_every_point(model, requests, events):
    """A client that raises at an event of progress or a token; another one is not disturbed."""
    engines, limits = Engines(), Limits(max_prefill_tokens=64, max_patches_per_call=1)
    seen = []

    def leave():
        seen.append(1)
        if len(seen) > events:
            raise KeyboardInterrupt

    other = iter(start(model, requests[2:4], limits=limits, engines=engines))
    found = [next(other)]
    prompts = [Request(torch.arange(PROMPT) % 60), requests[3]]
    options = {"limits": limits, "engines": engines, "progress": lambda *_: leave()}

    def listen():
        for _ in start(model, prompts, **options):
            leave()

    with pytest.raises(KeyboardInterrupt):
        listen()
    cache = engines.engine.workspace.cache
    check(cache)
    assert len(cache._sequences) <= 2
    found += other
    check_idle(engines.engine)
    want, _ = run(model, requests[2:4])
    ids = [[token.token_id for token in found if token.request == k] for k in range(2)]
    assert ids == want
    assert run(model, prompts, limits=limits, engines=engines) == run(model, prompts)


ERRORS = [RuntimeError("broken"), torch.OutOfMemoryError("full"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("failing", range(7))
def test_an_error_in_any_pass(model, requests, monkeypatch, failing, error):
    """It reaches whom it touches, frees what they had, and the next call works."""
    engines, limits = Engines(), Limits(max_prefill_tokens=64)
    prompts = [Request(torch.arange(PROMPT) % 60), requests[3]]
    want = [run(model, prompts, limits=limits)[0], run(model, requests[2:3])[0]]
    forward, count = model.model.language_model.forward, iter(range(100))

    def fail(*arguments):
        if next(count) == failing:
            raise error
        return forward(*arguments)

    monkeypatch.setattr(model.model.language_model, "forward", fail)
    ended = []
    runs = [
        iter(start(model, prompts, limits=limits, engines=engines)),
        iter(start(model, requests[2:3], limits=limits, engines=engines)),
    ]
    ids = [[[], []], [[]]]
    live = [0, 1]
    while live:
        for k in list(live):
            try:
                token = next(runs[k])
                ids[k][token.request].append(token.token_id)
            except StopIteration:
                live.remove(k)
                assert ids[k] == want[k]
            except BaseException as raised:
                live.remove(k)
                ended.append(raised)
            check(engines.engine.workspace.cache)
    assert error in ended
    assert all(one is error or "all that ran was given up" in str(one) for one in ended)
    check_idle(engines.engine)
    assert run(model, prompts, limits=limits, engines=engines)[0] == want[0]
    check_idle(engines.engine)


def test_broken_logits_end_only_their_call(model, requests, monkeypatch):
    engines = Engines()
    bad, good = (
        start(model, requests[:1], engines=engines),
        start(model, requests[1:2], engines=engines),
    )
    tokens = [iter(bad), iter(good)]
    first = next(tokens[0])
    batch = engines.engine.workspace.batch
    read = batch.tokens
    ids = [next(tokens[1]).token_id]
    monkeypatch.setattr(batch, "tokens", lambda rows: [-1, *read(rows)[1:]])
    with pytest.raises(RuntimeError, match="logits of request 0 must hold a finite value"):
        list(tokens[0])
    monkeypatch.undo()
    ids += [token.token_id for token in tokens[1]]
    assert first.token_id == run(model, requests[:1])[0][0][0]
    assert ids == run(model, requests[1:2])[0][0]
    check_idle(engines.engine)


def test_bad_input_touches_nobody(model, requests):
    engines = Engines()
    tokens = iter(start(model, requests[:1], engines=engines))
    ids = [next(tokens).token_id]
    config = model.config
    for bad, message in (
        (Request(torch.tensor([10**6])), "input_ids must be in"),
        (Request(torch.tensor([config.image_token_id])), "as many image placeholders"),
        (Request(requests[2].input_ids, torch.zeros(24, 3, 7, 7), ((1, 4, 6),)), "of 14 x 14"),
    ):
        with pytest.raises(ValueError, match=message):
            start(model, [requests[1], bad], engines=engines)
    assert ids + [token.token_id for token in tokens] == run(model, requests[:1])[0][0]


def test_pixels_of_different_kinds_meet(model, requests):
    """One call has bytes, another one normalised values."""
    engines = Engines()
    values = requests[2].pixel_values.float() / 127.5 - 1
    normal = dataclasses.replace(requests[2], pixel_values=values, image_digests=None)
    want = [run(model, [one])[0][0] for one in (requests[2], normal)]
    assert run(model, [requests[2], normal], engines=engines)[0] == want


def test_a_call_within_a_call(model, requests):
    """From a callback it works, from within a pass it is refused instead of waiting for itself."""
    engines, inner = Engines(), []

    def call(*_):
        inner.append(run(model, requests[:1], engines=engines)[0])

    want = run(model, requests[:1])[0]
    assert run(model, requests[2:3], engines=engines, progress=call) == run(model, requests[2:3])
    assert inner
    assert inner == [want] * len(inner)
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(call)
    with pytest.raises(RuntimeError, match="must not be called from within a pass of its model"):
        run(model, requests[:1], engines=engines)
    hook.remove()
    check_idle(engines.engine)
    assert run(model, requests[:1], engines=engines)[0] == want


def test_threads_share_an_engine(model, requests):
    """Each has its own answers, whoever takes the turns."""
    engines = Engines()
    want = [run(model, [one])[0] for one in requests]
    barrier = Barrier(len(requests))

    def work(k):
        barrier.wait()
        return [
            run(model, [requests[(k + n) % len(requests)]], engines=engines)[0] for n in range(4)
        ]

    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(work, range(len(requests))))
    for k, rows in enumerate(found):
        assert rows == [want[(k + n) % len(requests)] for n in range(4)]
    check_idle(engines.engine)


def test_the_last_token_of_another_threads_turn_is_not_lost(model, requests):
    """It comes while this thread has just found its inbox empty."""
    engines = Engines()
    running = start(model, requests[:1], engines=engines)
    call = running._call

    class Inbox(deque):
        def __bool__(self):
            if call.left:
                call.left = 0
                self.append(Token(0, 7, "stop"))
                return False
            return len(self) > 0

    call.left, call.inbox = 1, Inbox()
    assert engines.engine.next(call).token_id == 7
    assert engines.engine.next(call) is None


def test_a_thread_that_dies_leaves_the_others(model, requests, monkeypatch):
    """Ctrl-C in one: those whose requests ran get an error, who waits does not."""
    engines, forward, count = Engines(), model.model.language_model.forward, iter(range(1000))

    def fail(*arguments):
        if next(count) == 3:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(model.model.language_model, "forward", fail)

    def work(k):
        try:
            return run(model, [requests[k]], engines=engines)[0]
        except (KeyboardInterrupt, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, [0, 1, 2, 3]))
    errors = [one for one in found if isinstance(one, BaseException)]
    assert sum(isinstance(one, KeyboardInterrupt) for one in errors) == 1
    for k, one in enumerate(found):
        assert one in errors or one == run(model, [requests[k]])[0]
    check_idle(engines.engine)


def test_dropped_runs_free_their_pages(model, requests, monkeypatch):
    """Also from a garbage collection in the middle of a turn, and from a cycle."""
    engines = Engines()
    tokens = iter(start(model, requests[:1], engines=engines))
    next(tokens)
    cycle = [tokens]
    cycle.append(cycle)
    del tokens, cycle
    want = run(model, requests[1:2])
    forward, collected = model.model.language_model.forward, []

    def collect(*arguments):
        if not collected:
            collected.append(gc.collect())
        return forward(*arguments)

    monkeypatch.setattr(model.model.language_model, "forward", collect)
    assert run(model, requests[1:2], engines=engines) == want
    assert collected
    check_idle(engines.engine)


def test_the_backend_is_that_of_the_call(model, requests, monkeypatch):
    """Whoever takes the turn, and between tokens the caller has its own choice."""
    found, forward = [], model.model.language_model.forward

    def recorded(*arguments):
        found.append(backends()["rms_norm"].why_not.get("triton"))
        return forward(*arguments)

    monkeypatch.setattr(model.model.language_model, "forward", recorded)
    engines, outside = Engines(), backends()["rms_norm"].why_not
    with use_backend("reference"):
        named = iter(start(model, requests[:1], engines=engines))
    for _ in named:
        assert backends()["rms_norm"].why_not == outside
    assert set(found) == {"backend 'reference' was asked for"}


def test_stop_from_outside(model, requests):
    running = start(model, requests)
    counts = [0] * len(requests)
    for token in running:
        counts[token.request] += 1
        if token.request == 1:
            running.stop(1)
    assert counts == [6, 1, 6, 6, 6]


def test_a_run_is_read_once(model, requests):
    running = start(model, requests[:2])
    assert len(list(running)) == 12
    assert list(running) == []


def test_stop_before_admission(model, requests):
    running = start(model, requests[:2], limits=Limits(max_cache_tokens=64))
    running.stop(1)
    assert {token.request for token in running} == {0}


def test_different_lengths_leave_the_batch_one_by_one(model, requests):
    params = [SamplingParams(max_new_tokens=n) for n in (1, 5, 2, 4, 3)]
    whole, _ = run(model, requests)
    ids, _ = run(model, requests, params)
    assert ids == [row[: p.max_new_tokens] for row, p in zip(whole, params, strict=True)]


def test_sampled_tokens_do_not_depend_on_neighbours(model, requests):
    params = [SamplingParams(8, temperature=1.5, top_k=50, top_p=0.99, seed=s) for s in range(5)]
    batch, _ = run(model, requests, params)
    alone = [run(model, [r], [p])[0][0] for r, p in zip(requests, params, strict=True)]
    assert batch == alone
    assert run(model, requests[::-1], params[::-1])[0] == alone[::-1]
    assert run(model, requests, limits=Limits(max_cache_tokens=64), params=params)[0] == alone


def test_seeds_matter(model, requests):
    params = [SamplingParams(8, temperature=1.5, seed=seed) for seed in range(4)]
    ids, _ = run(model, [requests[0]] * 4, params)
    assert len({tuple(row) for row in ids}) == 4


def test_repetition_penalty_counts_prompt_and_answer(model, requests):
    prompt = requests[0]
    strong = SamplingParams(24, repetition_penalty=1e9)
    ids, _ = run(model, [prompt], strong)
    assert len(set(ids[0])) == 24
    assert not set(ids[0]) & set(prompt.input_ids.tolist())
    mixed, _ = run(model, [prompt, requests[2]], [strong, dataclasses.replace(GREEDY)])
    assert mixed == [ids[0], run(model, [requests[2]])[0][0]]


def test_a_generated_placeholder_is_an_ordinary_token(model, requests):
    """Sources that look for features again would fail or crash here."""
    config = model.config
    head = torch.nn.Linear(
        config.text_config.hidden_size, config.text_config.vocab_size, device=model.device
    )
    torch.nn.init.zeros_(head.weight)
    head.bias.data[config.image_token_id] = 1.0
    running = start(model, requests[2:3], head=head)
    assert [token.token_id for token in running] == [config.image_token_id] * 6


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_broken_logits_are_not_answered(model, requests, penalty):
    head = torch.nn.Linear(
        model.config.text_config.hidden_size,
        model.config.text_config.vocab_size,
        device=model.device,
    )
    head.bias.data[:] = float("nan")
    params = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    running = start(model, requests[:1], [params], head=head)
    with pytest.raises(RuntimeError, match="logits of request 0 must hold a finite value"):
        list(running)


def test_the_context_ends_an_answer(model):
    context = model.config.text_config.max_position_embeddings
    prompt = Request(torch.full((context - 2,), 7))
    ids, reasons = run(model, [prompt], SamplingParams(10))
    assert (len(ids[0]), reasons) == (2, ["length"])


def test_prompt_longer_than_the_context(model):
    context = model.config.text_config.max_position_embeddings
    prompt = Request(torch.full((context,), 7))
    with pytest.raises(
        ValueError, match=f"input_ids of request 1 must be shorter than .*{context}"
    ):
        run(model, [Request(torch.tensor([1])), prompt])


def test_request_larger_than_the_cache(model, requests):
    with pytest.raises(ValueError, match=r"request 0 must fit into the cache .* got room for 64"):
        run(model, requests, SamplingParams(100), limits=Limits(max_cache_tokens=64))


def test_no_requests(model):
    with pytest.raises(ValueError, match="requests must hold at least one prompt, got none"):
        run(model, [])


def test_timings_are_filled(model, requests):
    running = start(model, requests)
    list(running)
    timings = running.timings
    assert min(timings.vision, timings.prefill, timings.decode) > 0


def test_cache_on_a_gpu_takes_what_is_free(model, requests, monkeypatch):
    """Counts PyTorch's idle blocks as free, and leaves room for activations and features."""
    free, reserved, allocated = 10 << 20, 7 << 20, 3 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    tokens = sum(request.input_ids.numel() for request in requests)
    patches = 2 * 24 + 2 * 32
    widest = max(patches * (7 * 144 + 2 * 288), tokens * (7 * 128 + 3 * 256)) * 4 + 5 * 576 * 5
    token = (2 * 2 * 128 + 128) * 4
    limits, weight = Limits(max_feature_bytes=1 << 20), model.lm_head.weight

    beside = memory.activation_bytes(model.config, requests, limits, 4)
    assert beside == widest
    pages = memory.free_pages(model.config, limits, weight, beside)
    assert pages == (int(0.9 * (14 << 20)) - widest - (1 << 20)) // (token * 64)
    free = reserved = allocated = 0
    assert memory.free_pages(model.config, limits, weight, beside) == 0
