"""The checkpoint's image processor: second resize, patches, and the fp32 form of them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import is_number
from keye_model.processing.batch import BatchFeature
from keye_model.processing.fetch import describe
from keye_model.processing.image import normalize, patchify, processor_size
from keye_model.processing.patches import ImagePatches
from keye_model.processing.picture import load_image
from keye_model.processing.rules import of


class KeyeImageProcessor:
    """Turns pictures into patches under the rules of `preprocessor_config.json`.

    Every attribute may be set afterwards and holds from the next picture on; raising
    ``max_pixels`` is how a picture gets more than 1280 tokens.

    Attributes:
        min_pixels, max_pixels: Bounds of the area after resizing, in pixels.
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per token along each side.
        image_mean, image_std: Three values each, in units of 1 (white).
        resample: A ``PIL.Image.Resampling`` value; 3 is bicubic, 2 bilinear.
        version: "1.0" (8B-Preview) or "1.5": what becomes of sides below 28 pixels.
    """

    def __init__(
        self,
        *,
        min_pixels: int = 102400,
        max_pixels: int = 1003520,
        patch_size: int = 14,
        merge_size: int = 2,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BICUBIC,
        version: str = "1.0",
        local_files_only: bool = False,
    ) -> None:
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.image_mean = image_mean
        self.image_std = image_std
        self.resample = resample
        self.version = version
        self.local_files_only = local_files_only

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike | Checkpoint,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        version: str | None = None,
        local_files_only: bool = False,
    ) -> KeyeImageProcessor:
        """Read `preprocessor_config.json`; no other file is needed.

        A key the file lacks takes the published value (102400 and 1003520 pixels, patches of 14,
        mean and std 0.5, bicubic). ``version`` defaults to "1.5" if the file names a 1.5 class.

        Raises:
            FileNotFoundError: No such checkpoint, or it lacks the file.
            ValueError: A value of the file is out of range.
        """
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        raw = checkpoint.json("preprocessor_config.json")
        if raw.get("temporal_patch_size", 1) != 1:
            raise NotImplementedError(
                "preprocessor_config.json must have temporal_patch_size 1, got "
                f"{raw['temporal_patch_size']!r}"
            )
        size = raw.get("size") or {}  # how converted checkpoints spell the bounds
        if not isinstance(size, dict):
            raise ValueError(f"preprocessor_config.json: size must be an object, got {size!r}")
        found = {
            "min_pixels": raw.get("min_pixels", size.get("shortest_edge")),
            "max_pixels": raw.get("max_pixels", size.get("longest_edge")),
            **{key: raw.get(key) for key in ("patch_size", "merge_size", "resample")},
            **{key: raw.get(key) for key in ("image_mean", "image_std")},
        }
        asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        found |= {key: value for key, value in asked.items() if value is not None}
        if version is None:
            classes = f"{raw.get('processor_class')} {raw.get('image_processor_type')}"
            version = "1.5" if "1_5" in classes else "1.0"
        processor = cls(
            **{key: value for key, value in found.items() if value is not None},
            version=version,
            local_files_only=checkpoint.local_files_only,
        )
        processor._check("preprocessor_config.json: ")
        return processor

    @property
    def factor(self) -> int:
        """Pixels along one side of a token: every side is resized to a multiple of it."""
        return self.patch_size * self.merge_size

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which a picture of such a size is resized; see `processor_size`."""
        return processor_size(
            height,
            width,
            factor=self.factor,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            enlarge_small=of(self.version).enlarge_small,
        )

    def patches(self, image: Any) -> ImagePatches:
        """Resize one picture and cut it up.

        Args:
            image: What `load_image` takes. An alpha channel is dropped, as the published image
                processors do; the helper (`fetch_image`) is what composites it.

        Raises:
            ValueError: The picture's sides differ by more than a factor of 200; else as
                `load_image`.
        """
        self._check()
        picture = load_image(image, alpha="drop", local_files_only=self.local_files_only)
        try:
            height, width = self.output_size(picture.height, picture.width)
        except ValueError as error:
            raise ValueError(f"image {describe(image)}: {error}") from error
        picture = picture.resize((width, height), resample=self.resample)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # [1, 3, H, W]
        grid_thw = (1, height // self.patch_size, width // self.patch_size)
        return ImagePatches(patchify(pixels, self.patch_size), grid_thw)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw bytes [N, 3, patch, patch] → fp32, by ``image_mean`` and ``image_std``."""
        return normalize(pixels, self.image_mean, self.image_std)

    def preprocess(self, images: Any, return_tensors: str = "pt") -> BatchFeature:
        """Patches of one picture or a list of them, as the model's forward takes them.

        Returns:
            pixel_values: [num_patches, 3, patch, patch], fp32, normalised.
            image_grid_thw: [num_images, 3], int64, in patches.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("images must hold at least one picture, got none")
        cut = [self.patches(image) for image in images]
        return BatchFeature(
            pixel_values=self.normalize(torch.cat([one.pixels for one in cut])),
            image_grid_thw=torch.tensor([one.grid_thw for one in cut]),
        )

    __call__ = preprocess

    def _check(self, where: str = "") -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "merge_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{where}{name} must be a positive integer, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"{where}min_pixels must be at most max_pixels, got {self.min_pixels} and "
                f"{self.max_pixels}"
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            values = value if isinstance(value, (list, tuple)) else ()
            if len(values) != 3 or not all(is_number(one) for one in values):
                raise ValueError(f"{where}{name} must hold three numbers, got {value!r}")
        if min(self.image_std) <= 0:
            raise ValueError(f"{where}image_std must be positive, got {self.image_std!r}")
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"{where}resample must be 0 to 5, got {self.resample!r}")
        of(self.version)  # raises for an unknown one
