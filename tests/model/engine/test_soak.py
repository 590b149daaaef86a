"""Four threads of clients that ask, leave, fail and forget at random: nothing leaks, nobody errs.

KEYE_SOAK_SECONDS lets it go on for so long (`make soak`); otherwise each thread makes few requests.
"""

import gc
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.calls import Engines
from keye_model.engine.job import Call, Job
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.request import Request
from tests.model.engine.prompts import check_idle, picture, request, start, tokens, video, words

SECONDS = float(os.environ.get("KEYE_SOAK_SECONDS", 0))
THREADS, REQUESTS = 4, 15
LIMITS = Limits(max_cache_tokens=64 * 9, max_prefill_tokens=100, max_feature_bytes=64 << 10)
SAMPLED = SamplingParams(7, temperature=1.3, top_k=40, seed=3)
HISTORIES = [
    [words(0, 70), picture(0), words(1, 40), video(0), words(2, 60)],
    [words(0, 70), picture(1), words(1, 40), video(1, 2, 2.0)],
    [picture(0, 16, 16), words(3, 30), picture(1), words(0, 90)],
    [video(0, 4), words(1, 64), words(2, 64)],
]


def resident_bytes():
    """Memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def alive():
    """Calls and jobs that something still refers to."""
    gc.collect()
    return {one for one in gc.get_objects() if type(one) in (Call, Job)}


class Client:
    """One thread's requests, in an order drawn from its seed."""

    def __init__(self, model, engines, seed, cold):
        self.model, self.engines, self.cold = model, engines, cold
        self.draw = random.Random(seed)
        self.done = 0

    def ask(self):
        key = self.draw.choice(list(self.cold))
        prompt, params = request(self.model.config, key[0]), key[1]
        what = self.draw.choice([self.answer, self.answer, self.leave, self.stop, self.fail])
        what(prompt, params, self.cold[key])
        if self.draw.random() < 0.05:
            self.engines.clear_cache()
        self.done += 1

    def start(self, prompts, params, **options):
        return start(self.model, prompts, self.engines, params, limits=LIMITS, **options)

    def answer(self, prompt, params, want):
        count = self.draw.randint(1, 3)
        found = [[] for _ in range(count)]
        for token in self.start([prompt] * count, params):
            found[token.request].append(token.token_id)
        assert found == [want] * count

    def leave(self, prompt, params, want):
        running = iter(self.start([prompt], params))
        for expected in want[: self.draw.randint(0, 4)]:
            assert next(running).token_id == expected
        if self.draw.random() < 0.5:
            running.close()

    def stop(self, prompt, params, want):
        running = self.start([prompt] * 2, params)
        found = []
        for token in running:
            if token.request == 1:
                running.stop(1)
            else:
                found.append(token.token_id)
        assert found == want

    def fail(self, prompt, params, want):
        if self.draw.random() < 0.5:
            bad = Request(torch.tensor([self.model.config.image_token_id]))
            with pytest.raises(ValueError, match="as many image placeholders"):
                self.start([prompt, bad], params)
            return
        left = self.draw.randint(0, 5)

        def progress(*_):
            nonlocal left
            left -= 1
            if left < 0:
                raise LookupError

        try:
            found = [token.token_id for token in self.start([prompt], params, progress=progress)]
        except LookupError:
            return
        assert found == want


@pytest.mark.parametrize("line", [PREVIEW, V1_5], ids=lambda line: line.name)
def test_soak(checkpoints, line):
    model = KeyeForConditionalGeneration.from_pretrained(checkpoints[line.name], device_map="auto")
    prompts = [one[: k + 1] for one in HISTORIES for k in range(len(one))]
    cold = {}
    for params in (SamplingParams(5), SAMPLED):
        for pieces in prompts:
            key = tuple(pieces), params
            [cold[key]] = tokens(model, [request(model.config, pieces)], params=params)
    engines, earlier = Engines(), alive()
    clients = [Client(model, engines, seed, cold) for seed in range(THREADS)]
    sizes, end = [], time.monotonic() + SECONDS / 2

    def work(client):
        while client.done < REQUESTS or (SECONDS and time.monotonic() < end):
            client.ask()
            if client is clients[0] and client.done % REQUESTS == 0:
                sizes.append(resident_bytes())

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, clients))
    check_idle(engines.engine)
    assert engines.engine.features.num_bytes <= LIMITS.max_feature_bytes
    assert engines.engine.stats["cached tokens"] > 0
    assert not alive() - earlier
    if len(sizes) > 20:  # after the first rounds, which fill caches and the allocator's pools
        settled = max(sizes[: len(sizes) // 4])
        assert max(sizes) < settled + (64 << 20), f"grew from {settled} to {max(sizes)} bytes"
