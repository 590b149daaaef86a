"""Between two GEMMs a layer calls our ops and nothing else: no elementwise op, cast or copy."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.network.cache import PagedCache
from keye_model.network.features import vision_features
from keye_model.network.vision import vision_layout
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
    step = vision_layout(grid, True, 2, model.device)
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
    cache.append([handle], [3])
    for pages in (cache.k, cache.v):
        pages.zero_()
    positions = torch.arange(new_tokens, device=model.device).expand(3, -1).contiguous()
    return positions, cache, cache.append([handle], [new_tokens])


@pytest.mark.parametrize(
    ("new_tokens", "attention"),
    [(17, "keye.paged_prefill_attention"), (1, "keye.paged_decode_attention")],
)
@torch.no_grad()
def test_decoder_layer(model, new_tokens, attention):
    hidden = torch.randn(new_tokens, model.config.text_config.hidden_size, device=model.device)
    step = decoder_step(model, new_tokens)
    with Recorder() as recorder:
        model.language_model.layers[0](hidden, *step)
    ops = {"keye.linear": 4, "keye.qk_norm_mrope_store": 1, attention: 1}
    assert moving(recorder.ops) == ops
    assert not any(recorder.ops[name] for name in _GEMM)


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
    step = vision_layout(grid, variant.joint_video_attention, 2, model.device)

    def ops(run):
        with Recorder() as recorder:
            run()
        return recorder.ops

    x = torch.randn(16, 144, device=model.device)
    layers = Counter()
    for layer in model.visual.layers:
        layers += ops(lambda layer=layer: layer(x, x, step))
    start = ops(lambda: model.visual.encode(pixels, grid)) - layers
    end = ops(lambda: model.visual(pixels, grid)) - layers - start
    assert moving(end) == {"keye.layer_norm": 1}
    end = (
        ops(lambda: list(vision_features(model.visual, model.mlp_AR, pixels, grid)))
        - layers
        - start
    )
    assert moving(end) == {"keye.merge_patches": 1, "keye.gelu": 1}
