"""The padded door: the same answers as unpadded, and clear refusals."""

import shutil

import pytest
import torch

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.memory import Limits


@pytest.fixture(scope="module", params=[PREVIEW.name, V1_5.name])
def model(request, checkpoints):
    return KeyeForConditionalGeneration.from_pretrained(
        checkpoints[request.param], device_map="auto"
    )


@pytest.fixture(scope="module")
def prompts(model):
    """Ids and vision tensors of three prompts: words, an image, an image and a video."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    image = [start, *[config.image_token_id] * 6, end]
    video = [start, *[config.video_token_id] * 8, end]
    pixels = torch.randn((48, 3, 14, 14), generator=generator)
    frames = torch.randn((32, 3, 14, 14), generator=generator)
    images = {"pixel_values": pixels[:24], "image_grid_thw": torch.tensor([[1, 4, 6]])}
    more = {"pixel_values": pixels[24:], "image_grid_thw": torch.tensor([[1, 4, 6]])}
    videos = {
        "pixel_values_videos": frames,
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "second_per_grid_ts": torch.tensor([0.5]),
    }
    return [
        ([5, 6, 7], {}),
        ([9, *image, 3, 4], images),
        ([8, *image, 1, *video, 2], more | videos),
    ]


def padded(prompts, side):
    """The prompts as one batch."""
    longest = max(len(ids) for ids, _ in prompts)
    rows, masks = [], []
    for ids, _ in prompts:
        fill, ones = [0] * (longest - len(ids)), [1] * len(ids)
        rows.append(fill + ids if side == "left" else ids + fill)
        masks.append(fill + ones if side == "left" else ones + fill)
    media = {}
    for _, kinds in prompts:
        for name, value in kinds.items():
            media[name] = torch.cat([media[name], value]) if name in media else value
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks), **media}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_unpadded(model, prompts, side):
    batch = padded(prompts, side)
    logits = model(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)
    for row, mask, (ids, media) in zip(logits, batch["attention_mask"], prompts, strict=True):
        alone = model(torch.tensor([ids]), **media).logits[0]
        torch.testing.assert_close(row[mask == 1], alone, rtol=0, atol=2e-5)
        assert (row[mask == 0] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_generation_equals_unpadded(model, prompts, side):
    batch = padded(prompts, side)
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    length = batch["input_ids"].shape[1]
    assert torch.equal(out[:, :length], batch["input_ids"])
    for row, (ids, media) in zip(out, prompts, strict=True):
        alone = model.generate(torch.tensor([ids]), **media, max_new_tokens=5, do_sample=False)
        assert torch.equal(row[length:], alone[0, len(ids) :])


@pytest.mark.parametrize("side", ["left", "unpadded"])
def test_logits_may_be_changed_and_trained_on(model, prompts, side):
    batch = padded(prompts if side == "left" else prompts[:1], "left")
    logits = model(**batch).logits
    logits[..., 0] = -1
    scale = torch.ones((), requires_grad=True, device=logits.device)
    (logits * scale).sum().backward()
    assert torch.isfinite(scale.grad)


def test_the_tokenizer_is_read_once(model, prompts, monkeypatch):
    reads = []
    real = model._tokenizer
    monkeypatch.setattr(model, "_tokenizer", lambda: reads.append(1) or real())
    model.generate(**padded(prompts, "left"), max_new_tokens=2, stop_strings=["never"])
    assert len(reads) == 1
    with pytest.raises(ValueError, match="non-empty strings, got ''"):
        model.generate(**padded(prompts, "left"), max_new_tokens=2, stop_strings="")


def test_float16_runs(preview_checkpoint, prompts):
    """The documentation page loads the model in fp16."""
    half = KeyeForConditionalGeneration.from_pretrained(
        preview_checkpoint, torch_dtype=torch.float16, device_map="auto"
    )
    full = KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, device_map="auto")
    ids, media = prompts[2]
    logits = [m(torch.tensor([ids]), **media).logits.float() for m in (half, full)]
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[1].norm()


def test_forward_positions_are_those_of_get_rope_index(model, prompts):
    batch = padded(prompts, "left")
    grids = {name: value for name, value in batch.items() if not name.startswith("pixel_values")}
    positions, deltas = model.model.get_rope_index(**grids)
    assert positions.shape == (3, *batch["input_ids"].shape)
    assert deltas.shape == (3, 1)
    expected = model(**batch).logits
    torch.testing.assert_close(
        model(**batch, position_ids=positions).logits, expected, rtol=0, atol=0
    )
    moved = model(**batch, position_ids=positions * 3).logits
    assert not torch.allclose(moved, expected, atol=1e-3)


def test_generate_pads_after_the_stop_id(checkpoints, prompts, model):
    greedy = model.generate(**padded(prompts, "left"), max_new_tokens=4, do_sample=False)
    new = greedy[:, -4:]
    stopping = KeyeForConditionalGeneration.from_pretrained(checkpoints[model.config.variant.name])
    stopping.generation_config = type(model.generation_config)((int(new[0, 1]),), 1)
    out = stopping.generate(**padded(prompts, "left"), max_new_tokens=4, do_sample=False)
    kept = int((new[0] == new[0, 1]).nonzero()[0]) + 1
    expected = new[0, :kept].tolist() + [1] * (out.shape[1] - greedy.shape[1] + 4 - kept)
    assert out[0, greedy.shape[1] - 4 :].tolist() == expected


def test_generate_stop_strings(model, prompts):
    ids = torch.tensor([prompts[0][0]])
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 3:]
    tokenizer = model._tokenizer()
    words = [tokenizer.decode([int(token)]) for token in free]
    stop = next(word for word in words[2:] if len(word) > 1 and word.isascii())
    out = model.generate(ids, max_new_tokens=8, do_sample=False, stop_strings=stop)[0, 3:]
    assert torch.equal(out, free[: len(out)])
    assert stop in tokenizer.decode(out.tolist())
    assert stop not in tokenizer.decode(out[:-1].tolist())


def test_generate_seeds(model, prompts):
    batch = padded([prompts[0]] * 2, "left")
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    same = model.generate(**batch, **options, seed=4)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same, model.generate(**batch, **options, seed=[4, 4]))
    other = model.generate(**batch, **options, seed=[4, 5])
    assert torch.equal(other[0], same[0])
    assert not torch.equal(other[1], same[1])


def test_generate_takes_limits(model, prompts):
    batch = padded(prompts, "left")
    small = Limits(max_prefill_tokens=3, max_patches_per_call=4)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(**batch, **options, limits=small), model.generate(**batch, **options)
    )


def test_bfloat16_and_old_name(checkpoints, prompts):
    directory = checkpoints[PREVIEW.name]
    new = KeyeForConditionalGeneration.from_pretrained(directory, dtype="bfloat16")
    old = KeyeForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.bfloat16)
    assert new.dtype == old.dtype == torch.bfloat16
    ids, media = prompts[1]
    logits = [m(torch.tensor([ids]), **media).logits for m in (new, old)]
    assert logits[0].dtype == torch.bfloat16
    assert torch.equal(*logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu", None, {"": "cpu"}], ids=str)
def test_device_maps(preview_checkpoint, device_map):
    model = KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, device_map=device_map)
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert model.device.type == expected


def test_device_map_of_several_devices(preview_checkpoint):
    with pytest.raises(NotImplementedError, match="device_map must name one device"):
        KeyeForConditionalGeneration.from_pretrained(
            preview_checkpoint, device_map={"a": "cpu", "b": "cuda:0"}
        )


@pytest.mark.parametrize("device_map", ["gpu", "mps", "meta", 1.5])
def test_unknown_device(preview_checkpoint, device_map):
    with pytest.raises(ValueError, match="device_map must be 'auto', a CPU or a CUDA device, got"):
        KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, device_map=device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_absent_gpu(preview_checkpoint):
    with pytest.raises(RuntimeError, match="device_map must name a device of this machine"):
        KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, device_map="cuda")


def test_unknown_dtype(preview_checkpoint):
    with pytest.raises(ValueError, match=r"dtype must be 'auto', float32, .* got 'int8'"):
        KeyeForConditionalGeneration.from_pretrained(preview_checkpoint, dtype="int8")


def test_arguments_are_checked_before_anything_is_fetched(monkeypatch):
    def locate(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("keye_model.checkpoint.checkpoint.locate", locate)
    for wrong in ({"dtype": "int8"}, {"device_map": "gpu"}):
        with pytest.raises(ValueError, match="must be 'auto'"):
            KeyeForConditionalGeneration.from_pretrained("owner/name", **wrong)


def test_config_is_checked_before_the_weights_are_fetched(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    asked = []

    def snapshot_download(_, allow_patterns, **__):
        asked.append("*.safetensors" in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("keye_model.checkpoint.hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"config\.json must describe Keye-VL"):
        KeyeForConditionalGeneration.from_pretrained("owner/name")
    assert asked == [False]


def test_what_published_snippets_pass_is_accepted(preview_checkpoint):
    KeyeForConditionalGeneration.from_pretrained(
        preview_checkpoint, trust_remote_code=True, attn_implementation="flash_attention_2"
    )


def test_ids_must_be_a_tensor(model):
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        model.generate([[1, 2, 3]])


def test_fewer_features_than_placeholders(model, prompts):
    ids, media = prompts[1]
    with pytest.raises(ValueError, match=r"image placeholders .* row 0 has 5"):
        model(torch.tensor([ids[:2] + ids[3:]]), **media)
    with pytest.raises(ValueError, match="row 0 has 6 and the grid rows left over have"):
        model(torch.tensor([ids]))


def test_more_features_than_placeholders(model, prompts):
    with pytest.raises(ValueError, match="image_grid_thw must have 0 rows"):
        model(torch.tensor([prompts[0][0]]), **prompts[1][1])


def test_patches_that_no_grid_counts(model, prompts):
    ids, media = prompts[1]
    more = media | {"pixel_values": torch.cat([media["pixel_values"]] * 2)}
    with pytest.raises(ValueError, match=r"pixel_values must hold the 24 patches .* got 48"):
        model(torch.tensor([ids]), **more)
    with pytest.raises(ValueError, match="must hold the 0 patches of image_grid_thw, got 24"):
        model(torch.tensor([[1, 2]]), pixel_values=media["pixel_values"])


def test_missing_patches(model, prompts):
    ids, media = prompts[1]
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(24, 3, .* got None"):
        model(torch.tensor([ids]), image_grid_thw=media["image_grid_thw"])


def test_position_ids_of_another_shape(model, prompts):
    ids = torch.tensor([prompts[0][0]])
    with pytest.raises(ValueError, match=r"position_ids must have shape \(3, 1, 3\), got \(1, 3\)"):
        model(ids, position_ids=ids)


def test_wrong_number_of_seeds(model, prompts):
    with pytest.raises(ValueError, match="seed must be one value or 1 values, got 2"):
        model.generate(torch.tensor([prompts[0][0]]), seed=[1, 2])


def test_generation_config_is_needed(model, prompts):
    bare = KeyeForConditionalGeneration(model.config)
    with pytest.raises(RuntimeError, match="generation_config must be set"):
        bare.generate(torch.tensor([prompts[0][0]]))


def test_stop_strings_need_the_tokenizer(checkpoints, tmp_path, prompts):
    directory = shutil.copytree(checkpoints[PREVIEW.name], tmp_path / "checkpoint")
    (directory / "tokenizer.json").unlink()
    model = KeyeForConditionalGeneration.from_pretrained(directory)
    with pytest.raises(FileNotFoundError, match=r"stop_strings need .* tokenizer\.json"):
        model.generate(torch.tensor([prompts[0][0]]), stop_strings="a")
