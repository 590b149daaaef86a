"""The whole model on its Triton kernels: the same answers as on the definitions.

Without a GPU the kernels run under Triton's interpreter.
"""

from collections import Counter

import pytest
import torch

import keye_kernels
from keye_kernels import _backends
from keye_model import Keye
from keye_model.config import PREVIEW, V1_5
from keye_model.inputs import Request

GEMM = {"linear_decode"}  # a matrix product: PyTorch's, unless the CUDA extension serves it
ELSEWHERE = {"mrope_"}  # for other models: Keye's own rotation is part of qk_norm_mrope_store


@pytest.fixture
def launches(monkeypatch):
    """Route every op with a Triton kernel to it, and count the calls of each op."""
    counts = Counter()

    def find(op, _):
        served = _backends._registry[op]
        counts[op] += 1
        return served["triton" if "triton" in served else "reference"].run

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
    without = {op for op, served in _backends._registry.items() if "triton" not in served}
    assert without == GEMM


def answer_logits(keye, request):
    return keye.model(
        request.input_ids[None],
        pixel_values=request.pixel_values,
        image_grid_thw=request.image_grid_thw,
    ).logits


def test_backend_by_name(preview_checkpoint):
    """What the model calls where there is no ``linear_decode`` is ``torch.nn.Linear``."""
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
    assert chosen == set(served) - GEMM
