"""What a checkpoint says about generation: the ids that end an answer, and how to sample."""

from __future__ import annotations

import os
from dataclasses import dataclass

from keye_model.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generation_config.json` says; the published values where it is silent."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    do_sample: bool = True
    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike | Checkpoint, *, local_files_only: bool = False
    ) -> GenerationDefaults:
        """Read `generation_config.json`, which may be absent.

        Ids that it leaves open have the published values, looked up by string in `tokenizer.json`:
        ``<|im_end|>`` and ``<|endoftext|>`` end an answer, ``<|endoftext|>`` fills batches up. Only
        without these does `config.json` count, which names one end id of the two.

        Raises:
            ValueError: No file names an end id, so that generation would never end by itself; or
                what is named is no id.
        """
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        raw = checkpoint.json("generation_config.json", required=False) or {}
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        return cls(*_end_ids(checkpoint, raw.get("eos_token_id"), raw.get("pad_token_id")), **given)


def _end_ids(checkpoint: Checkpoint, eos: object, pad: object) -> tuple[tuple[int, ...], int]:
    """Ids that end an answer and the id that fills batches up, from the two that are named."""
    directory = checkpoint.directory
    if eos is None or pad is None:
        added = checkpoint.added_tokens
        config = checkpoint.json("config.json", required=False) or {}
        if eos is None:
            eos = [added[token] for token in ("<|im_end|>", "<|endoftext|>") if token in added]
            eos = eos or config.get("eos_token_id")
        if pad is None:
            pad = added.get("<|endoftext|>", config.get("pad_token_id"))
    if eos is None:
        raise ValueError(
            f"generation_config.json must contain 'eos_token_id', or tokenizer.json the token "
            f"'<|im_end|>', {directory} has neither"
        )
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    pad = ends[-1] if pad is None and ends else pad
    for name, ids, given in (("eos_token_id", ends, eos), ("pad_token_id", (pad,), pad)):
        if not ids or not all(type(one) is int and one >= 0 for one in ids):
            raise ValueError(f"{name} of {directory} must be a token id, got {given!r}")
    return ends, pad
