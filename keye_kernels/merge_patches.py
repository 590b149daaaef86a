"""LayerNorm and the gather of each square of patches into one token, in either order."""

import torch

from keye_kernels import reference
from keye_kernels._checks import FLOAT_DTYPES, Grid, check_tensor, flatten_grid, grid_rows
from keye_kernels._ops import define_op


def _merge_patches_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    flat_grid: list[int],
    merge_size: int,
    norm_first: bool,
    out: torch.Tensor,
) -> None:
    grid_thw = grid_rows(flat_grid)
    reference.merge_patches(
        x, weight, bias, eps, grid_thw, merge_size=merge_size, norm_first=norm_first, out=out
    )


_merge_patches_op = define_op(
    "merge_patches(Tensor x, Tensor weight, Tensor bias, float eps, int[] flat_grid, "
    "int merge_size, bool norm_first, Tensor(a!) out) -> ()",
    reference=_merge_patches_reference,
)


def merge_patches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    grid_thw: Grid,
    *,
    merge_size: int = 2,
    norm_first: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise patches and lay each merge_size x merge_size square of them side by side.

    Args:
        x: [num_patches, hidden_size], fp32 / fp16 / bf16, patches in raster order of
            (frame, row, column). Rows may be strided.
        weight, bias: dtype of ``x``, [hidden_size] with ``norm_first``, else
            [merge_size * merge_size * hidden_size].
        eps: Added to the variance.
        grid_thw: Rows (t, h, w), in patches, h and w multiples of ``merge_size``; a list or a CPU
            tensor [num_images, 3]. Frames are never merged with each other.
        norm_first: True: LayerNorm per patch, then gather (Keye-VL-8B-Preview). False: gather, then
            LayerNorm over the whole token (Keye-VL-1.5).
        out: Like the result. Must not overlap ``x``.

    Returns:
        [num_patches / merge_size^2, merge_size^2 * hidden_size], dtype of ``x``; within a token the
        patches stand in raster order. LayerNorm in fp32, rounded once.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or the grid does not
            add up to num_patches.

    Source: Projector in modeling_keye.py of Keye-VL-8B-Preview; the transformers Keye-VL-1.5 port.
    """
    if merge_size < 1:
        raise ValueError(f"merge_size must be positive, got {merge_size}")
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    num_patches, hidden_size = x.shape
    square = merge_size * merge_size
    norm_size = hidden_size if norm_first else square * hidden_size
    check_tensor("weight", weight, (norm_size,), x.dtype, x.device)
    check_tensor("bias", bias, (norm_size,), x.dtype, x.device)
    grid = flatten_grid(grid_thw, num_patches, merge_size=merge_size)
    shape = (num_patches // square, square * hidden_size)
    if out is None:
        out = x.new_empty(shape)
    else:
        check_tensor("out", out, shape, x.dtype, x.device)
    if num_patches > 0:
        _merge_patches_op(x, weight, bias, eps, grid, merge_size, norm_first, out)
    return out
