"""Between two GEMMs a layer calls our ops and nothing else: no elementwise op, cast or copy."""

from collections import Counter
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keye_model import text
from keye_model.cache import PagedCache
from keye_model.config import PREVIEW, V1_5
from keye_model.vision import plan_step
from tests.model import tiny

# A GEMM, and what moves no data: views, and the destinations of our ops.
_FREE = {"aten.t", "aten.view", "aten._unsafe_view", "aten.unbind", "aten.select", "aten.slice"}
_FREE |= {"aten.alias", "aten.detach", "aten.transpose", "aten.empty", "aten.empty_like"}
_FREE |= {"aten.new_empty", "aten.reshape", "aten.unflatten", "aten.flatten", "aten.split"}
_GEMM = {"aten.mm", "aten.addmm", "aten.linear"}


class Recorder(TorchDispatchMode):
    """Counts ops by name without their overload."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def moving(ops):
    """What touches memory, GEMMs apart."""
    return {name: count for name, count in ops.items() if name not in _FREE | _GEMM}


@pytest.fixture
def model():
    return tiny.tiny_keye(PREVIEW).model


@torch.no_grad()
def test_vision_layer(model):
    grid = ((1, 4, 4),)
    step = plan_step(grid, True, 2, model.device)
    x = torch.randn(16, 144, device=model.device)
    residual = torch.randn_like(x)
    with Recorder() as recorder:
        model.visual.layers[0](x, residual, step)
    assert moving(recorder.ops) == {
        "keye.layer_norm": 2,
        "keye.rope_2d_": 1,
        "keye.varlen_attention": 1,
        "keye.gelu": 1,
    }
    assert sum(recorder.ops[name] for name in _GEMM) == 4


def decoder_step(model, new_tokens, dtype=torch.float32):
    """What a decoder layer takes beside the hidden states, for one sequence."""
    text = model.config.text_config
    cache = PagedCache(text, 2, dtype=dtype, device=model.device)
    handle = cache.add()
    cache.step([handle], [3])
    for pages in (cache.k, cache.v):
        pages.zero_()
    positions = torch.arange(new_tokens, device=model.device).expand(3, -1).contiguous()
    return positions, cache, cache.step([handle], [new_tokens])


@torch.no_grad()
def test_decoder_layer(model):
    hidden = torch.randn(17, model.config.text_config.hidden_size, device=model.device)
    residual, step = torch.randn_like(hidden), decoder_step(model, 17)
    with Recorder() as recorder:
        model.language_model.layers[0](hidden, residual, *step)
    assert moving(recorder.ops) == {
        "keye.rms_norm": 2,
        "keye.qk_norm_mrope_store": 1,
        "keye.paged_prefill_attention": 1,
        "keye.silu_mul": 1,
    }
    assert sum(recorder.ops[name] for name in _GEMM) == 4


@torch.no_grad()
def test_decoder_layer_of_few_rows(model):
    hidden = torch.randn(1, model.config.text_config.hidden_size, device=model.device)
    step = decoder_step(model, 1)
    with Recorder() as recorder:
        model.language_model.layers[0].decode(hidden, *step)
    assert moving(recorder.ops) == {
        "keye.linear_decode": 4,
        "keye.qk_norm_mrope_store": 1,
        "keye.paged_decode_attention": 1,
    }
    assert not any(recorder.ops[name] for name in _GEMM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_few_rows_are_rounded_like_many(model, dtype, monkeypatch):
    """Where linear_decode serves, norms, SwiGLU and residual adds are part of it: the same bits."""
    decoder = deepcopy(model).to(dtype).language_model
    hidden = torch.randn(1, decoder.config.hidden_size, device=model.device).to(dtype)
    step = decoder_step(model, 1, dtype)
    results = []
    for serves in (False, True):
        with Recorder() as recorder, monkeypatch.context() as patch:
            patch.setattr(text, "_served_by_linear_decode", lambda _, serves=serves: serves)
            results.append(decoder(hidden, *step))
        assert recorder.ops["keye.rms_norm"] == (1 if serves else 2 * len(decoder.layers) + 1)
    assert torch.equal(*results)


def test_linear_decode_serves_on_a_gpu_by_its_cuda_kernel_only(monkeypatch):
    def serves(rows, device):
        x = SimpleNamespace(shape=(rows, 8), device=torch.device(device))
        return text._served_by_linear_decode(x)

    for backend in ("cuda", "reference"):
        served = SimpleNamespace(backend=backend)
        monkeypatch.setattr(text, "backends", lambda _, served=served: {"linear_decode": served})
        assert not serves(16, "cpu"), "PyTorch's own product serves there"
        assert serves(16, "cuda") == (backend == "cuda")
        assert not serves(17, "cuda")


@torch.no_grad()
def test_projector(model):
    x = torch.randn(16, 144, device=model.device)
    with Recorder() as recorder:
        model.mlp_AR(x, ((1, 4, 4),))
    assert moving(recorder.ops) == {"keye.merge_patches": 1, "keye.gelu": 1}


@pytest.mark.parametrize("variant", [PREVIEW, V1_5], ids=lambda v: v.name)
@torch.no_grad()
def test_from_the_last_layer_to_the_projector(variant):
    """The last residual add and norm are part of the merge; the tower alone ends with one norm."""
    model = tiny.tiny_keye(variant).model
    grid = ((1, 4, 4),)
    pixels = tiny.pixels("pixel_values", 16).to(model.device)
    step = plan_step(grid, variant.joint_video_attention, 2, model.device)

    def ops(run):
        with Recorder() as recorder:
            run()
        return recorder.ops

    x = torch.randn(16, 144, device=model.device)
    layers = Counter()
    for layer in model.visual.layers:
        layers += ops(lambda layer=layer: layer(x, x, step))
    start = ops(lambda: model.visual(pixels, grid, final_norm=False)) - layers
    end = ops(lambda: model.visual(pixels, grid)) - layers - start
    assert moving(end) == {"keye.layer_norm": 1}
    end = ops(lambda: list(model._encode(pixels, grid, 16))) - layers - start
    assert moving(end) == {"keye.merge_patches": 1, "keye.gelu": 1}
