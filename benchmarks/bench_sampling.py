"""The next token. Draws of libraries differ: theirs only have to be among the kept tokens."""

from dataclasses import replace

import pytest
import torch

from benchmarks.measure import cases_of
from benchmarks.providers import Provider, gpu_library, plain
from benchmarks.timing import DEVICE

_SLACK = 0.02  # of top_p: sums of probabilities differ in their last bits


def _sorted_scores(logits, temperature):
    return (logits.float() / temperature[:, None]).sort(descending=True)


def _kept(scores, top_k, top_p):
    """Probabilities of sorted scores, 0 where top-k, then top-p drops them."""
    rank = torch.arange(scores.shape[1], device=scores.device)
    probs = scores.masked_fill(rank >= top_k[:, None], float("-inf")).softmax(dim=-1)
    return probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p[:, None], 0)


def _draw(probs):
    """Exponential races: `multinomial` without its check of the probabilities on the host."""
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)


def eager_sorted(logits, temperature, top_k, top_p, **_):
    """As transformers: everything sorted, each request with its own parameters."""
    scores, order = _sorted_scores(logits, temperature)
    return order.gather(1, _draw(_kept(scores, top_k, top_p)))[:, 0]


def eager_top_k(width):
    """The same for one `top_k` of all requests, known on the host."""

    def run(logits, temperature, top_k, top_p, **_):
        scores, order = logits.float().topk(width)
        return order.gather(1, _draw(_kept(scores / temperature[:, None], top_k, top_p)))[:, 0]

    return run


def eager_greedy(logits, repetition_penalty=None, seen=None, **_):
    if seen is not None:
        scores, penalty = logits.float(), repetition_penalty[:, None]
        penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
        logits = torch.where(seen, penalised, scores)
    return logits.argmax(dim=-1)


def flashinfer(module):
    def run(logits, temperature, top_k, top_p, **_):
        scores = logits.float() / temperature[:, None]
        return module.top_k_top_p_sampling_from_logits(scores, top_k.int(), top_p).long()

    return run


def _among_kept(case):
    """Whether tokens are among those that the definition keeps, for the inputs of the check."""
    torch.manual_seed(0)
    inputs = case.arguments(DEVICE)
    scores, order = _sorted_scores(inputs["logits"], inputs["temperature"])
    kept = _kept(scores, inputs["top_k"], inputs["top_p"] + _SLACK) > 0
    allowed = torch.zeros_like(kept).scatter_(1, order, kept)

    def differs(got, want):
        if got.shape != want.shape:
            return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        return "" if bool(allowed.gather(1, got[:, None]).all()) else "a dropped token was drawn"

    return differs


@pytest.mark.parametrize("case", cases_of("sample"), ids=str)
def bench_sample(measure, case):
    if "greedy" in case.name:
        measure(case, plain(eager_greedy))
        return
    width = int(case.arguments(torch.device("cpu"))["top_k"][0])
    peers = plain(eager_sorted) | {
        "eager, one top-k": Provider(eager_top_k(width)),
        "flashinfer": gpu_library("flashinfer.sampling", flashinfer),
    }
    right = _among_kept(case)
    peers = {name: replace(peer, differs=right) for name, peer in peers.items()}
    measure(case, peers)
