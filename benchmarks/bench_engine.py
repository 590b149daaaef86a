"""What the engine saves: later turns, requests of several threads, prompts beside running ones.

Published widths with few layers. `-s` shows the ratios, each of one run, so that a shared machine
matters little, and the share that digests have of the time pictures take to be processed.
"""

import io
import itertools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="benchmarks.models builds its peers too")

from benchmarks import models
from benchmarks.models import IMAGE
from benchmarks.timing import ON_GPU
from keye_model.engine.calls import Engines
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.request import Request, patch_digest
from keye_model.processing.image_processor import KeyeImageProcessor

VIDEO, START, END = 5, 6, 7
# (placeholder, grid): 1230 tokens, and 64 frames of 256 tokens, on a CPU of 16.
SHOWN = {
    "picture": (IMAGE, (1, 60, 82)),
    "video": (VIDEO, (64, 32, 32) if ON_GPU else (64, 8, 8)),
}
NEW_TOKENS = 32
CHUNK = 2048 if ON_GPU else 64


@pytest.fixture(scope="module")
def ours():
    model = models.build_ours()
    return model if ON_GPU else model.float()  # what CPUs are fast at


def show(case, name, value, other, base, unit):
    print(
        f"\n{case}: {name} {value:.4g} {unit}, {other} {base:.4g}, ratio {value / base:.3g}", end=""
    )


def words(count):
    return torch.randint(100, 2000, (count,))


def start(ours, engines, ids, new_tokens=NEW_TOKENS, limits=None, **pixels):
    params, request = [SamplingParams(new_tokens)], Request(ids, **pixels)
    options = {"eos_token_ids": (), "limits": limits}
    return engines.run(ours.model, ours.lm_head, [request], params, **options)


def first_token(running):
    """(seconds, token)"""
    started = time.perf_counter()
    tokens = iter(running)
    token = next(tokens).token_id
    seconds = time.perf_counter() - started
    tokens.close()
    return seconds, token


@pytest.mark.parametrize("kind", SHOWN)
def bench_second_turn(ours, kind):
    """Time to the first token of a second turn: nothing kept, over everything kept."""
    placeholder, grid = SHOWN[kind]
    count = int(np.prod(grid))
    pixels = torch.randint(0, 256, (count, 3, 14, 14), dtype=torch.uint8)
    name = "pixel_values" if kind == "picture" else "pixel_values_videos"
    grids = "image_grid_thw" if kind == "picture" else "video_grid_thw"
    shown = {name: pixels, grids: (grid,)}
    block = torch.tensor([START, *[placeholder] * (count // 4), END])
    first, new = torch.cat([words(12), block, words(20)]), words(24)
    engines = Engines()
    start(ours, engines, first[-9:], 2)  # makes the engine
    cold, warm = [], []
    for _ in range(5 if ON_GPU else 1):
        engines.clear_cache()
        answer = [token.token_id for token in start(ours, engines, first, **shown)]
        second = torch.cat([first, torch.tensor(answer), new])
        seconds, token = first_token(start(ours, engines, second, **shown))
        warm.append(seconds)
        engines.clear_cache()
        seconds, again = first_token(start(ours, engines, second, **shown))
        cold.append(seconds)
        assert ON_GPU or token == again
    cold, warm = map(statistics.median, (cold, warm))
    show(f"second turn, {kind} of {count // 4} tokens", "cold", cold, "warm", warm, "s")


def bench_threads(ours):
    """Tokens per second of eight threads with one request each, over one after another."""
    engines, prompts = Engines(), [words(16 + k) for k in range(8)]

    def ask(prompt, wait=lambda: None):
        wait()
        return [token.token_id for token in start(ours, engines, prompt)]

    ask(prompts[0])
    engines.clear_cache()
    started = time.perf_counter()
    alone = [ask(prompt) for prompt in prompts]
    one_by_one = 8 * NEW_TOKENS / (time.perf_counter() - started)
    engines.clear_cache()
    barrier = Barrier(8)
    started = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda prompt: ask(prompt, barrier.wait), prompts))
    together = 8 * NEW_TOKENS / (time.perf_counter() - started)
    assert ON_GPU or found == alone
    show("eight threads", "together", together, "one after another", one_by_one, "tokens/s")


def bench_prompt_beside_running_requests(ours):
    """The longest gap between tokens while a long prompt is read, over the time of its chunk."""
    engines, limits = Engines(), Limits(max_prefill_tokens=CHUNK)
    running = iter(start(ours, engines, words(16), 400, limits))
    for _ in range(4):
        next(running)
    alone = start(ours, engines, words(8 * CHUNK), 1, limits)
    times = []
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(first_token, alone)
        while not reading.done():
            next(running)
            times.append(time.perf_counter())
    running.close()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    chunk = alone.timings.prefill / 8
    show(f"8 chunks of {CHUNK}", "longest gap", max(gaps), "a chunk", chunk, "s")


def bench_digest():
    """Digests over processing, of a photo of 1080p and of one that need not be resized."""
    processor = KeyeImageProcessor()
    for width, height in ((1920, 1080), (1148, 840)):
        size = (height // 4, width // 4, 3)
        small = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((width, height)).save(file, "JPEG", quality=90)
        spent = [], []
        for _ in range(9):
            marks = [time.perf_counter()]
            patches = processor.patches(Image.open(io.BytesIO(file.getvalue()))).pixels
            marks.append(time.perf_counter())
            patch_digest(patches)
            marks.append(time.perf_counter())
            for seconds, (before, after) in zip(spent, itertools.pairwise(marks), strict=True):
                seconds.append(after - before)
        processing, digest = map(statistics.median, spent)
        show(f"{width} x {height}", "digest", digest, "processing", processing, "s")
