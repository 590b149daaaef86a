"""The Hugging Face shaped door: padded batches in, logits or token ids out.

Padding is taken off here and put back here; everything between is packed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import KeyeConfig
from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.checkpoint.weights import load_model
from keye_model.engine.calls import Draft, Engines, answer
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import sampling_params
from keye_model.inputs.keywords import GENERATING, LOADING, refuse, without_idle
from keye_model.inputs.options import SamplingOptions
from keye_model.inputs.packing import pack, requests_of, split_batch
from keye_model.network.cache import PagedCache
from keye_model.network.model import KeyeModel
from keye_model.network.text import Linear
from keye_model.network.upload import upload
from keye_model.processing.tokenizer import load_tokenizer


@dataclass
class KeyeOutput:
    """What `KeyeForConditionalGeneration` returns.

    Attributes:
        logits: [batch_size, padded_length, vocab_size], dtype of the model; 0 at padding.
    """

    logits: torch.Tensor


class KeyeForConditionalGeneration(nn.Module):
    """Keye-VL with its language-model head.

    Build one with `from_pretrained`. Forward only: parameters do not require gradients.
    """

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = KeyeModel(config)
        text = config.text_config
        self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)
        self.generation_config: GenerationDefaults | None = None
        self.engines = Engines()
        self._directory: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike | Checkpoint,
        *,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | dict | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> KeyeForConditionalGeneration:
        """Load a checkpoint: `config.json`, `generation_config.json` and safetensors.

        Args:
            path_or_id: A directory or a Hub id.
            dtype: Of the parameters; "auto" is the checkpoint's. ``torch_dtype`` is its old name.
            device_map: "auto" (a GPU if there is one), a device, or ``{"": device}``. None is the
                CPU. Several devices are not served.
            local_files_only: Never touch the network.
            options: Keywords of transformers with a value that changes nothing.
                ``trust_remote_code`` and ``attn_implementation`` are ignored: a checkpoint's code
                is never run, and attention is our own.

        Raises:
            FileNotFoundError: The checkpoint or one of its files is missing.
            ValueError: The configuration or a tensor is not what it should be.
            NotImplementedError: The device map names several devices, or an option is not served.
            TypeError: An option is unknown.
        """
        refuse(without_idle(options, LOADING), "dtype, torch_dtype, device_map, local_files_only")
        device = resolve_device("device_map", device_map)
        if torch_dtype is not None and dtype not in (None, "auto", torch_dtype):
            raise ValueError(f"dtype must be given once, got {dtype} and torch_dtype {torch_dtype}")
        dtype = _dtype(torch_dtype if torch_dtype is not None else dtype)
        # All that can be refused is refused before the weights are fetched.
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        config = KeyeConfig.from_pretrained(checkpoint)
        defaults = GenerationDefaults.from_pretrained(checkpoint)
        directory = checkpoint.fetch_weights()
        model = load_model(cls, config, directory, device=device, dtype=dtype or config.dtype)
        model.generation_config = defaults
        model._directory = directory
        return model

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @torch.no_grad()  # not inference_mode: callers may change the logits, or train a head on them
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | Sequence | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | Sequence | None = None,
        second_per_grid_ts: torch.Tensor | Sequence | None = None,
        num_frames: torch.Tensor | Sequence | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> KeyeOutput:
        """Logits of every token of a padded batch.

        Args:
            input_ids: [batch_size, padded_length], int64, placeholders expanded.
            attention_mask: [batch_size, padded_length], 0 at padding (left or right); None means
                no padding.
            pixel_values: [num_image_patches, 3, patch, patch], uint8 or normalised float.
            image_grid_thw: [num_images, 3], in patches; images in reading order of the batch.
            pixel_values_videos, video_grid_thw: The same for videos.
            second_per_grid_ts: [num_video_rows], seconds between frames (8B-Preview).
            num_frames: [num_videos], frames of each video (1.5).
            position_ids: [3, batch_size, padded_length], int64; None computes them.

        Raises:
            ValueError: A shape, a grid or the number of placeholders is wrong.
        """
        grids = (image_grid_thw, video_grid_thw, second_per_grid_ts, num_frames)
        rows = split_batch(self.config, input_ids, *grids, attention_mask)
        packed = pack(requests_of(rows, pixel_values, pixel_values_videos), self.config)
        positions = packed.positions
        if position_ids is not None:
            if position_ids.shape != (3, *input_ids.shape):
                raise ValueError(
                    f"position_ids must have shape {(3, *input_ids.shape)}, got "
                    f"{tuple(position_ids.shape)}"
                )
            host = position_ids.cpu()
            positions = torch.cat([host[:, i, row.kept] for i, row in enumerate(rows)], dim=1)
        cache, layout = PagedCache.for_single_pass(
            self.config.text_config, packed.seqlens, dtype=self.dtype, device=self.device
        )
        hidden = self.model.embed(packed)
        hidden = self.model(hidden, upload(positions, self.device), cache, layout)
        logits = self.lm_head(hidden)
        if logits.shape[0] == input_ids.numel():  # nothing was padded
            return KeyeOutput(logits.view(*input_ids.shape, -1))
        batch_rows = torch.cat([torch.full_like(row.kept, i) for i, row in enumerate(rows)])
        columns = torch.cat([row.kept for row in rows])
        padded = logits.new_zeros((*input_ids.shape, logits.shape[1]))
        padded[upload(batch_rows, self.device), upload(columns, self.device)] = logits
        return KeyeOutput(padded)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | Sequence | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | Sequence | None = None,
        second_per_grid_ts: torch.Tensor | Sequence | None = None,
        num_frames: torch.Tensor | Sequence | None = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Generate from a padded batch; inputs as in `forward`.

        Args:
            eos_token_id: One or several ids that end a row, instead of the checkpoint's.
            pad_token_id: Fills rows that ended before others, instead of the checkpoint's.
            limits: Bounds of memory.
            options: Fields of `SamplingOptions`, as `Keye.generate` takes them, a seed for all rows
                or one for each; and keywords of transformers with a value that changes nothing,
                such as ``num_beams=1`` or ``use_cache=True``.

        Returns:
            [batch_size, padded_length + new], int64: the input, then the generated ids with the
            stop id, then padding.

        Raises:
            ValueError: An input or a parameter is wrong, or a prompt leaves no room in the context.
            NotImplementedError: An option of transformers that is not served, ``num_beams=4`` for
                one.
            TypeError: An option is unknown.
        """
        given = without_idle(options, GENERATING)
        sampling = SamplingOptions.of(given, "eos_token_id", "pad_token_id", "limits")
        defaults = self.generation_config
        if defaults is None:
            raise RuntimeError(
                "generation_config must be set before generate(); from_pretrained does it"
            )
        ends, pad = defaults.eos_token_ids, defaults.pad_token_id
        if eos_token_id is not None:
            ends = _token_ids("eos_token_id", eos_token_id)
        if pad_token_id is not None:
            [pad] = _token_ids("pad_token_id", [pad_token_id])
        grids = (image_grid_thw, video_grid_thw, second_per_grid_ts, num_frames)
        rows = split_batch(self.config, input_ids, *grids, attention_mask)
        params = sampling_params(sampling, defaults, len(rows))
        requests = requests_of(rows, pixel_values, pixel_values_videos)
        drafts = [Draft() for _ in rows]
        if sampling.stop_strings is not None and sampling.stop_strings != []:
            tokenizer = self._tokenizer()
            drafts = [Draft(Detokenizer(tokenizer, sampling.stop_strings)) for _ in rows]
        run = self.engines.run(
            self.model,
            self.lm_head,
            requests,
            params,
            eos_token_ids=ends,
            limits=limits,
        )
        for _ in answer(run, drafts):
            pass
        longest = max(len(draft.token_ids) for draft in drafts)
        padded = [one.token_ids + [pad] * (longest - len(one.token_ids)) for one in drafts]
        new = torch.tensor(padded, dtype=torch.int64, device=input_ids.device)
        return torch.cat([input_ids, new], dim=1)

    def _tokenizer(self) -> Tokenizer:
        try:
            if self._directory is None:
                raise FileNotFoundError("the model was not loaded from a checkpoint")
            return load_tokenizer(self._directory)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"stop_strings need the checkpoint's tokenizer.json: {error}"
            ) from error


def _token_ids(name: str, value: int | Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    """Ids given as one, a list or a tensor."""
    given = value.tolist() if isinstance(value, torch.Tensor) else value
    ids = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not ids or not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError(f"{name} must be a token id, got {value!r}")
    return ids


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype named; None for "auto"."""
    if dtype is None or dtype == "auto":
        return None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be 'auto', float32, float16 or bfloat16, got {dtype!r}")
    return named


def resolve_device(name: str, device: torch.device | str | dict | None) -> torch.device:
    """The one device that argument ``name`` asks for: "auto", None (the CPU), a device or a map.

    Raises:
        ValueError: It is no CPU or CUDA device.
        NotImplementedError: It is a map with several devices.
        RuntimeError: This machine does not have it.
    """
    given = device
    if isinstance(device, dict):
        if len(set(device.values())) != 1:
            raise NotImplementedError(f"{name} must name one device, got {device}")
        device = next(iter(device.values()))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be 'auto', a CPU or a CUDA device, got {given!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"{name} must name a device of this machine, got {given!r} with "
            f"{torch.cuda.device_count()} CUDA devices here"
        )
    return found
