"""Whole decode steps on the CUDA kernels, which "auto" may not choose yet, launched and captured.

Without a GPU `tests/native` runs these kernels one by one.
"""

import pytest
import torch

from keye_kernels import _ext, backends
from keye_model.checkpoint.config import PREVIEW
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.calls import Engines
from keye_model.inputs.request import Request
from testing.backends import trusting_cuda
from tests.model.engine.test_workspace import greedy, run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _ext.why_not() is not None,
    reason="needs a GPU and the CUDA extension",
)


@pytest.mark.parametrize("rows", [1, 3, 16, 17], ids="{} rows".format)
def test_captured_steps_equal_launched_ones(checkpoints, rows):
    """Long prompts are divided among blocks, the longest into more pieces than the others."""
    model = KeyeForConditionalGeneration.from_pretrained(
        checkpoints[PREVIEW.name], dtype=torch.bfloat16, device_map="auto"
    )
    lengths = [2100, *(1 + 37 * i for i in range(1, rows))]
    requests = [Request(torch.arange(length) * 7 % 90) for length in lengths]
    params, engines = greedy(*[9] * rows), Engines()
    with trusting_cuda():
        served = {op: by.backend for op, by in backends("cuda").items()}
        assert served["linear"] == served["paged_decode_attention"] == "cuda"
        assert served["qk_norm_mrope_store"] == "cuda"
        want = run(model, requests, params)
        for _ in range(3):  # run, captured, replayed
            assert run(model, requests, params, engines) == want
