"""Definition of the choice of the next token."""

import torch
import torch.nn.functional as F

from keye_kernels._checks import check_each

Pair = tuple[torch.Tensor, torch.Tensor]


def philox(tokens: torch.Tensor, step: torch.Tensor, seed: torch.Tensor) -> Pair:
    """First two words of Philox4x32-10, counter (token, step, 0), key seed, each in [0, 2^32)."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = tokens, step & mask, step >> 32 & mask, torch.zeros_like(tokens)
    k0, k1 = seed & mask, seed >> 32 & mask

    def product(factor: int, x: torch.Tensor) -> Pair:
        # High and low word. In halves, for int64 is signed and the product has 64 bits.
        low = factor * (x & 0xFFFF)
        middle = factor * (x >> 16) + (low >> 16)
        return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c0, c1


def _gumbel(tokens: torch.Tensor, step: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Noise of each token at its request's step, fp64."""
    w0, w1 = philox(tokens, step, seed)
    u = ((w0 << 20 | w1 >> 12).double() + 0.5) * 2.0**-52  # 53 bits: exact, never 0 or 1
    return -torch.log(-torch.log(u))


def _kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> Pair:
    """Tokens of one row that top-k and top-p leave, in rising order, and their scores in fp64."""
    keep = logits > float("-inf")
    if 0 < top_k < logits.shape[0]:
        keep &= logits >= logits.topk(top_k).values[-1]
    tokens = keep.nonzero().squeeze(1)
    kept = logits[tokens].double()
    largest, scale = kept.max(), 1 / temperature
    if top_p < 1:
        ranked = kept.sort(descending=True).values
        weights = ((ranked - largest) * scale).exp()
        before = F.pad(weights.cumsum(dim=0)[:-1], (1, 0))  # weight of those ranked higher
        count = max(int((before < top_p * weights.sum()).sum()), 1)
        keep = kept >= ranked[count - 1]
        tokens, kept = tokens[keep], kept[keep]
    scores = (kept - largest) * scale
    return tokens, scores


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    *,
    repetition_penalty: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Penalty, then per row: argmax, or top-k, top-p and Gumbel-max over the tokens left."""
    infinity = float("inf")
    columns = [x.tolist() for x in (temperature, top_k, top_p, seed, step)]
    rule = "be finite and at least 0"
    check_each("temperature", columns[0], rule, lambda value: 0 <= value < infinity)
    check_each("top_k", columns[1], "be at least 0", lambda value: value >= 0)
    check_each("top_p", columns[2], "lie between 0 and 1", lambda value: 0 <= value <= 1)
    check_each("step", columns[4], "be at least 0", lambda value: value >= 0)

    logits = logits.float().nan_to_num(nan=-infinity, posinf=infinity, neginf=-infinity)
    if repetition_penalty is not None:
        rule = "be finite and positive"
        penalties = repetition_penalty.tolist()
        check_each("repetition_penalty", penalties, rule, lambda value: 0 < value < infinity)
        penalty = repetition_penalty[:, None]
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    logits = logits.clamp(max=torch.finfo(torch.float32).max)
    best, tokens = logits.max(dim=1)
    tokens.masked_fill_(best == -infinity, -1)
    drawn = [i for i, value in enumerate(columns[0]) if value > 0 and best[i] > -infinity]
    if drawn:
        kept = [_kept(logits[i], *(column[i] for column in columns[:3])) for i in drawn]
        rows = torch.tensor(drawn, device=logits.device)
        sizes = [len(ids) for ids, _ in kept]
        row_of = rows.repeat_interleave(torch.tensor(sizes, device=logits.device))
        noise = _gumbel(torch.cat([ids for ids, _ in kept]), step[row_of], seed[row_of])
        for i, (ids, scores), row_noise in zip(drawn, kept, noise.split(sizes), strict=True):
            tokens[i] = ids[(scores + row_noise).argmax()]
    return tokens if out is None else out.copy_(tokens)
