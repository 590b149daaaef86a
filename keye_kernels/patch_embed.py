"""Patches to tokens: normalised pixels times the patch weight, plus bias and position embedding."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, reference
from keye_kernels._checks import (
    FLOAT_DTYPES,
    Grid,
    check_finite,
    check_tensor,
    flatten_grid,
    grid_rows,
)
from keye_kernels._device import Device, device_of
from keye_kernels._ops import define_op
from keye_kernels._tuples import decode, encode

_patch_embed_op = define_op(
    "patch_embed(Tensor pixels, Tensor weight, Tensor bias, Tensor position_table, "
    "int[] grid_thw, float[] image_mean, float[] image_std, Tensor(a!) out) -> ()",
    reference=reference.patch_embed,
)


_MAX_GRIDS = 8  # of different size that one launch serves


class LaunchConfig(NamedTuple):
    """Patches and columns per program, depth of a step, warps, stages, bound on registers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def launch_config(
    num_patches: int,
    hidden_size: int,
    dtype: torch.dtype,
    pixel_dtype: torch.dtype,
    device: Device,
) -> LaunchConfig:
    """Choose the launch.

    Large tiles read pixels and weight less often; small ones keep every multiprocessor busy.
    """
    if dtype == torch.float32:  # no tensor cores
        return LaunchConfig(64, 64, 32, 8, 2, None)
    if triton.cdiv(num_patches, 128) * triton.cdiv(hidden_size, 128) < device.num_sms:
        return LaunchConfig(64, 64, 64, 4, 4, None)
    # 128 registers let two programs share a multiprocessor, one on its tensor cores while the other
    # normalises or adds positions. Ampere's MMA and fp32 pixels need more, and would spill.
    fits = device.capability >= (9, 0) and pixel_dtype != torch.float32
    return LaunchConfig(128, 128, 64, 8, 3, 128 if fits else None)


@functools.lru_cache(maxsize=16)
def _scale_and_shift(
    image_mean: tuple[float, ...], image_std: tuple[float, ...], dtype: torch.dtype
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Per channel (scale, shift) with ``fma(byte, scale, shift)``, in fp32, equal to the
    normalised byte after rounding to ``dtype``, for each of the 256 bytes. None where it is not.
    """
    byte = torch.arange(256, dtype=torch.float32)
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (image_mean, image_std))
    scale, shift = (1 / (255 * std.double())).float(), (-mean.double() / std.double()).float()
    fused = byte.double() * scale.double() + shift.double()  # the product is exact in fp64
    if not torch.equal(fused.float().to(dtype), ((byte / 255 - mean) / std).to(dtype)):
        return None
    return tuple(scale.flatten().tolist()), tuple(shift.flatten().tolist())


def _runs(flat_grid: list[int]) -> list[tuple[int, int, int]]:
    """(first patch, rows, columns) of each grid; neighbours of one size count as one video."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for t, h, w in grid_rows(flat_grid):
        if not runs or runs[-1][1:] != (h, w):
            runs.append((start, h, w))
        start += t * h * w
    return runs


@triton.jit
def _of_channel(values, offs_k, AREA: tl.constexpr):
    """Value of the channel of each element of a patch, [1, BLOCK_K]; one value serves all."""
    value = tl.full([1, offs_k.shape[0]], values[0], tl.float32)
    if len(values) == 3:
        k = offs_k[None, :]
        value = tl.where(k < AREA, value, tl.where(k < 2 * AREA, values[1], values[2]))
    return value


@triton.jit
def _multiply_step(
    acc, pixel_ptrs, weight_ptrs, mask_n, offs_k, firsts, seconds,
    K: tl.constexpr, NORMALISE: tl.constexpr, DIVIDE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """acc + normalised pixels [BLOCK_M, BLOCK_K] @ weight [BLOCK_K, BLOCK_N].

    A patch of 588 bytes starts at a multiple of 4, a row of 588 weights in 16 bits at one of 8:
    wider accesses, and the tensor memory accelerator, are not to be had in this layout.
    """
    if TAIL:
        mask_k = offs_k < K
        x = tl.load(pixel_ptrs + offs_k[None, :], mask=mask_k[None, :], other=0)
        weight = tl.load(
            weight_ptrs + offs_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
    else:
        x = tl.load(pixel_ptrs + offs_k[None, :])  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs + offs_k[:, None], mask=mask_n[None, :], other=0.0)
    if NORMALISE:
        x = x.to(tl.float32)
        first, second = _of_channel(firsts, offs_k, K // 3), _of_channel(seconds, offs_k, K // 3)
        # In registers, one instruction per pixel, and not folded into the weight. A folded weight
        # wants centred bytes, which are one instruction too: on bytes as they are its rounding
        # costs 130 times the error of published pixels on a grey picture (bf16, RMS), and on
        # centred ones still 7 times on a dark one. It would also be a copy to keep and renew.
        if DIVIDE:  # mean and standard deviation
            x = tl.div_rn(x, 255.0) - first
            x = tl.div_rn(x, second)
        else:  # scale and shift
            x = tl.fma(x, first, second)
    return tl.dot(x.to(weight.dtype), weight, acc, input_precision="ieee")


@triton.jit
def _sample(index, scale, SIDE: tl.constexpr):
    """Row (or column) of the table below patch ``index``, and the share of the next one."""
    # max and then -0.5 is -0.5 and then max with 0, but that the product cannot be fused with the
    # difference: its rounding decides which rows are taken.
    at = tl.maximum((index.to(tl.float32) + 0.5) * scale, 0.5) - 0.5
    low = tl.minimum(at.to(tl.int32), SIDE - 1)
    return low, at - low.to(tl.float32)


@triton.jit
def _add_positions_and_store(
    acc, bias_ptr, table_ptr, out_ptrs, place, w, scale_y, scale_x, offs_n, mask_m,
    HIDDEN: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Finish and store the columns ``offs_n``; ``place``: [BLOCK_M] patch within its frame."""
    mask_n = offs_n < HIDDEN
    y0, fy = _sample(place // w, scale_y, SIDE)
    x0, fx = _sample(place % w, scale_x, SIDE)
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    for i in range(4):  # a loop that stays one: all taps at once would need too many registers
        y = tl.minimum(y0 + i // 2, SIDE - 1)
        x = tl.minimum(x0 + i % 2, SIDE - 1)
        share = tl.where(i < 2, 1 - fy, fy) * tl.where(i % 2 == 0, 1 - fx, fx)
        tap_ptrs = table_ptr + ((y * SIDE + x) * HIDDEN)[:, None] + offs_n[None, :]
        tap = tl.load(tap_ptrs, mask=mask_n[None, :], other=0.0)  # [BLOCK_M, columns]
        acc += share[:, None] * tap.to(tl.float32)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(out_ptrs + offs_n[None, :], acc.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["end_patch"])
def _patch_embed_kernel(
    pixels_ptr, weight_ptr, bias_ptr, table_ptr, out_ptr, stride_out, end_patch,
    grids, firsts, seconds,
    K: tl.constexpr, HIDDEN: tl.constexpr, SIDE: tl.constexpr,
    NORMALISE: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    # Neighbours share patches, which come from memory; the weight stays in L2. No tile straddles
    # two grids, so what depends on the grid is a scalar. Grids are arguments: no table to upload.
    num_blocks: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // num_blocks
    block_n = tl.program_id(0) % num_blocks

    start, w, size, scale_y, scale_x = 0, 1, 1, 1.0, 1.0
    first, end, before = 0, 0, 0
    for i in tl.static_range(0, len(grids), 5):
        grid_start = decode(grids[i])
        grid_end = end_patch
        if i + 5 < len(grids):
            grid_end = decode(grids[i + 5])
        if tile >= before:
            start, end = grid_start, grid_end
            w = decode(grids[i + 2])
            size = decode(grids[i + 1]) * w
            scale_y, scale_x = grids[i + 3], grids[i + 4]
            first = start + (tile - before) * BLOCK_M
        before += (grid_end - grid_start + BLOCK_M - 1) // BLOCK_M

    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < HIDDEN
    # Rows past the end repeat the last patch, so that the loop needs no mask for them.
    patch = tl.minimum(offs_m, end - 1)
    pixel_ptrs = pixels_ptr + patch.to(tl.int64)[:, None] * K
    weight_ptrs = weight_ptr + offs_n[None, :] * K
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    for k in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):
        acc = _multiply_step(
            acc, pixel_ptrs, weight_ptrs, mask_n, k + tl.arange(0, BLOCK_K), firsts, seconds,
            K, NORMALISE, DIVIDE, False,
        )  # fmt: skip
    if K % BLOCK_K > 0:
        offs_k = K // BLOCK_K * BLOCK_K + tl.arange(0, BLOCK_TAIL)
        acc = _multiply_step(
            acc, pixel_ptrs, weight_ptrs, mask_n, offs_k, firsts, seconds,
            K, NORMALISE, DIVIDE, True,
        )  # fmt: skip

    place = (patch - start) % size
    out_ptrs = out_ptr + patch.to(tl.int64)[:, None] * stride_out
    halves = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    for i in tl.static_range(2):
        half = block_n * BLOCK_N + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        _add_positions_and_store(
            halves[i], bias_ptr, table_ptr, out_ptrs, place, w, scale_y, scale_x, half,
            offs_m < end, HIDDEN, SIDE,
        )  # fmt: skip


def _patch_embed_triton(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position_table: torch.Tensor,
    flat_grid: list[int],
    image_mean: list[float],
    image_std: list[float],
    out: torch.Tensor,
) -> None:
    num_patches, hidden_size = out.shape
    depth = weight[0].numel()
    side = math.isqrt(position_table.shape[0])
    normalise = pixels.dtype == torch.uint8
    firsts, seconds = tuple(image_mean), tuple(image_std)
    pair = _scale_and_shift(firsts, seconds, weight.dtype) if normalise else None
    firsts, seconds = pair or (firsts, seconds)
    if len(set(firsts)) == len(set(seconds)) == 1:
        firsts, seconds = firsts[:1], seconds[:1]

    runs = _runs(flat_grid)
    for i in range(0, len(runs), _MAX_GRIDS):
        some = runs[i : i + _MAX_GRIDS]
        end = runs[i + _MAX_GRIDS][0] if i + _MAX_GRIDS < len(runs) else num_patches
        config = launch_config(
            end - some[0][0], hidden_size, weight.dtype, pixels.dtype, device_of(out)
        )
        starts = [start for start, _, _ in some] + [end]
        num_tiles = sum(triton.cdiv(b - a, config.block_m) for a, b in itertools.pairwise(starts))
        grids = []
        for start, h, w in some + [(end, 1, 1)] * (_MAX_GRIDS - len(some)):
            grids += [*encode((start, h, w)), side / h, side / w]
        _patch_embed_kernel[(num_tiles * triton.cdiv(hidden_size, config.block_n),)](
            pixels, weight, bias, position_table, out, out.stride(0), end,
            tuple(grids), firsts, seconds,
            K=depth, HIDDEN=hidden_size, SIDE=side,
            NORMALISE=normalise, DIVIDE=normalise and pair is None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            BLOCK_TAIL=max(triton.next_power_of_2(depth % config.block_k), 16),
            num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )  # fmt: skip


_backends.register("patch_embed", "triton", _patch_embed_triton)


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
    image_mean = [check_finite("each of image_mean", value) for value in image_mean]
    image_std = [check_finite("each of image_std", value) for value in image_std]
    if min(image_std) <= 0:
        raise ValueError(f"image_std must be positive, got {tuple(image_std)}")
    grid = flatten_grid(grid_thw, num_patches)
    if out is None:
        out = weight.new_empty(num_patches, hidden_size)
    else:
        check_tensor("out", out, (num_patches, hidden_size), weight.dtype, weight.device)
    if num_patches > 0:
        _patch_embed_op(pixels, weight, bias, position_table, grid, image_mean, image_std, out)
    return out
