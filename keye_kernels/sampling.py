"""The next token of each request from its logits: greedy, or drawn with its own generator."""

import torch

from keye_kernels import reference
from keye_kernels._checks import FLOAT_DTYPES, check_tensor
from keye_kernels._ops import define_op

_sample_op = define_op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, "
    "Tensor step, Tensor? repetition_penalty, Tensor? seen, Tensor(a!) out) -> ()",
    reference=reference.sample,
)


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
    """Choose the next token of each row.

    In this order, on fp32 logits:

    1. NaN becomes -inf. Logits of ``seen`` tokens are divided by ``repetition_penalty`` where
       positive, multiplied by it where not. +inf becomes the largest fp32.
    2. ``temperature`` 0: the largest logit, the lowest token on ties. Done.
    3. ``top_k``: keep the logits not below the k-th largest, so ties with it stay.
    4. ``top_p``: with score = (logit - largest logit) / temperature and p = softmax(score) over
       those kept, in fp64, keep the smallest set of most probable tokens that reaches ``top_p``,
       and ties with its last. At least one stays.
    5. Take the largest ``score + g`` (fp64, lowest token on ties) of those kept,
       g = -log(-log(u)), which draws from their softmax (Gumbel-max). u depends on the request's
       seed, the step and the token, and on nothing else: with Philox4x32-10, key (low, high word
       of seed), counter (token, low word of step, high word of step, 0) and first two words of
       result w0, w1: u = (w0 * 2^20 + floor(w1 / 2^12) + 0.5) / 2^52.

    Args:
        logits: [batch_size, vocab_size], fp32 / fp16 / bf16. Rows may be strided.
        temperature: [batch_size] fp32, at least 0; 0 is greedy.
        top_k: [batch_size] int64, at least 0; 0, or vocab_size and more, is off.
        top_p: [batch_size] fp32, in [0, 1]; 1 is off.
        seed: [batch_size] int64, any value.
        step: [batch_size] int64, number of the token in its request; another step is another draw.
        repetition_penalty: [batch_size] fp32, positive; 1 is off. Comes with ``seen``.
        seen: [batch_size, vocab_size] bool, tokens the penalty applies to. Rows may be strided.
        out: [batch_size] int64.

    Returns:
        Tokens, [batch_size] int64. A row without a single logit above -inf gives -1: there is
        nothing to choose from, and the model that made it is broken.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, a
            parameter lies outside its range.

    Source: order of the logits processors in transformers; Salmon et al., "Parallel random numbers:
    as easy as 1, 2, 3" (SC 2011) for Philox.
    """
    check_tensor("logits", logits, (None, None), FLOAT_DTYPES)
    batch_size, vocab_size = logits.shape
    device = logits.device
    if vocab_size == 0:
        raise ValueError("logits must have at least one column, got 0")
    check_tensor("temperature", temperature, (batch_size,), torch.float32, device)
    check_tensor("top_k", top_k, (batch_size,), torch.int64, device)
    check_tensor("top_p", top_p, (batch_size,), torch.float32, device)
    check_tensor("seed", seed, (batch_size,), torch.int64, device)
    check_tensor("step", step, (batch_size,), torch.int64, device)
    if (repetition_penalty is None) != (seen is None):
        missing = "seen" if seen is None else "repetition_penalty"
        raise ValueError(f"repetition_penalty and seen must come together, got no {missing}")
    if seen is not None:
        check_tensor("repetition_penalty", repetition_penalty, (batch_size,), torch.float32, device)
        check_tensor("seen", seen, logits.shape, torch.bool, device)
    if out is None:
        out = logits.new_empty(batch_size, dtype=torch.int64)
    else:
        check_tensor("out", out, (batch_size,), torch.int64, device)
    if batch_size > 0:
        _sample_op(logits, temperature, top_k, top_p, seed, step, repetition_penalty, seen, out)
    return out
