"""Definitions of "close enough", relative to plain PyTorch's own error, and of "the same"."""

import torch


def _errors(got: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Absolute error per element, and its root mean square. Both tensors are fp64."""
    error = torch.where(got == exact, 0.0, (got - exact).abs())  # equal infinities differ by 0
    return error, error.square().mean().sqrt().item()


def assert_same(got: torch.Tensor, want: torch.Tensor, backend: str) -> None:
    """Require equal bits from two calls that differ in shapes, strides or addresses.

    The reference only has to agree within rounding: the order of sums in PyTorch's matrix products,
    and which elements take its vectorised path, depend on all three and on the CPU.
    """
    if backend == "reference":
        torch.testing.assert_close(got, want, equal_nan=True)
    else:
        assert torch.equal(got, want)


def assert_close(
    got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, *, atol: float | None = None
) -> None:
    """Require err(got) <= 2 * err(plain) + atol, for the largest error and for the RMS error.

    Args:
        got: Output of the op.
        plain: The same from ordinary PyTorch in the dtype of ``got``.
        exact: The same from fp64 arithmetic.
        atol: Default: the spacing of the dtype of ``got`` at the largest finite exact value.
    """
    assert got.shape == plain.shape == exact.shape, (got.shape, plain.shape, exact.shape)
    assert got.dtype == plain.dtype, (got.dtype, plain.dtype)
    dtype = got.dtype
    got, plain, exact = (x.detach().double().cpu() for x in (got, plain, exact))
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if atol is None:
        atol = torch.finfo(dtype).eps * largest

    error, rms = _errors(got, exact)
    plain_error, plain_rms = _errors(plain, exact)
    bound = 2 * plain_error.max().item() + atol if error.numel() else 0.0
    rms_bound = 2 * plain_rms + atol
    if bool((error <= bound).all()) and (rms <= rms_bound or not error.numel()):
        return
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    scale = exact.square().mean().sqrt().item()
    raise AssertionError(
        f"max error {error[at].item():.3e} exceeds {bound:.3e}, or RMS {rms:.3e} exceeds "
        f"{rms_bound:.3e} (relative RMS {rms / scale if scale else float('nan'):.3e}); worst at "
        f"{at}: got {got[at].item()}, exact {exact[at].item()}, plain PyTorch {plain[at].item()}; "
        f"{int((error > bound).sum() + error.isnan().sum())} of {error.numel()} beyond the bound"
    )
