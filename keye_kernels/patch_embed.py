"""Patches to tokens: normalised pixels times the patch weight, plus bias and position embedding."""

import math
from collections.abc import Sequence

import torch

from keye_kernels import reference
from keye_kernels._checks import FLOAT_DTYPES, Grid, check_tensor, flatten_grid, grid_rows
from keye_kernels._ops import define_op


def _patch_embed_reference(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position_table: torch.Tensor,
    flat_grid: list[int],
    image_mean: list[float],
    image_std: list[float],
    out: torch.Tensor,
) -> None:
    reference.patch_embed(
        pixels,
        weight,
        bias,
        position_table,
        grid_rows(flat_grid),
        image_mean=image_mean,
        image_std=image_std,
        out=out,
    )


_patch_embed_op = define_op(
    "patch_embed(Tensor pixels, Tensor weight, Tensor bias, Tensor position_table, "
    "int[] flat_grid, float[] image_mean, float[] image_std, Tensor(a!) out) -> ()",
    reference=_patch_embed_reference,
)


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position_table: torch.Tensor,
    grid_thw: Grid,
    *,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embed patches: ``weight @ pixels + bias + position``, several images and videos at once.

    The position embedding is ``position_table``, a square map, resampled to (h, w) as
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` does; every frame of a
    video gets the same one.

    Args:
        pixels: [num_patches, 3, patch_size, patch_size], contiguous, patches in raster order of
            (frame, row, column). uint8: raw bytes, normalised inside. fp32 / fp16 / bf16: already
            normalised.
        weight: [hidden_size, 3, patch_size, patch_size], fp32 / fp16 / bf16, contiguous.
        bias: [hidden_size], dtype of ``weight``.
        position_table: [side * side, hidden_size], row-major, dtype of ``weight``.
        grid_thw: Rows (t, h, w), in patches; a list or a CPU tensor [num_images, 3].
        image_mean, image_std: Three floats each, on the scale 0 to 1. Unused for float pixels.
        out: [num_patches, hidden_size], dtype of ``weight``.

    Returns:
        [num_patches, hidden_size], dtype of ``weight``. Normalised pixels are rounded to the dtype
        of ``weight``; from there all is fp32 and rounded once at the store. (The published code
        rounds product, position embedding and sum one by one.)

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or the grid does not
            add up to num_patches.

    Source: KeyeVisionEmbeddings, modeling_keye.py of Keye-VL-8B-Preview.
    """
    check_tensor(
        "pixels", pixels, (None, 3, None, None), (torch.uint8, *FLOAT_DTYPES), contiguous=True
    )
    num_patches, _, height, width = pixels.shape
    check_tensor(
        "weight", weight, (None, 3, height, width), FLOAT_DTYPES, pixels.device, contiguous=True
    )
    hidden_size = weight.shape[0]
    check_tensor("bias", bias, (hidden_size,), weight.dtype, weight.device)
    check_tensor("position_table", position_table, (None, hidden_size), weight.dtype, weight.device)
    side = math.isqrt(position_table.shape[0])
    if side == 0 or side * side != position_table.shape[0]:
        raise ValueError(
            f"position_table must have a square number of rows, got {position_table.shape[0]}"
        )
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if len(values) != 3:
            raise ValueError(f"{name} must hold 3 values, got {len(values)}")
    if min(image_std) <= 0:
        raise ValueError(f"image_std must be positive, got {tuple(image_std)}")
    grid = flatten_grid(grid_thw, num_patches)
    if out is None:
        out = weight.new_empty(num_patches, hidden_size)
    else:
        check_tensor("out", out, (num_patches, hidden_size), weight.dtype, weight.device)
    if num_patches > 0:
        _patch_embed_op(
            pixels, weight, bias, position_table, grid, list(image_mean), list(image_std), out
        )
    return out
