"""Checkpoint tensors: their published names, where each one goes in our modules, and loading them.

The names and shapes are those of the safetensors files of Keye-VL-8B-Preview, as its
modeling_keye.py builds them; Keye-VL-1.5 differs in the shape of `mlp_AR.pre_norm` only. Only
safetensors files are read: a pickle runs the code inside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig
from keye_model.checkpoint.hub import LFS_POINTER, check_file, is_lfs_pointer, read_json

# Parts of the model, by what the published names of their tensors start with.
TOWER, PROJECTOR, DECODER_LAYERS = "visual.", "mlp_AR.", "model.layers."
_PREFIXES = (  # published -> ours; the first that fits counts
    ("visual.vision_model.embeddings.", "model.visual."),
    ("visual.vision_model.encoder.", "model.visual."),
    ("visual.vision_model.", "model.visual."),
    ("mlp_AR.", "model.mlp_AR."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
_FUSED = (  # one parameter of ours <- published ones, stacked along dim 0 in this order
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
)
_OTHER_LAYOUTS = (  # as the transformers ports and vLLM write them -> published
    ("model.visual.", "visual."),
    ("model.mlp_AR.", "mlp_AR."),
    ("model.mm_projector.", "mlp_AR."),
    ("mm_projector.", "mlp_AR."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("language_model.", "model."),
)
_UNUSED = (  # published, never read by a forward pass; present or absent
    "visual.vision_model.embeddings.packing_position_embedding.",
    "visual.vision_model.head.",
)
_STALE_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "cos_cached", "sin_cached")
_DTYPES = ("BF16", "F16", "F32")  # as safetensors spells them; others need scales we do not know
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
Module = TypeVar("Module", bound=nn.Module)


def tensor_shapes(config: KeyeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model uses, by its published name, with the shape it has on disk.

    Unused tensors that a checkpoint may also hold (the packing table, the pooling head) are left
    out, and so is `lm_head.weight` when the embeddings are tied.
    """
    vision, text = config.vision_config, config.text_config
    width, mlp = vision.hidden_size, vision.intermediate_size
    patch = vision.patch_size
    merged = width * vision.spatial_merge_size**2
    hidden, inner = text.hidden_size, text.intermediate_size
    q_width = text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim

    tower = "visual.vision_model."
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{tower}embeddings.patch_embedding.bias": (width,),
        f"{tower}embeddings.position_embedding.weight": (vision.position_grid**2, width),
    }
    for i in range(vision.num_hidden_layers):
        layer = f"{tower}encoder.layers.{i}."
        shapes |= _affine(f"{layer}layer_norm1", width) | _affine(f"{layer}layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", mlp, width) | _linear(f"{layer}mlp.fc2", width, mlp)
    shapes |= _affine(f"{tower}post_layernorm", width)

    shapes |= _affine("mlp_AR.pre_norm", width if config.variant.norm_first else merged)
    shapes |= _linear("mlp_AR.linear_1", merged, merged)
    shapes |= _linear("mlp_AR.linear_2", hidden, merged)

    shapes["model.embed_tokens.weight"] = (text.vocab_size, hidden)
    for i in range(text.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (q_width, hidden),
            f"{layer}self_attn.k_proj.weight": (kv_width, hidden),
            f"{layer}self_attn.v_proj.weight": (kv_width, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, q_width),
            f"{layer}self_attn.q_norm.weight": (text.head_dim,),
            f"{layer}self_attn.k_norm.weight": (text.head_dim,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, hidden)
    return shapes


@dataclass(frozen=True)
class Shard:
    """One safetensors file, and its used tensors as (name in the file, published name)."""

    path: Path
    tensors: tuple[tuple[str, str], ...]


def load_model(
    module_class: type[Module],
    config: KeyeConfig,
    directory: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Module:
    """Build a module from a checkpoint, holding at most the module and one tensor at a time.

    Every header is checked before anything is allocated, so a refused checkpoint costs nothing.

    Args:
        module_class: Built as `module_class(config)`; has `model` (a `KeyeModel`) and `lm_head`.
        config: Of this checkpoint.
        directory: Holds the safetensors files.
        device: Where the parameters are allocated; each tensor is copied straight there.
        dtype: Of all parameters; tensors of another floating dtype are cast.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        ValueError: Tensors are missing, unexpected, doubled, of a wrong shape or dtype, or not
            where the index says; a file is broken; the index leaves the directory; or there are
            only pickle files.
    """
    shards = find_tensors(directory, config)
    with torch.device("meta"):
        module = module_class(config)
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    if config.text_config.tie_word_embeddings:
        module.lm_head.weight = module.model.language_model.embed_tokens.weight
    copy_tensors(shards, destinations(module, config))
    return module


def find_tensors(directory: Path, config: KeyeConfig) -> list[Shard]:
    """Read the headers of a checkpoint's files and match them against `tensor_shapes`.

    Raises:
        As `load_model`. One error names every tensor that is wrong.
    """
    expected = tensor_shapes(config)
    files, placed = _files(directory)
    left = dict(placed)
    found: dict[str, Path] = {}
    shards, shapes, problems = [], {}, []
    for path in files:
        tensors = []
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - a file handle, not a dict
                name = published_name(key)
                left.pop(key, None)
                if _ignored(name, config):
                    continue
                here = f"{key} in {path.name}"
                if name not in expected:
                    problems.append(f"unexpected {here}")
                    continue
                if name in found:
                    problems.append(f"doubled {name}, in {found[name].name} and {path.name}")
                    continue
                header = file.get_slice(key)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                found[name], shapes[name] = path, shape
                tensors.append((key, name))
                if placed and placed.get(key) != path.name:
                    where = placed.get(key, "nowhere")
                    problems.append(f"misplaced {here}: the index says {where}")
                if dtype not in _DTYPES:
                    one = ", ".join(_DTYPES)
                    problems.append(f"wrong dtype of {here}: one of {one} expected, got {dtype}")
                if shape != expected[name]:
                    right = expected[name]
                    problems.append(f"wrong shape of {here}: {right} expected, got {shape}")
        shards.append(Shard(path, tuple(tensors)))
    where = {published_name(key): f", for which the index names {left[key]}" for key in left}
    missing = [name for name in expected if name not in found]
    missing += [name for name in where if name not in expected and not _ignored(name, config)]
    problems += [f"missing {name}{where.get(name, '')}" for name in missing]
    if problems:
        hints = _other_line(shapes.get("mlp_AR.pre_norm.weight"), config)
        hints += _other_files(directory, files)
        raise ValueError(
            f"{directory} must hold the tensors that its config.json describes, got "
            + "\n  ".join([f"{len(problems)} differences:", *hints, *problems])
        )
    return shards


def destinations(module: nn.Module, config: KeyeConfig) -> dict[str, torch.Tensor]:
    """For each published name, the (part of a) parameter of `module` that it fills."""
    shapes = tensor_shapes(config)
    parameters = dict(module.named_parameters())  # tied ones once
    views = {}
    for name, shape in shapes.items():
        target, first = (
            next(new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)),
            0,
        )
        for fused, parts in _FUSED:
            for i, part in enumerate(parts):
                if f".{part}." in name:
                    target = target.replace(part, fused)
                    first = sum(shapes[name.replace(part, other)][0] for other in parts[:i])
        views[name] = parameters[target].detach()[first : first + shape[0]]
        assert views[name].shape == shape, (name, target)
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in parameters.values())
    return views


def copy_tensors(shards: list[Shard], views: dict[str, torch.Tensor]) -> None:
    """Copy every found tensor to its place, one shard and one tensor at a time."""
    total = sum(len(shard.tensors) for shard in shards)
    # A bar on a terminal if it takes over a second (disable=None: nothing in a log).
    options = {"unit": "tensor", "disable": None, "delay": 1, "leave": False}
    with tqdm(total=total, desc="loading weights", **options) as bar:
        for shard in shards:
            with _opened(shard.path) as file:
                for key, name in shard.tensors:
                    views[name].copy_(file.get_tensor(key))
                    bar.update()


def published_name(name: str) -> str:
    """A tensor's published name, from its name in any layout met in the wild."""
    for other, published in _OTHER_LAYOUTS:
        if name.startswith(other):
            return published + name.removeprefix(other)
    return name


def _ignored(name: str, config: KeyeConfig) -> bool:
    if name == "lm_head.weight" and config.text_config.tie_word_embeddings:
        return True
    return name.startswith(_UNUSED) or any(part in name for part in _STALE_BUFFERS)


def _other_line(pre_norm: tuple[int, ...] | None, config: KeyeConfig) -> list[str]:
    """Say so when the projector's norm has the width of the other model line."""
    other = V1_5 if config.variant.norm_first else PREVIEW
    width = config.vision_config.hidden_size
    if not other.norm_first:
        width *= config.vision_config.spatial_merge_size**2
    if pre_norm != (width,):
        return []
    return [
        f"mlp_AR.pre_norm has {width} entries as in {other.name}, but config.json describes "
        f"{config.variant.name}"
    ]


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a checkpoint, and where its index says that each tensor is.

    As in transformers, `model.safetensors` counts before any index, so that an index which another
    checkpoint left behind names no old shards; then the files of the index; else all there are.
    """
    if os.path.lexists(directory / _SINGLE):
        return [directory / _SINGLE], {}
    index = read_json(directory, _INDEX, required=False)
    if index is None:
        return _files_without_index(directory), {}
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{directory / _INDEX} must contain the object 'weight_map'")
    names = sorted({str(name) for name in placed.values()})
    outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if outside:
        raise ValueError(
            f"{directory / _INDEX} must name safetensors files beside it, got {', '.join(outside)}"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} must hold the files its index names, {', '.join(missing)} missing"
        )
    return [directory / name for name in names], dict(placed)


def _files_without_index(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    numbered = [re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", path.name) for path in files]
    for stem, total in {(match[1], match[3]) for match in numbered if match}:
        names = [f"{stem}{i + 1:05}-of-{total}.safetensors" for i in range(int(total))]
        missing = [name for name in names if directory / name not in files]
        if missing:
            raise FileNotFoundError(
                f"{directory} must hold all shards of {total}, {', '.join(missing[:9])} missing"
            )
    if files:
        return files
    names = sorted(path.name for path in directory.glob("*"))
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise ValueError(
            f"checkpoint must hold its weights as safetensors, {directory} has only pickle "
            f"files, which run code when loaded: {', '.join(pickles)}"
        )
    found = [name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx"))]
    raise FileNotFoundError(
        f"checkpoint must contain *.safetensors, got {', '.join(found) or 'none'} in {directory}"
    )


def _other_files(directory: Path, files: list[Path]) -> list[str]:
    """Say which weights were not read, where the tensors of those that were do not fit."""
    single = files == [directory / _SINGLE]
    if single and (directory / _INDEX).exists():
        return [f"{_SINGLE} was read, as in transformers; delete it to load what {_INDEX} names"]
    others = sorted(path.name for path in directory.glob("*.safetensors") if path not in files)
    start = f"not read, since {_SINGLE if single else _INDEX} decides: "
    return [start + ", ".join(others)] if others else []


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        what = LFS_POINTER if is_lfs_pointer(path) else f"an error: {error}"
        raise ValueError(f"{path} must be a complete safetensors file, got {what}") from error


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}
