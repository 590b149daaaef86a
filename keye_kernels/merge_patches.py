"""LayerNorm and the gather of each square of patches into one token, in either order.

The last norm of a vision tower, and the residual add before it, may come first in the same pass.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, norm, reference
from keye_kernels._checks import (
    FLOAT_DTYPES,
    Grid,
    check_eps,
    check_length,
    check_tensor,
    flatten_grid,
    grid_rows,
)
from keye_kernels._ops import define_op
from keye_kernels._rows import (
    add_rows,
    layer_norm_rows,
    load_rows,
    power_of_2,
    round_rows,
    store_rows,
)
from keye_kernels._tuples import decode, encode

PatchNorm = tuple[torch.Tensor, torch.Tensor, float]  # weight, bias, eps

_SEGMENTS = 16  # per launch


_merge_patches_op = define_op(
    "merge_patches(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual, "
    "Tensor? patch_weight, Tensor? patch_bias, float patch_eps, int[] grid_thw, "
    "int merge_size, bool norm_first, Tensor(a!) out) -> ()",
    reference=reference.merge_patches,
    tuples={"patch_norm": ("patch_weight", "patch_bias", "patch_eps")},
)


def _segments(flat_grid: list[int], merge_size: int) -> list[tuple[int, int]]:
    """Runs of tokens from rows of one width: (first token, tokens per row).

    Frames do not show: merge_size rows of patches make a row of tokens, and the rows of a frame
    divide by merge_size. So a video is one run, and so are images of one width in a row.
    """
    segments: list[tuple[int, int]] = []
    first = 0
    for t, h, w in grid_rows(flat_grid):
        if not segments or segments[-1][1] != w // merge_size:
            segments.append((first, w // merge_size))
        first += t * h * w // merge_size**2
    return segments


class LaunchConfig(NamedTuple):
    """Rows and columns of a chunk, and warps."""

    rows: int
    chunk: int
    num_warps: int


def launch_config(hidden_size: int, merge_size: int, dtype: torch.dtype) -> LaunchConfig:
    """Choose the launch: one token per program, 2x2 of 1152 in 4 warps.

    A patch lies in chunks and lanes as it does in ``layer_norm``: its sums are added in the same
    order, so that both give the same bits.
    """
    rows = triton.next_power_of_2(merge_size**2)
    chunk = norm.launch_config(hidden_size, dtype).chunk
    num_warps = power_of_2(rows * chunk * dtype.itemsize // 512, 1, 16)  # 16 bytes per thread
    return LaunchConfig(rows, chunk, num_warps)


@triton.jit(do_not_specialize=["first_token"])
def _merge_patches_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, patch_weight_ptr, patch_bias_ptr, out_ptr,
    stride_x, stride_residual, stride_out, first_token, segments, eps, patch_eps,
    NORM_FIRST: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One token: its patches are the rows. segments: those of ``_segments``, encoded."""
    SQUARE: tl.constexpr = MERGE * MERGE
    token = first_token + tl.program_id(0)
    start, width = segments[0], segments[1]
    for i in tl.static_range(2, len(segments), 2):
        later = 2 * token + 3 >= segments[i]  # by their codes, which rise alike
        start, width = tl.where(later, segments[i], start), tl.where(later, segments[i + 1], width)
    start, width = decode(start), decode(width)

    slot = tl.arange(0, ROWS)[:, None]  # a * MERGE + b for patch (a, b) of the square
    mask_row = True if ROWS == SQUARE else slot < SQUARE
    column = (token - start) % width
    row = (slot // MERGE).to(tl.int64) * (width * MERGE)  # patches
    patch = (token - column).to(tl.int64) * SQUARE + row + column * MERGE + slot % MERGE
    x = load_rows(x_ptr, patch * stride_x, mask_row, WIDTH, CHUNK)
    if residual_ptr is not None:
        x = add_rows(x, load_rows(residual_ptr, patch * stride_residual, mask_row, WIDTH, CHUNK))
    if patch_weight_ptr is not None:
        weight = load_rows(patch_weight_ptr, slot * 0, mask_row, WIDTH, CHUNK)
        bias = load_rows(patch_bias_ptr, slot * 0, mask_row, WIDTH, CHUNK)
        # Rows of padding stay 0 even if eps is 0, for the sums of the norm over the whole token.
        row_eps = patch_eps if ROWS == SQUARE else tl.where(mask_row, patch_eps, 1.0)
        y = layer_norm_rows(x, weight, bias, row_eps, mask_row, 1, WIDTH, CHUNK)
        x = round_rows(y, x_ptr.dtype.element_ty)

    offs_norm = slot * (0 if NORM_FIRST else WIDTH)
    weight = load_rows(weight_ptr, offs_norm, mask_row, WIDTH, CHUNK)
    bias = load_rows(bias_ptr, offs_norm, mask_row, WIDTH, CHUNK)
    NUM_ROWS: tl.constexpr = 1 if NORM_FIRST else SQUARE
    y = layer_norm_rows(x, weight, bias, eps, mask_row, NUM_ROWS, WIDTH, CHUNK)
    offs_out = token.to(tl.int64) * stride_out + slot * WIDTH
    store_rows(out_ptr, offs_out, mask_row, y, WIDTH, CHUNK)


def _merge_patches_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    patch_weight: torch.Tensor | None,
    patch_bias: torch.Tensor | None,
    patch_eps: float,
    flat_grid: list[int],
    merge_size: int,
    norm_first: bool,
    out: torch.Tensor,
) -> None:
    num_tokens, hidden_size = out.shape[0], x.shape[1]
    config = launch_config(hidden_size, merge_size, x.dtype)
    segments = _segments(flat_grid, merge_size)
    # The runs travel as launch parameters: no copy to the device, nothing to keep for a CUDA graph.
    # One or _SEGMENTS of them: else Triton would compile a kernel for each number of them.
    for i in range(0, len(segments), _SEGMENTS):
        part = segments[i : i + _SEGMENTS]
        first_token = part[0][0]
        end = segments[i + _SEGMENTS][0] if i + _SEGMENTS < len(segments) else num_tokens
        if len(part) > 1:
            part += [(end, 1)] * (_SEGMENTS - len(part))
        _merge_patches_kernel[(end - first_token,)](
            x, weight, bias, residual, patch_weight, patch_bias, out,
            x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0), first_token,
            encode(itertools.chain(*part)), eps, patch_eps,
            NORM_FIRST=norm_first, MERGE=merge_size, WIDTH=hidden_size, ROWS=config.rows,
            CHUNK=config.chunk, num_warps=config.num_warps,
        )  # fmt: skip


_backends.register("merge_patches", "triton", _merge_patches_triton)


def merge_patches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    grid_thw: Grid,
    *,
    residual: torch.Tensor | None = None,
    patch_norm: PatchNorm | None = None,
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
        residual: Like ``x``; when given, ``x + residual``, rounded to the dtype of ``x``, takes the
            place of ``x``.
        patch_norm: (weight, bias, eps), weight and bias [hidden_size] in the dtype of ``x``. When
            given, each patch first goes through this LayerNorm and is rounded, as ``layer_norm``
            does it: the last norm of the tower, without a tensor in between.
        norm_first: True: LayerNorm per patch, then gather (Keye-VL-8B-Preview). False: gather, then
            LayerNorm over the whole token (Keye-VL-1.5).
        out: Like the result. Must not overlap ``x`` or ``residual``.

    Returns:
        [num_patches / merge_size^2, merge_size^2 * hidden_size], dtype of ``x``; within a token the
        patches stand in raster order. LayerNorm in fp32, rounded once. With ``residual`` and
        ``patch_norm`` the bits are those of ``layer_norm`` and ``merge_patches`` in turn.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or the grid does not
            add up to num_patches.

    Source: Projector in modeling_keye.py of Keye-VL-8B-Preview; the transformers Keye-VL-1.5 port.
    """
    merge_size = check_length("merge_size", merge_size)
    if merge_size < 1:
        raise ValueError(f"merge_size must be positive, got {merge_size}")
    eps = check_eps("eps", eps)
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    num_patches, hidden_size = x.shape
    square = merge_size * merge_size
    norm_size = hidden_size if norm_first else square * hidden_size
    check_tensor("weight", weight, (norm_size,), x.dtype, x.device)
    check_tensor("bias", bias, (norm_size,), x.dtype, x.device)
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x.device)
    patch_weight, patch_bias, patch_eps = None, None, 0.0
    if patch_norm is not None:
        if len(patch_norm) != 3:
            raise ValueError(
                f"patch_norm must be (weight, bias, eps), got {len(patch_norm)} values"
            )
        patch_weight, patch_bias, patch_eps = patch_norm
        check_tensor("patch_norm[0]", patch_weight, (hidden_size,), x.dtype, x.device)
        check_tensor("patch_norm[1]", patch_bias, (hidden_size,), x.dtype, x.device)
        patch_eps = check_eps("patch_norm[2]", patch_eps)
    grid = flatten_grid(grid_thw, num_patches, merge_size=merge_size)
    shape = (num_patches // square, square * hidden_size)
    if out is None:
        out = x.new_empty(shape)
    else:
        check_tensor("out", out, shape, x.dtype, x.device)
    if num_patches > 0:
        patch = (patch_weight, patch_bias, patch_eps)
        _merge_patches_op(x, weight, bias, eps, residual, *patch, grid, merge_size, norm_first, out)
    return out
