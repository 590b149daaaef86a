"""The whole model on its Triton kernels: the same answers as on the definitions.

Without a GPU the kernels run under Triton's interpreter.
"""

from collections import Counter

import pytest
import torch

import keye_kernels
from keye_kernels import _backends
from keye_model import Keye
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine import decode_batch, vision_batch
from keye_model.engine.calls import Engines
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.request import Request
from tests.model.engine.test_workspace import run
from tests.model.tape import LaunchTape

ELSEWHERE = {"mrope_"}  # for other models: Keye's own rotation is part of qk_norm_mrope_store


@pytest.fixture
def launches(monkeypatch):
    """Route every op to its Triton backend, and count the calls of each op."""
    counts = Counter()

    def find(op, _):
        served = _backends._registry[op]
        counts[op] += 1
        return served["triton"].run

    def on():
        monkeypatch.setattr(_backends, "find", find)
        return counts

    return on


@pytest.mark.parametrize("name", [PREVIEW.name, V1_5.name])
def test_whole_model_equals_the_definitions(checkpoints, launches, name):
    keye = Keye.from_pretrained(checkpoints[name])
    config = keye.model.config
    start, end = config.vision_start_token_id, config.vision_end_token_id
    pixels = torch.randint(0, 256, (24, 3, 14, 14), dtype=torch.uint8)
    image = torch.tensor([start, *[config.image_token_id] * 4, end, 3])
    video = torch.tensor([start, *[config.video_token_id] * 2, end])
    requests = [
        Request(image, pixels[:16], ((1, 4, 4),)),
        Request(video, None, (), pixels[16:], ((2, 2, 2),), (0.5,)),
    ]
    greedy = {"max_new_tokens": 2, "do_sample": False, "repetition_penalty": 1.1}
    drawn = {"max_new_tokens": 2, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": [1, 2]}
    expected = [keye.generate(requests, **options) for options in (greedy, drawn)]
    logits = answer_logits(keye, requests[0])

    counts = launches()
    actual = [keye.generate(requests, **options) for options in (greedy, drawn)]
    for one, other in zip(actual, expected, strict=True):
        assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]
    torch.testing.assert_close(answer_logits(keye, requests[0]), logits, atol=2e-5, rtol=0)
    assert set(_backends._registry) - set(counts) == ELSEWHERE
    assert all("triton" in served for served in _backends._registry.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures for itself")
@pytest.mark.usefixtures("num_sms")
def test_captured_launches_equal_the_definitions(checkpoints, launches, recorder, monkeypatch):
    """The very launches that a graph would hold, replayed for other images and longer sequences."""
    monkeypatch.setattr(recorder, "tape", LaunchTape)
    monkeypatch.setattr(decode_batch, "_MIN_CAPACITY", 128)
    monkeypatch.setattr(vision_batch, "_MIN_PATCHES", 16)
    model = KeyeForConditionalGeneration.from_pretrained(checkpoints[PREVIEW.name])
    config = model.config
    start, end = config.vision_start_token_id, config.vision_end_token_id

    def chats(height, width, num_words):
        count = height * width
        pixels = torch.randint(0, 256, (count, 3, 14, 14), dtype=torch.uint8)
        image = [start, *[config.image_token_id] * (count // 4), end, 3]
        return [
            Request(torch.tensor(image), pixels, ((1, height, width),)),
            Request(torch.randint(5, 90, (num_words,))),
        ]

    params = [
        SamplingParams(3),
        SamplingParams(4, temperature=1.3, top_k=30, top_p=0.9, repetition_penalty=1.3, seed=4),
    ]
    runs = [chats(4, 4, 1), chats(2, 6, 7), chats(2, 4, 63)]  # 63: a second page within a replay
    want = [run(model, requests, params) for requests in runs]
    launches()
    engines = Engines()
    assert [run(model, requests, params, engines) for requests in runs] == want
    graphs = engines.engine.workspace.graphs._graphs
    assert list(graphs) == [("vision", 16, 2), ("decode", 2, 128, True), ("decode", 1, 128, True)]
    tower, *steps = [Counter(tape.kernels) for tape in graphs.values()]
    assert tower == {
        "_layer_norm_kernel": 4, "_rope_kernel": 2, "_attention_kernel": 2, "_gelu_kernel": 2
    }  # fmt: skip
    layer = {
        "_qk_norm_mrope_store_kernel", "_paged_decode_attention_kernel", "_rms_norm_kernel",
        "_silu_mul_kernel", "_sample_scan_kernel", "_sample_choose_kernel",
    }  # fmt: skip
    assert all(layer <= set(step) for step in steps)


def answer_logits(keye, request):
    return keye.model(
        request.input_ids[None],
        pixel_values=request.pixel_values,
        image_grid_thw=request.image_grid_thw,
    ).logits


def test_backend_by_name(preview_checkpoint):
    keye = Keye.from_pretrained(preview_checkpoint)
    named = Keye.from_pretrained(preview_checkpoint, backend="triton")
    request = Request(torch.tensor([3, 4, 5]))
    options = {"max_new_tokens": 2, "do_sample": False}
    assert named.generate(request, **options).token_ids == (
        keye.generate(request, **options).token_ids
    )


def test_every_kernel_is_chosen_on_a_gpu():
    """`auto` on CUDA tensors takes Triton wherever there is a kernel."""
    served = keye_kernels.backends("cuda")
    chosen = {op for op, by in served.items() if by.backend == "triton"}
    assert chosen == set(served)
