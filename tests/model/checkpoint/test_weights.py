"""Loading: every layout met in the wild, memory, and every way a checkpoint can be wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye_model.checkpoint import weights
from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig
from keye_model.conditional_generation import KeyeForConditionalGeneration
from tests.model import tiny

CONFIG = KeyeConfig.from_dict(tiny.raw_config(PREVIEW))
INDEX = "model.safetensors.index.json"


def load(directory: Path, config: KeyeConfig = CONFIG, dtype: torch.dtype = torch.float32):
    return weights.load_model(tiny.TinyKeye, config, directory, device="cpu", dtype=dtype)


def write(directory: Path, tensors: dict[str, torch.Tensor], **options) -> Path:
    return tiny.write_checkpoint(directory, tiny.raw_config(PREVIEW), tensors, **options)


def tensors() -> dict[str, torch.Tensor]:
    return tiny.state_dict(CONFIG)


def assert_loaded(model: tiny.TinyKeye) -> None:
    expected = tiny.tiny_keye().state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor.to(actual[name])), name


@pytest.mark.parametrize(
    ("variant", "count"), [(PREVIEW, 8_643_841_648), (V1_5, 8_643_848_560)], ids=lambda v: str(v)
)
def test_published_sizes(variant, count):
    # The counts of the published models without their unused tables: 854 tensors less 12.
    raw = tiny.raw_config(variant) | {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    raw["vision_config"] |= {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    }
    shapes = weights.tensor_shapes(KeyeConfig.from_dict(raw))
    assert len(shapes) == 842
    assert sum(map(math.prod, shapes.values())) == count


def test_fused_parameters_hold_their_parts_in_order():
    model, published = tiny.tiny_keye(), tensors()
    for ours, theirs, parts in (
        ("model.visual.layers.1.self_attn.qkv_proj.bias",
         "visual.vision_model.encoder.layers.1.self_attn.{}_proj.bias", "qkv"),
        ("model.visual.layers.0.self_attn.qkv_proj.weight",
         "visual.vision_model.encoder.layers.0.self_attn.{}_proj.weight", "qkv"),
        ("model.language_model.layers.1.self_attn.qkv_proj.weight",
         "model.layers.1.self_attn.{}_proj.weight", "qkv"),
        ("model.language_model.layers.0.mlp.gate_up_proj.weight",
         "model.layers.0.mlp.{}_proj.weight", ("gate", "up")),
    ):  # fmt: skip
        expected = torch.cat([published[theirs.format(part)] for part in parts])
        assert torch.equal(model.get_parameter(ours).cpu(), expected), ours


def test_one_file(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path))


def test_shards_without_an_index(tmp_path):
    write(tmp_path, tensors(), num_shards=3)
    (tmp_path / INDEX).unlink()
    assert_loaded(load(tmp_path))


def test_the_index_decides_which_files_count(tmp_path):
    write(tmp_path, tensors())
    save_file({"other.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert_loaded(load(tmp_path))


def test_cast_while_loading(tmp_path):
    model = load(write(tmp_path, tensors()), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_loaded(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def converted(name: str) -> str:
    """As the transformers port of 1.5 names tensors."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("mlp_AR."):
        return name.replace("mlp_AR.", "model.mm_projector.")
    return name.replace("model.", "model.language_model.") if name.startswith("model.") else name


def engine(name: str) -> str:
    """As vLLM names them in memory, before it fuses any."""
    return f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name


def nested(name: str) -> str:
    """The converted layout, but with the projector's published name."""
    return converted(name).replace("mm_projector", "mlp_AR")


@pytest.mark.parametrize("rename", [converted, engine, nested])
def test_other_layouts(tmp_path, rename):
    assert_loaded(load(write(tmp_path, {rename(n): t for n, t in tensors().items()})))


def test_a_whole_converted_checkpoint(tmp_path):
    """1.5 as the transformers port saves it: nested configuration, its names of tensors."""
    raw = tiny.raw_config(V1_5)
    found = tiny.state_dict(KeyeConfig.from_dict(raw))
    del raw["architectures"], raw["vision_start_token_id"], raw["vision_end_token_id"]
    shared = ("model_type", "torch_dtype", "image_token_id", "video_token_id", "vision_config")
    new = {key: raw.pop(key) for key in shared} | {"model_type": "keye_vl_1_5", "text_config": raw}
    rope = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    raw["rope_parameters"] = rope | {"mrope_section": raw.pop("rope_scaling")["mrope_section"]}
    new["vision_config"].pop("tokens_per_second")
    tiny.write_checkpoint(tmp_path, new, {converted(name): t for name, t in found.items()})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path, device_map=tiny.DEVICE)
    request = tiny.g4()
    logits = model(
        input_ids=request.input_ids[None],
        pixel_values=request.pixel_values,
        image_grid_thw=request.image_grid_thw,
        pixel_values_videos=request.pixel_values_videos,
        video_grid_thw=request.video_grid_thw,
        num_frames=[3],
    ).logits
    assert torch.equal(logits[0], tiny.tiny_keye(V1_5).logits(request))


def test_unused_tensors_may_be_present(tmp_path):
    tower = "visual.vision_model."
    extra = {
        f"{tower}embeddings.packing_position_embedding.weight": torch.ones(32, 144),
        f"{tower}embeddings.position_ids": torch.arange(729)[None],
        f"{tower}head.probe": torch.ones(1, 1, 144),
        f"{tower}head.mlp.fc1.weight": torch.ones(100, 144),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(64),
        "model.rotary_emb.cos_cached": torch.ones(3),
    }
    assert_loaded(load(write(tmp_path, tensors() | extra)))
    renamed = {converted(name): tensor for name, tensor in (tensors() | extra).items()}
    assert_loaded(load(write(tmp_path / "converted", renamed)))


@pytest.mark.parametrize("present", [False, True], ids=["absent", "present"])
def test_tied_embeddings(tmp_path, present):
    config = KeyeConfig.from_dict(tiny.raw_config(PREVIEW, tie_word_embeddings=True))
    found = tensors()
    if not present:
        del found["lm_head.weight"]
    model = load(write(tmp_path, found), config)
    embedding = model.model.language_model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, found["model.embed_tokens.weight"])


def test_every_difference_is_named_at_once(tmp_path):
    found = tensors()
    del found["model.norm.weight"], found["mlp_AR.linear_1.bias"]
    found["model.layers.0.self_attn.q_proj.bias"] = torch.ones(512)
    found["model.layers.1.self_attn.k_norm.weight"] = torch.ones(64)
    found["lm_head.weight"] = torch.ones(100, 256, dtype=torch.int8)
    with pytest.raises(ValueError, match="must hold the tensors that its config") as caught:
        load(write(tmp_path, found))
    message = str(caught.value)
    assert "got 5 differences" in message
    for line in (
        "missing model.norm.weight",
        "missing mlp_AR.linear_1.bias",
        "unexpected model.layers.0.self_attn.q_proj.bias in model-0000",
        "wrong shape of model.layers.1.self_attn.k_norm.weight in model-0000",
        ".safetensors: (128,) expected, got (64,)",
        "wrong dtype of lm_head.weight in model-0000",
        ".safetensors: one of BF16, F16, F32 expected, got I8",
    ):
        assert line in message


@pytest.mark.parametrize("name", [
    "visual.vision_model.embeddings.position_embedding.weight",
    "visual.vision_model.encoder.layers.1.self_attn.out_proj.bias",
    "mlp_AR.pre_norm.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
])  # fmt: skip
def test_a_missing_tensor_is_named(tmp_path, name):
    found = tensors()
    del found[name]
    with pytest.raises(ValueError, match=rf"got 1 differences:\n  missing {name}$"):
        load(write(tmp_path, found))


def test_a_tensor_in_two_shards(tmp_path):
    write(tmp_path, tensors())
    (tmp_path / INDEX).unlink()
    save_file({"model.norm.weight": torch.ones(256)}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"doubled model.norm.weight, in model.* and z.safetens"):
        load(tmp_path)


def test_a_tensor_under_two_names(tmp_path):
    twice = tensors() | {"model.language_model.norm.weight": torch.ones(256)}
    with pytest.raises(ValueError, match=r"doubled model.norm.weight"):
        load(write(tmp_path, twice))


@pytest.mark.parametrize(
    ("weights_of", "config_of", "message"),
    [
        (PREVIEW, V1_5, "pre_norm has 144 entries as in Keye-VL-8B-Preview, but .* Keye-VL-1.5"),
        (V1_5, PREVIEW, "pre_norm has 576 entries as in Keye-VL-1.5, but .* Keye-VL-8B-Preview"),
    ],
    ids=["8B-Preview's weights", "1.5's weights"],
)
def test_the_other_lines_weights(tmp_path, weights_of, config_of, message):
    found = tiny.state_dict(KeyeConfig.from_dict(tiny.raw_config(weights_of)))
    config = KeyeConfig.from_dict(tiny.raw_config(config_of))
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, found), config)


def test_missing_shards(tmp_path):
    write(tmp_path, tensors(), num_shards=3)
    for i in (1, 3):
        (tmp_path / f"model-0000{i}-of-00003.safetensors").unlink()
    names = "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors missing"
    with pytest.raises(FileNotFoundError, match=f"must hold the files its index names, {names}"):
        load(tmp_path)


def test_one_file_goes_before_a_stale_index(tmp_path):
    """As in transformers: never the old shards that somebody's index still names."""
    write(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in tensors().items()})
    save_file(tensors(), tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path))
    for shard in tmp_path.glob("model-0*"):
        shard.unlink()
    assert_loaded(load(tmp_path))
    (tmp_path / INDEX).write_text("{")
    assert_loaded(load(tmp_path))


def test_one_file_that_does_not_fit_beside_an_index(tmp_path):
    write(tmp_path, tensors())
    save_file({"lora.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors was read, .* delete it to load what"):
        load(tmp_path)


def test_shards_that_the_index_does_not_name(tmp_path):
    """They are not read; where a tensor is missing, their names may say why."""
    write(tmp_path, tensors())
    shard = tmp_path / "model-00003-of-00003.safetensors"
    save_file({"model.norm.weight": torch.zeros(256)}, shard)
    assert_loaded(load(tmp_path))
    index = json.loads((tmp_path / INDEX).read_text())
    holder = tmp_path / index["weight_map"]["model.norm.weight"]
    kept = {k: t.clone() for k, t in load_file(holder).items() if k != "model.norm.weight"}
    save_file(kept, holder)
    with pytest.raises(ValueError, match="must hold the tensors") as caught:
        load(tmp_path)
    assert f"not read, since {INDEX} decides: {shard.name}\n" in str(caught.value)
    assert f"missing model.norm.weight, for which the index names {holder.name}" in str(
        caught.value
    )


def test_an_index_that_disagrees_with_its_files(tmp_path):
    write(tmp_path, tensors())
    index = json.loads((tmp_path / INDEX).read_text())
    placed = index["weight_map"]
    first, second = sorted(set(placed.values()))
    moved = next(name for name in placed if placed[name] == first)
    forgotten = next(name for name in placed if placed[name] == second)
    placed[moved] = second
    del placed[forgotten]
    placed["model.layers.9.mlp.up_proj.weight"] = second
    placed["visual.vision_model.head.probe"] = second  # nobody misses it
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="got 3 differences") as caught:
        load(tmp_path)
    for line in (
        f"misplaced {moved} in {first}: the index says {second}",
        f"misplaced {forgotten} in {second}: the index says nowhere",
        f"missing model.layers.9.mlp.up_proj.weight, for which the index names {second}",
    ):
        assert line in str(caught.value)


def test_a_tensor_in_two_shards_of_an_index(tmp_path):
    write(tmp_path, tensors())
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    extra, tensor = next(iter(load_file(first).items()))
    both = {name: one.clone() for name, one in load_file(second).items()} | {extra: tensor}
    save_file(both, second)
    with pytest.raises(ValueError, match=f"doubled {extra}, in {first.name} and {second.name}"):
        load(tmp_path)


def test_missing_shards_without_an_index(tmp_path):
    write(tmp_path, tensors(), num_shards=4)
    (tmp_path / INDEX).unlink()
    for i in (2, 4):
        (tmp_path / f"model-0000{i}-of-00004.safetensors").unlink()
    names = "model-00002-of-00004.safetensors, model-00004-of-00004.safetensors missing"
    with pytest.raises(FileNotFoundError, match=f"must hold all shards of 00004, {names}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_git_lfs_pointer(tmp_path, name):
    write(tmp_path, tensors())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976687216\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match=rf"/{name} must be a complete .* Git LFS pointer .* pull"):
        load(tmp_path)


def test_a_link_to_nothing(tmp_path):
    """What a download that was cut short leaves behind."""
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(
        FileNotFoundError, match=r"/model\.safetensors must be a file, got a link to"
    ):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(FileNotFoundError, match=f"files its index names, {shard.name} missing"):
        load(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} must be a file, got a link to noth"):
        load(tmp_path)


def test_the_layout_of_the_hub_cache(tmp_path):
    """Snapshots hold links to blobs whose names say nothing."""
    source, snapshot = write(tmp_path / "source", tensors()), tmp_path / "snapshots" / "abc"
    (tmp_path / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(source.iterdir()):
        path.rename(tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert_loaded(load(snapshot))


@pytest.mark.parametrize("name", ["model.gguf", "tf_model.h5", "flax_model.msgpack"])
def test_weights_of_another_format_are_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=rf"contain \*.safetensors, got {name} in /"):
        load(tmp_path)


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must contain model\.safetensors, got none in /"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 1000, -1], ids=["empty", "no header", "header", "data"])
def test_truncated_shard(tmp_path, size):
    write(tmp_path, tensors())
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors must be a complete"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not read")
    with pytest.raises(ValueError, match=f"as safetensors, .* has only pickle files, .*: {name}"):
        load(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint must contain \*.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.safetensors", "sub/a.safetensors", "..", "a.bin", ""]
)
def test_an_index_may_not_leave_its_directory(tmp_path, name):
    save_file(tensors(), tmp_path / "evil.safetensors")
    directory = write(tmp_path / "checkpoint", tensors())
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"must name safetensors files beside it, got {name}"):
        load(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map(tmp_path, index):
    write(tmp_path, tensors())
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must contain the object 'weight_map'"):
        load(tmp_path)


def test_an_index_that_is_no_json(tmp_path):
    write(tmp_path, tensors())
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=rf"{INDEX} must be valid JSON"):
        load(tmp_path)


def test_a_refused_checkpoint_allocates_nothing(tmp_path):
    found = tensors()
    del found["model.norm.weight"]
    write(tmp_path, found)

    def build(_):
        raise AssertionError("built before the checkpoint was checked")

    with pytest.raises(ValueError, match=r"missing model\.norm\.weight"):
        weights.load_model(build, CONFIG, tmp_path, device="cpu", dtype=torch.float32)


def test_memory_is_the_model_and_one_tensor(tmp_path, monkeypatch):
    # Each tensor is dropped before the next one is read.
    import weakref

    write(tmp_path, tensors())
    alive, most = weakref.WeakSet(), 0
    safe_open = weights.safe_open

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            nonlocal most
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    monkeypatch.setattr(weights, "safe_open", Counting)
    assert_loaded(load(tmp_path))
    assert most == 1


def test_no_progress_bar_outside_a_terminal(tmp_path, capfd):
    load(write(tmp_path, tensors()))
    assert capfd.readouterr() == ("", "")
