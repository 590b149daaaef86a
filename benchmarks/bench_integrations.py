"""What a call of a patched module of transformers costs the host: microseconds, on tiny tensors.

Three times each: the library's module; ours; and ours with the guard, which asks at every call
whether children are what they were, taken out. The difference of the last two is its cost.
"""

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import Qwen3Config, Qwen3Model

from benchmarks.timing import DEVICE, race
from keye_kernels.integrations import _layers
from keye_kernels.integrations.transformers import apply

CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32,
)  # fmt: skip
MODULES = {"norm": "norm", "mlp": "layers.0.mlp", "decoder layer": "layers.0"}


def _unguarded() -> AbstractContextManager:
    return mock.patch.multiple(_layers, is_itself=lambda *_: True, fits=lambda *_: True)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3Model(CONFIG).eval().to(DEVICE)


@pytest.mark.parametrize("part", MODULES)
def bench_guard(request, part):
    plain, patched = _model(), _model()
    apply(patched)
    x = torch.randn(1, 1, CONFIG.hidden_size, device=DEVICE)
    position_ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    calls = {}
    for name, model in (("transformers", plain), ("ours", patched)):
        module, more = model.get_submodule(MODULES[part]), {}
        if part == "decoder layer":
            rotation = model.rotary_emb(x, position_ids)
            more = {"attention_mask": None, "position_embeddings": rotation}
        calls[name] = lambda module=module, more=more: module(x, **more)
    calls["unguarded"] = calls["ours"]
    torch.testing.assert_close(calls["ours"](), calls["transformers"]())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which have nothing to do, and wait for each other
    times = race(
        calls,
        dict,
        seconds=request.config.getoption("--seconds"),
        launched=calls.keys(),  # in a CUDA graph the host would have nothing to do
        contexts={"unguarded": _unguarded},
    )
    torch.set_num_threads(threads)
    us = {name: 1e6 * timing.median for name, timing in times.items()}
    print(
        f"\n{part}: transformers {us['transformers']:.1f} us, ours {us['ours']:.1f} us, "
        f"of it the guard {us['ours'] - us['unguarded']:.1f} us"
    )
