"""Whole models under torch.compile, which is slow: `make test-transformers` runs it."""

import os

import pytest
import torch

pytest.importorskip("transformers")

from keye_kernels.integrations.transformers import apply
from tests.integrations.test_transformers import Calls, assert_equal
from tests.integrations.tiny import CASES, GRID, expected, pixels

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.skipif(
        not os.environ.get("KEYE_TEST_TRANSFORMERS"), reason="slow; make test-transformers runs it"
    ),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tower])
def test_tower(name):
    # transformers' towers read their grid in the middle, which breaks the graph.
    case, model = CASES[name], CASES[name].build()
    grid, patches = torch.tensor(GRID), pixels(56, *case.pixels)
    with torch.no_grad():
        want = case.tower(model, patches, grid)
        apply(model)
        model.model.visual.forward = torch.compile(model.model.visual.forward, backend="aot_eager")
        with Calls() as calls:
            assert_equal([case.tower(model, patches, grid)], [want])
    assert calls.counts["varlen_attention"] == 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "mrope_" in case.calls])
def test_decoder_without_a_break(name):
    model = CASES[name].build()
    decoder = model.model if name == "qwen3" else model.model.language_model
    inputs = {"inputs_embeds": pixels(2, 20, 64), "use_cache": False}
    with torch.no_grad():
        want = decoder(**inputs).last_hidden_state
        apply(model)
        compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
        with Calls() as calls:
            assert_equal([compiled(**inputs).last_hidden_state], [want])
    # Attention is sdpa's where transformers cannot tell, while it traces, whether rows are packed.
    assert calls.counts["mrope_"] == calls.counts["silu_mul"] == 2


def test_siglip2():
    model = CASES["siglip2"].build()
    apply(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert_equal(CASES["siglip2"].call(compiled), expected("siglip2"))
