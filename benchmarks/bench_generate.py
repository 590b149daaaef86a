"""Tower, prefill, decode step and whole requests against transformers, with the same weights.

A decode step is all of it, from the last token to the next. Ours comes with its launches, and as
the CUDA graph that a user gets; so does the tower for small images.

Peers: transformers' PaddleOCR-VL tower and projector (descended from Keye's) and Qwen3 decoder, all
with SDPA; `benchmarks/models.py` builds them.
"""

import dataclasses
import inspect
import time

import pytest
import torch

from benchmarks.measure import difference
from benchmarks.providers import Provider, absent, our_model
from benchmarks.shapes import REAL, VISION, num_patches
from benchmarks.timing import DEVICE, ON_GPU

pytest.importorskip("av", reason="keye_model reads videos with it")
transformers = pytest.importorskip("transformers", reason="the peer of this benchmark")
pytest.importorskip("transformers.models.paddleocr_vl", reason="the tower's peer")

from benchmarks import models  # noqa: E402
from benchmarks.models import DTYPE, IMAGE, TEXT_CONFIG, VISION_CONFIG  # noqa: E402
from keye_model.engine.calls import Engines  # noqa: E402
from keye_model.engine.cuda_graph import CudaGraphs, why_no_graphs  # noqa: E402
from keye_model.engine.decode_batch import Sequence  # noqa: E402
from keye_model.engine.sampling import SamplingParams  # noqa: E402
from keye_model.engine.vision_batch import MAX_PATCHES, VisionBatch  # noqa: E402
from keye_model.engine.workspace import Workspace  # noqa: E402
from keye_model.inputs.request import Request  # noqa: E402
from keye_model.network.cache import PAGE_SIZE, PagedCache  # noqa: E402

NEW_TOKENS = 16 if ON_GPU else 4
# transformers 5.24 renamed the argument and the output.
_THEIRS = inspect.signature(transformers.Qwen3ForCausalLM.forward).parameters
THEIR_CACHE = "cache" if "cache" in _THEIRS else "past_key_values"
GRIDS = (
    REAL.images | {"64 frames of 512, each alone": [(1, 16, 32)] * 64}
    if ON_GPU
    else {"2 images": [(1, 8, 12), (1, 8, 8)]}
)
PREFILLS = [1024, 8192] if ON_GPU else [32]
DECODES = [(1, 1024), (1, 32768), (8, 1024), (64, 1024)] if ON_GPU else [(2, 64)]
TOLERANCE = 0.1  # noise alone: fp32 agrees to 1e-6, bf16 to 0.05, a wrong layer is off by 1


def tower_work(grids):
    """Bytes: the weights. FLOP: patch embedding, four projections and attention of each layer."""
    vision = VISION_CONFIG
    hidden, patch = vision.hidden_size, 3 * vision.patch_size**2
    layer = 4 * hidden**2 + 2 * hidden * vision.intermediate_size
    parameters = vision.num_hidden_layers * layer + patch * hidden
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    attention = 4 * pairs * hidden * vision.num_hidden_layers
    flops = 2 * num_patches(grids) * parameters + attention
    return {"num_bytes": parameters * DTYPE.itemsize, "flops": flops}


def text_work(new, cached, text=TEXT_CONFIG):
    """Of `new` tokens per sequence on top of `cached`, for each pair of two lists.

    Bytes: the weights (the embedding is not read) and the keys and values seen. FLOP: projections
    of each token, the head for the last of each sequence, attention to the keys each token sees.
    """
    qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    out = text.num_attention_heads * text.head_dim
    layer = text.hidden_size * (qkv + out + 3 * text.intermediate_size)
    body, head = text.num_hidden_layers * layer, text.hidden_size * text.vocab_size
    tokens = sum(n + c for n, c in zip(new, cached, strict=True))
    key_value = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    pairs = sum(n * (n + c) - n * (n - 1) // 2 for n, c in zip(new, cached, strict=True))
    attention = 4 * pairs * out * text.num_hidden_layers
    return {
        "num_bytes": (body + head + tokens * key_value) * DTYPE.itemsize,
        "flops": 2 * (sum(new) * body + len(new) * head) + attention,
    }


@pytest.fixture(scope="module")
def ours():
    return models.build_ours()


@pytest.fixture(scope="module")
def tower(ours):
    return models.build_tower(ours)


@pytest.fixture(scope="module")
def projector(ours):
    return models.build_projector(ours)


@pytest.fixture(scope="module")
def decoder(ours):
    return models.build_decoder(ours)


def _pixels(grids):
    size = VISION.patch_size
    return torch.randn(num_patches(grids), 3, size, size, device=DEVICE, dtype=DTYPE)


def _differs(got, want):
    return difference(got, want, TOLERANCE)


@pytest.mark.parametrize("name", GRIDS)
def bench_tower(ours, tower, measure, name):
    visual, grids = ours.model.visual, GRIDS[name]
    grid_thw = torch.tensor(grids, device=DEVICE)

    def mine(pixels, batch=None):
        if batch is None:
            return visual(pixels, grids)
        return visual.norm(*batch.run(visual, pixels, grids))

    def theirs(pixels):
        return tower(pixels[None], grid_thw=grid_thw).last_hidden_state.flatten(0, -2)

    providers = our_model(mine, capture=False)
    if num_patches(grids) <= MAX_PATCHES:
        providers |= _with_graphs(mine, lambda: VisionBatch(visual, CudaGraphs(DEVICE)))
    measure.compare(
        "tower",
        name,
        make=lambda: {"pixels": _pixels(grids)},
        providers=providers | {"transformers": Provider(theirs, capture=False)},
        definition=theirs,
        differs=_differs,
        size=num_patches(grids),
        models=(ours,),
        **tower_work(grids),
    )


@pytest.mark.parametrize("length", PREFILLS)
def bench_prefill(ours, decoder, measure, length):
    cache = PagedCache(TEXT_CONFIG, -(-length // PAGE_SIZE), dtype=DTYPE, device=DEVICE)
    step = cache.append([cache.add()], [length])
    positions = torch.arange(length, device=DEVICE).expand(3, length).contiguous()

    def mine(ids):
        hidden = ours.model.language_model.embed_tokens(ids)
        return ours.lm_head(ours.model(hidden, positions, cache, step)[-1:])

    def theirs(ids):
        return decoder(ids[None], use_cache=True, logits_to_keep=1).logits[0]

    measure.compare(
        "prefill",
        f"{length} tokens",
        make=lambda: {"ids": torch.randint(100, 2000, (length,), device=DEVICE)},
        providers=our_model(mine) | {"transformers": Provider(theirs)},
        definition=theirs,
        differs=_differs,
        size=length,
        models=(ours,),
        **text_work([length], [0]),
    )


def _with_graphs(run, make, differs=None):
    """Ours with CUDA graphs, which it replays by itself; `make` gives what it keeps between calls.

    `run` takes the inputs and that.
    """
    if why_not := why_no_graphs(DEVICE):
        return {"ours (graph)": absent(why_not)}
    held = make()

    def replayed(**inputs):
        return run(*inputs.values(), held)

    return {"ours (graph)": Provider(replayed, ours=True, capture=False, differs=differs)}


def _other_tokens(got, want):
    return "" if torch.equal(got, want) else f"{int((got != want).sum())} other tokens"


@pytest.mark.parametrize(("batch", "context"), DECODES)
def bench_decode_step(ours, decoder, measure, batch, context):
    """The same step again and again: its token is stored where it was stored before."""
    prompt = torch.randint(100, 2000, (batch, context), device=DEVICE)
    past = getattr(decoder(prompt, use_cache=True, logits_to_keep=1), THEIR_CACHE)
    num_pages = batch * -(-(context + 1) // PAGE_SIZE)
    launched = Workspace.new(ours.model, ours.lm_head, num_pages)
    cache, rows = launched.cache, launched.batch
    handles = [cache.add(context + 1) for _ in range(batch)]
    hidden = ours.model.language_model.embed_tokens(prompt.flatten())
    positions = torch.arange(context, device=DEVICE).repeat(batch).expand(3, -1).contiguous()
    ours.model(hidden, positions, cache, cache.append(handles, [context] * batch))
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    # Each has generated one token, which the step puts in.
    rows.place([Sequence(0, handle, prompt[0], params, context, [0]) for handle in handles])
    counters = rows.counters.clone()

    def captured():
        return dataclasses.replace(launched, graphs=CudaGraphs(DEVICE))

    def mine(ids, how=launched):
        rows.counters.copy_(counters)
        rows.token_ids[:batch] = ids
        how.step(ours.model, ours.lm_head, batch, context + 1)
        return rows.token_ids[:batch].clone()

    def their_logits(ids):
        logits = decoder(ids[:, None], use_cache=True, **{THEIR_CACHE: past}).logits[:, -1]
        past.crop(-1)
        return logits

    def check_logits(ids):
        """Instead of tokens: near ties fall either way in bf16. A graph is exactly its launches."""
        hidden = ours.model.language_model.embed_tokens(ids)
        at = torch.full((3, batch), context, device=DEVICE)
        fault = _differs(ours.lm_head(ours.model(hidden, at, cache, step)), their_logits(ids))
        assert not fault, fault

    step = cache.append(handles, [1] * batch)
    check_logits(prompt[:, 0])
    measure.compare(
        "decode step",
        f"batch {batch} after {context}",
        make=lambda: {"ids": torch.randint(100, 2000, (batch,), device=DEVICE)},
        providers=our_model(mine, capture=False)
        | _with_graphs(mine, captured, _other_tokens)
        | {"transformers": Provider(lambda ids: their_logits(ids).argmax(-1), capture=False)},
        definition=mine,
        differs=lambda *_: "",
        size=batch,
        models=(ours,),
        **text_work([1] * batch, [context] * batch),
    )


def _run(ours, request, engines, **options):
    """Greedy tokens of one request, computed anew."""
    params = [SamplingParams(max_new_tokens=NEW_TOKENS)]
    options |= {"eos_token_ids": (), "cache": False}
    return engines.run(ours.model, ours.lm_head, [request], params, **options)


def bench_generate(ours, decoder, measure):
    """Prefill of 64 tokens and greedy tokens, each side's own loop."""
    launching = Engines()

    def mine(ids, engines=None):
        run = _run(ours, Request(ids), engines or launching, cuda_graphs=engines is not None)
        return [token.token_id for token in run]

    def theirs(ids):
        ids = ids[None].to(DEVICE)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        found = decoder.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[0, ids.shape[1] :].tolist()

    def differs(got, want):
        """Near ties fall either way in bf16, and everything after one differs."""
        return "" if len(got) == len(want) == NEW_TOKENS else f"{len(got)} tokens"

    measure.compare(
        "generate",
        f"64 + {NEW_TOKENS} tokens",
        make=lambda: {"ids": torch.randint(100, 2000, (64,))},
        providers=our_model(mine, capture=False)
        | _with_graphs(mine, Engines)
        | {"transformers": Provider(theirs, capture=False)},
        definition=theirs,
        differs=differs,
    )


@pytest.mark.parametrize("name", list(GRIDS)[:3])
def bench_request(ours, tower, projector, decoder, measure, name):
    """Images and a question to an answer, by stage. Their decoder gets plain 1D positions."""
    grids = GRIDS[name]
    pixels = _pixels(grids)
    num_image_tokens = num_patches(grids) // VISION.merge_size**2
    ids = torch.cat([torch.full((num_image_tokens,), IMAGE), torch.randint(100, 2000, (32,))])
    # The placeholders of one image stand between the ids that mark its start and end.
    pieces, start = [], 0
    for t, h, w in grids:
        count = t * h * w // VISION.merge_size**2
        pieces += [torch.tensor([6]), ids[start : start + count], torch.tensor([7])]
        start += count
    ids = torch.cat([*pieces, ids[num_image_tokens:]])
    request = Request(ids, pixel_values=pixels, image_grid_thw=tuple(grids))
    launching = Engines()

    def mine(engines=None):
        run = _run(ours, request, engines or launching, cuda_graphs=engines is not None)
        assert len(list(run)) == NEW_TOKENS
        return dataclasses.asdict(run.timings)

    runs = {"ours": mine}
    if not why_no_graphs(DEVICE):
        held = Engines()
        runs["ours (graph)"] = lambda: mine(held)

    grid_thw = torch.tensor(grids, device=DEVICE)
    on_device = ids.to(DEVICE)

    def features():
        hidden = tower(pixels[None], grid_thw=grid_thw).last_hidden_state.flatten(0, -2)
        return projector(hidden, grid_thw)

    def theirs():
        marks = [_now()]
        found = features()
        marks.append(_now())
        hidden = decoder.model.embed_tokens(on_device)
        hidden[on_device == IMAGE] = found
        out = decoder(inputs_embeds=hidden[None], use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(dim=-1)
        token.tolist()
        marks.append(_now())
        for _ in range(NEW_TOKENS - 1):
            past = {THEIR_CACHE: getattr(out, THEIR_CACHE)}
            out = decoder(token[:, None], use_cache=True, **past)
            token = out.logits[:, -1].argmax(dim=-1)
            token.tolist()  # each loop looks at its token, to know whether to go on
        marks.append(_now())
        names = ("vision", "prefill", "decode")
        return {n: marks[i + 1] - marks[i] for i, n in enumerate(names)}

    fault = _differs(ours.model.get_image_features(pixels, grids), features())
    assert not fault, fault
    runs["transformers"] = theirs
    measure.stages("request", f"{name} + 32 + {NEW_TOKENS}", runs)


def _now():
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()
