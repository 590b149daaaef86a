"""The cost model against the published checkpoint's own numbers, worked out from its shapes."""

import dataclasses
import functools
import math

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.interpreter import GridExecutor

from keye_kernels import _backends
from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig, KeyeTextConfig, KeyeVisionConfig
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.calls import Engines
from keye_model.engine.plan import Costs, plan
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.request import Request
from keye_model.network.cache import PagedCache
from keye_model.network.features import vision_features

TEXT = KeyeTextConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    max_position_embeddings=40960,
)
VISION = KeyeVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    spatial_merge_size=2,
    tokens_per_second=2,
)


def config(variant=PREVIEW):
    return KeyeConfig(TEXT, VISION, variant, 151655, 151656, 151652, 151653)


def request(num_tokens, images=(), videos=()):
    def pixels(grid):
        return torch.empty((sum(map(math.prod, grid)), 3, 14, 14), dtype=torch.uint8)

    ids = torch.zeros(num_tokens, dtype=torch.int64)
    return Request(
        ids,
        pixels(images) if images else None,
        images,
        pixels(videos) if videos else None,
        videos,
    )


def test_costs_of_the_8b_checkpoint():
    costs = Costs.of(config())
    assert costs.vision_linear == 823_495_680
    assert costs.vision_attention == 124_416
    assert costs.projector == 80_216_064
    assert costs.text_linear == 13_891_534_848
    assert costs.text_attention == 589_824
    assert costs.lm_head == 1_244_659_712
    assert costs.weight_bytes == 2 * 8_643_841_648
    assert costs.decode_bytes == 15_136_194_560
    assert costs.cache_bytes == 147_456


def test_plan_image_of_1280_tokens():
    counts = plan(config(), [request(1310, images=((1, 64, 80),))], 1)
    assert (counts.patches, counts.image_tokens, counts.longest_segment) == (5120, 1280, 5120)
    assert counts.vision_flops == pytest.approx(7.580e12, rel=1e-3)
    assert counts.prefill_flops == pytest.approx(18.7e12, rel=1e-2)
    assert counts.floor_seconds(790e12, 4.3e12)["vision"] == pytest.approx(9.60e-3, rel=1e-3)
    widest = max(5120 * (7 * 1152 + 2 * 4304), 1310 * (3 * 4096 + 3 * 12288))
    assert counts.activation_bytes == 2 * widest + 5 * 151936


def test_plan_counts_the_embeddings_of_what_waits():
    one_pass, long = (
        plan(config(), [request(count)], 1).activation_bytes for count in (8192, 40000)
    )
    assert long - one_pass == (40000 - 8192) * 4096 * 2


@pytest.mark.parametrize(
    ("variant", "teraflops", "segment"), [(PREVIEW, 161.2, 32768), (V1_5, 29.73, 512)], ids=str
)
def test_plan_video_segments_follow_the_variant(variant, teraflops, segment):
    counts = plan(config(variant), [request(8200, videos=((64, 16, 32),))], 1)
    assert counts.video_tokens == 64 * 128
    assert counts.longest_segment == segment
    assert counts.vision_flops == pytest.approx(teraflops * 1e12, rel=1e-3)


def test_plan_decode_step_is_bound_by_bytes():
    counts = plan(config(), [request(8191)] * 32, 1)
    assert counts.decode_step_bytes == pytest.approx(53.79e9, rel=1e-3)
    step = counts.floor_seconds(790e12, 4.3e12)["decode_step"]
    assert step == pytest.approx(12.51e-3, rel=1e-3)


class Peak(TorchDispatchMode):
    """The most bytes that meta tensors made inside it hold at once. Kernels do not run.

    Attributes:
        bytes: That many. Views of ``given``, weights for example, hold none.
    """

    def __init__(self, given):
        super().__init__()
        self.bytes = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._alive = WeakTensorKeyDictionary()  # (storage, its bytes) of each tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "keye":  # what a launcher allocates counts too
            with self:
                return _backends.find(func._schema.name.partition("::")[2], "cuda")(*args)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._alive[tensor] = storage._cdata, storage.nbytes()
        self.bytes = max(self.bytes, sum(dict(self._alive.values()).values()))
        return out


@pytest.fixture
def two_layers(monkeypatch):
    """The published widths with two layers, of which the second repeats in the others."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)

    def make(variant):
        text = dataclasses.replace(TEXT, num_hidden_layers=2)
        vision = dataclasses.replace(VISION, num_hidden_layers=2)
        small = dataclasses.replace(config(variant), text_config=text, vision_config=vision)
        with torch.device("meta"):
            return KeyeForConditionalGeneration(small).to(small.dtype).model

    with _backends.use_backend("triton"), torch.inference_mode():
        yield make


# Of the tower's 7 hidden widths beside those of the MLP 5 live at once: the branch and the residual
# stream, as they came and as the norm before the MLP leaves them, and the layers' own input: 14368
# of 16672 elements per patch. Of the decoder's 3 live 2: 45056 of 49152 elements per token.
SPARE = 1.2


@pytest.mark.parametrize(
    ("variant", "grid"),
    [(PREVIEW, (1, 64, 80)), (PREVIEW, (64, 40, 72)), (V1_5, (64, 40, 72))],
    ids=["image", "whole video", "frames in parts"],
)
def test_workspace_bounds_the_tower(variant, grid, two_layers):
    model = two_layers(variant)
    pixels = torch.empty(math.prod(grid), 3, 14, 14, dtype=torch.uint8, device="meta")
    peak = Peak([pixels, *model.parameters()])
    with peak:
        for features in vision_features(model.visual, model.mlp_AR, pixels, (grid,)):
            assert features.shape[1] == 4096
    one = Request(torch.zeros(1, dtype=torch.int64), pixels, (grid,))
    planned = plan(config(variant), [one], 1).activation_bytes
    assert peak.bytes <= planned <= SPARE * peak.bytes


def test_workspace_bounds_the_decoder(two_layers):
    model, count = two_layers(PREVIEW), 4100
    cache = PagedCache(model.config.text_config, 65, dtype=torch.bfloat16, device="meta")
    step = cache.append([cache.add(count)], [count])
    ids, positions = torch.empty(4, count, dtype=torch.int64, device="meta").split((1, 3))
    peak = Peak([*cache.layer(0), *model.parameters()])
    with peak:
        model(model.language_model.embed_tokens(ids[0]), positions, cache, step)
    planned = plan(config(), [request(count)], 1).activation_bytes
    assert peak.bytes <= planned <= SPARE * peak.bytes


@pytest.mark.parametrize("name", [PREVIEW.name, V1_5.name])
@pytest.mark.parametrize(
    ("prompts", "max_new_tokens"),
    [([5, 64, 1], 1), ([63, 65, 7], 2), ([5, 130], 64), ([1020], 30)],
    ids=["prompts alone", "page edges", "answers", "context ends"],
)
def test_plan_matches_what_is_allocated(checkpoints, name, prompts, max_new_tokens):
    raw = KeyeConfig.from_pretrained(checkpoints[name])
    text = dataclasses.replace(raw.text_config, max_position_embeddings=1024)
    model = loaded(checkpoints[name])
    model.model.config = dataclasses.replace(raw, text_config=text)
    requests = [request(count) for count in prompts]
    counts = plan(model.model.config, requests, max_new_tokens)
    params = [SamplingParams(max_new_tokens)] * len(requests)
    engines, used, count = Engines(), 0, 0
    for _ in engines.run(model.model, model.lm_head, requests, params, eos_token_ids=()):
        cache, count = engines.engine.workspace.cache, count + 1
        if count == len(requests):  # each has its pages, unless it has ended
            used = cache.num_pages - cache.num_free_pages
    assert counts.kept_cache_bytes == cache.num_bytes
    assert max_new_tokens == 1 or counts.cache_bytes == used * cache.num_bytes // cache.num_pages
    assert counts.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    assert count == sum(min(max_new_tokens, 1024 - count) for count in prompts)


@functools.cache
def loaded(directory):
    return KeyeForConditionalGeneration.from_pretrained(directory)


def test_plan_of_more_requests_than_run_at_once():
    counts = plan(config(), [request(64)] * 300 + [request(640)], 1)
    assert counts.cache_bytes == (255 + 10) * 64 * 147_456
    assert len(counts.prompt_tokens) == 301


def test_an_engine_keeps_a_whole_context():
    one, many = (plan(config(), [request(8000)] * count, 193) for count in (1, 8))
    assert one.cache_bytes == 128 * 64 * 147_456
    assert one.kept_cache_bytes == 40960 * 147_456
    assert many.kept_cache_bytes == many.cache_bytes == 8 * one.cache_bytes


def test_plan_of_a_prompt_that_is_too_long():
    assert plan(config(), [request(40960)], 512).cache_bytes == 40960 * 147_456


def test_plan_refuses_no_new_tokens():
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        plan(config(), [request(4)], 0)
