"""What a processor call returns: a dict of tensors that moves as one."""

from __future__ import annotations

from typing import Any

import torch


class BatchFeature(dict):
    """A dict whose entries are also attributes, shaped as Hugging Face users expect."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"BatchFeature has no entry {name!r}, only {', '.join(self) or 'none at all'}"
            ) from None

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> BatchFeature:
        """Move every tensor; returns self.

        Args:
            device: Where to. A dtype may stand here alone: ``inputs.to(torch.bfloat16)``.
            dtype: Floating type of the pixels. Ids, masks, grids and times keep theirs: seconds
                per frame rounded to bfloat16 would shift a video's positions.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                pixels = name.startswith("pixel_values") and value.is_floating_point()
                self[name] = value.to(device=device, dtype=dtype if pixels else None)
        return self


def pad(
    rows: list[list[int]],
    pad_id: int,
    padding: bool | str,
    *,
    padding_side: str,
    return_tensors: str | None,
) -> BatchFeature:
    """Rows of ids as ``input_ids`` and ``attention_mask``, filled up to equal length if asked.

    Args:
        rows: At least one.
        padding: True or "longest" fills with ``pad_id`` at ``padding_side``, "left" or "right".
        return_tensors: "pt" for [batch_size, num_tokens] int64, None for lists.

    Raises:
        ValueError: Unequal rows without padding for tensors, or an argument is none of the above.
    """
    padding = False if padding in (None, "do_not_pad") else padding
    if padding not in (True, False, "longest"):
        raise ValueError(f"padding must be True, False or 'longest', got {padding!r}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if return_tensors not in ("pt", None):
        raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
    if not rows:
        raise ValueError("text must hold at least one prompt, got none")
    lengths = [len(row) for row in rows]
    masks = [[1] * length for length in lengths]
    if padding:
        left = padding_side == "left"
        gaps = [max(lengths) - length for length in lengths]
        rows = [_fill(row, pad_id, gap, left) for row, gap in zip(rows, gaps, strict=True)]
        masks = [_fill(mask, 0, gap, left) for mask, gap in zip(masks, gaps, strict=True)]
    elif return_tensors == "pt" and min(lengths) != max(lengths):
        raise ValueError(
            f"padding must be True for prompts of unequal length, got lengths {lengths}"
        )
    if return_tensors is None:
        return BatchFeature(input_ids=rows, attention_mask=masks)
    return BatchFeature(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))


def _fill(row: list[int], value: int, gap: int, left: bool) -> list[int]:
    return [value] * gap + row if left else row + [value] * gap
