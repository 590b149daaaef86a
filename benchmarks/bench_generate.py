"""Tower, prefill, decode and whole generation against transformers, with the same weights in both.

Peers: transformers' PaddleOCR-VL tower (descended from Keye's) and Qwen3 decoder, both with SDPA.
Widths are the published checkpoint's; layers are two and two and the vocabulary is cut to 8192 on a
CPU, so that the run fits a small machine. Results are compared before anything is timed.
"""

import dataclasses

import pytest
import torch

from keye_model import KeyeConfig, KeyeForConditionalGeneration, KeyeTextConfig, KeyeVisionConfig
from keye_model.cache import PagedCache
from keye_model.config import V1_5
from keye_model.generation import Generation
from keye_model.inputs import Request
from keye_model.sampling import SamplingParams
from keye_model.weights import destinations

transformers = pytest.importorskip("transformers", reason="the peer of this benchmark")
paddle = pytest.importorskip("transformers.models.paddleocr_vl", reason="the tower's peer")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16

VISION = KeyeVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27 if ON_GPU else 2,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    spatial_merge_size=2,
)
TEXT = KeyeTextConfig(
    vocab_size=151936 if ON_GPU else 8192,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36 if ON_GPU else 2,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    max_position_embeddings=40960,
)
GRIDS = [[1, 16, 16], [1, 32, 32]] + ([[1, 64, 80], [1, 128, 128]] if ON_GPU else [])
PREFILLS = [32, 128] + ([1024, 8192] if ON_GPU else [])
BATCHES = [1, 4] + ([16, 64] if ON_GPU else [])


@pytest.fixture(scope="module")
def ours():
    # 1.5's segments: the peer tower separates frames too.
    config = KeyeConfig(TEXT, VISION, V1_5, 4, 5, 6, 7, dtype=DTYPE)
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    model = model.to(DTYPE).to_empty(device=DEVICE).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


@pytest.fixture(scope="module")
def tower(ours):
    config = paddle.PaddleOCRVisionConfig(
        hidden_size=VISION.hidden_size,
        intermediate_size=VISION.intermediate_size,
        num_hidden_layers=VISION.num_hidden_layers,
        num_attention_heads=VISION.num_attention_heads,
        image_size=VISION.image_size,
        patch_size=VISION.patch_size,
        layer_norm_eps=VISION.layer_norm_eps,
        attn_implementation="sdpa",
    )
    from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionModel

    model = PaddleOCRVisionModel(config).to(DEVICE, DTYPE).eval().requires_grad_(False)
    model.load_state_dict(_published(ours, "visual."), strict=True)
    return model


@pytest.fixture(scope="module")
def decoder(ours):
    fields = dataclasses.asdict(TEXT)
    del fields["mrope_section"]
    theta = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    config = transformers.Qwen3Config(
        **fields, rope_parameters=theta, attn_implementation="sdpa", use_cache=True
    )
    with torch.device(DEVICE):
        model = transformers.Qwen3ForCausalLM(config).to(DTYPE).eval().requires_grad_(False)
    text = {f"model.{name}": value for name, value in _published(ours, "model.").items()}
    model.load_state_dict(text | {"lm_head.weight": ours.lm_head.weight}, strict=True)
    return model


def _published(model, prefix):
    views = destinations(model, model.config)
    return {n.removeprefix(prefix): view for n, view in views.items() if n.startswith(prefix)}


def _check(actual, expected):
    """Noise only: in fp32 the two agree to 1e-6, in bf16 to 0.05, and a wrong layer is off by 1."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.1, f"relative error {error:.4f}"


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[1] * g[2]} patches")
@torch.inference_mode()
def bench_tower(ours, tower, compare, grid):
    pixels = torch.randn(grid[1] * grid[2], 3, 14, 14, device=DEVICE, dtype=DTYPE)
    grid_thw = torch.tensor([grid], device=DEVICE)

    def theirs():
        return tower(pixels[None], grid_thw=grid_thw).last_hidden_state

    _check(ours.model.visual(pixels, [grid]), theirs().view(len(pixels), -1))
    providers = {"ours": lambda: ours.model.visual(pixels, [grid]), "transformers": theirs}
    compare(f"tower, {len(pixels)} patches", providers)


@pytest.mark.parametrize("length", PREFILLS)
@torch.inference_mode()
def bench_prefill(ours, decoder, compare, length):
    ids = torch.randint(100, 8000, (1, length), device=DEVICE)

    def mine():
        positions = torch.arange(length, device=DEVICE).expand(3, length).contiguous()
        cache = PagedCache(TEXT, -(-length // 64), dtype=DTYPE, device=DEVICE)
        step = cache.step([cache.add()], [length])
        hidden = ours.model.language_model.embed_tokens(ids[0])
        return ours.lm_head(ours.model(hidden, positions, cache, step)[-1:])

    def theirs():
        return decoder(ids, use_cache=True, logits_to_keep=1).logits[0]

    _check(mine(), theirs())
    compare(f"prefill, {length} tokens", {"ours": mine, "transformers": theirs})


@pytest.mark.parametrize("batch", BATCHES)
@torch.inference_mode()
def bench_decode_step(ours, decoder, compare, batch):
    """One step after 256 tokens; both caches grow by one token each turn."""
    context = 256
    ids = torch.randint(100, 8000, (batch, context + 1), device=DEVICE)
    past = decoder(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    cache = PagedCache(TEXT, batch * 64, dtype=DTYPE, device=DEVICE)
    handles = [cache.add() for _ in range(batch)]
    positions = torch.arange(context, device=DEVICE).repeat(batch).expand(3, -1).contiguous()
    step = cache.step(handles, [context] * batch)
    prompt = ours.model.language_model.embed_tokens(ids[:, :-1].flatten())
    ours.model(prompt, positions, cache, step)

    def mine():
        position = cache.num_tokens(handles[0])
        step = cache.step(handles, [1] * batch)
        positions = torch.full((3, batch), position, device=DEVICE)
        hidden = ours.model.language_model.embed_tokens(ids[:, -1])
        return ours.lm_head(ours.model(hidden, positions, cache, step))

    def theirs():
        return decoder(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]

    _check(mine(), theirs())
    compare(f"decode step, batch {batch} after {context}", {"ours": mine, "transformers": theirs})


@torch.inference_mode()
def bench_generate(ours, decoder, compare):
    """Prefill of 64 tokens and 16 greedy tokens, each side's own loop."""
    ids = torch.randint(100, 8000, (1, 64), device=DEVICE)
    params = SamplingParams(max_new_tokens=16)

    def mine():
        request = Request(ids[0].cpu())
        run = Generation(ours.model, ours.lm_head, [request], [params], eos_token_ids=())
        return [token.token_id for token in run]

    def theirs():
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
        return decoder.generate(ids, attention_mask=mask, **options)[0, 64:].tolist()

    assert len(mine()) == len(theirs()) == 16
    compare("generate, 64 + 16 tokens", {"ours": mine, "transformers": theirs})
