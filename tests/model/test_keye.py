"""The façade on tiny checkpoints: batches, streams, stop strings, and what goes wrong."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keye_kernels import backends
from keye_model import Answer, Keye
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.engine.memory import Limits
from keye_model.inputs.packing import pack

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=[PREVIEW.name, V1_5.name])
def keye(request, checkpoints):
    return Keye.from_pretrained(checkpoints[request.param])


@pytest.fixture(scope="module")
def conversations(media):
    picture = {"type": "image", "image": str(media["picture"])}
    small = {"type": "image", "image": Image.new("RGB", (60, 40), (9, 120, 30))}
    video = {"type": "video", "video": str(media["video"])}

    def user(*items):
        return {"role": "user", "content": list(items)}

    def text(words):
        return {"type": "text", "text": words}

    return [
        [user(picture, text("Describe this image."))],
        [user(video, text("What happened in the video?"))],
        [
            {"role": "system", "content": "Be brief."},
            user(small, text("first"), picture, video, text("then?")),
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": "And its colour?"},
        ],
        [{"role": "user", "content": "Words alone."}],
    ]


def test_mixed_batch_equals_one_by_one(keye, conversations):
    batch = keye.generate(conversations, **GREEDY)
    alone = [keye.generate(messages, **GREEDY) for messages in conversations]
    assert [answer.token_ids for answer in batch] == [answer.token_ids for answer in alone]
    assert [answer.usage for answer in batch] == [answer.usage for answer in alone]
    assert len({answer.token_ids for answer in batch}) > 2


def test_pictures_and_videos_reach_the_answer(keye, conversations):
    look = conversations[0]
    other = Image.new("RGB", (168, 112), (250, 250, 0))
    changed = [
        {"role": "user", "content": [{"type": "image", "image": other}, look[0]["content"][1]]}
    ]
    watch = conversations[1]
    still = [Image.new("RGB", (128, 96))] * 8
    film = {"type": "video", "video": still, "fps": 4.0}
    stilled = [{"role": "user", "content": [film, watch[0]["content"][1]]}]
    assert (_last_logits(keye, watch) - _last_logits(keye, stilled)).abs().max() > 1e-2
    assert (_last_logits(keye, look) - _last_logits(keye, changed)).abs().max() > 1e-2


def _last_logits(keye, messages):
    request = keye.processor.request(messages)
    return keye.model(
        request.input_ids[None],
        pixel_values=request.pixel_values,
        image_grid_thw=request.image_grid_thw,
        pixel_values_videos=request.pixel_values_videos,
        video_grid_thw=request.video_grid_thw,
        second_per_grid_ts=request.second_per_grid_ts or None,
    ).logits[0, -1]


def test_answer_counts(keye, conversations):
    answer = keye.generate(conversations[2], **GREEDY)
    assert isinstance(answer, Answer)
    assert answer.finish_reason in ("stop", "length")
    assert answer.usage.new_tokens == len(answer.token_ids) <= 6
    assert answer.usage.image_tokens == 24 + 6
    assert 0 < answer.usage.video_tokens < answer.usage.prompt_tokens
    timings = answer.timings
    assert min(timings.processing, timings.vision, timings.prefill, timings.decode) > 0
    assert timings.first_token >= timings.processing


def test_stream_is_the_whole_answer_in_pieces(keye, conversations):
    options = {"max_new_tokens": 12, "seed": 7, "temperature": 1.2}
    whole = keye.generate(conversations[0], **options)
    stream = keye.stream(conversations[0], **options)
    assert stream.answer is None
    pieces = list(stream)
    assert len(pieces) > 1
    assert stream.answer.token_ids == whole.token_ids
    tokenizer = keye.processor.tokenizer
    assert "".join(pieces) == tokenizer.decode(list(whole.token_ids), skip_special_tokens=True)


def test_stream_can_be_left_and_taken_up_again(keye, conversations):
    options = {"max_new_tokens": 20, "seed": 3, "temperature": 1.2}
    whole = keye.generate(conversations[0], **options)
    stream = keye.stream(conversations[0], **options)
    pieces = [next(stream), next(stream)]
    assert stream.answer is None
    pieces += list(stream)
    assert stream.answer.token_ids == whole.token_ids
    assert list(stream) == []
    assert stream.answer.usage == whole.usage
    tokenizer = keye.processor.tokenizer
    assert "".join(pieces) == tokenizer.decode(list(whole.token_ids), skip_special_tokens=True)


def test_stream_can_be_closed(keye, conversations):
    stream = keye.stream(conversations[3], max_new_tokens=50, seed=0)
    assert next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.answer is None


def test_stream_frees_its_cache_after_an_error(keye, conversations, monkeypatch):
    stream = keye.stream(conversations[3], max_new_tokens=5, seed=0)
    engine = keye.model.engines.engine

    def fail(*_):
        assert not engine.idle
        raise RuntimeError("out of memory")

    monkeypatch.setattr(keye.model.model.language_model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    assert engine.idle
    assert engine.workspace.cache.num_free_pages == engine.workspace.cache.num_pages
    assert list(stream) == []


def test_stream_raises_mistakes_at_once(keye):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        keye.stream([{"role": "user", "content": [{"type": "image", "image": "nowhere"}]}])


def test_requests_made_before(keye, conversations):
    requests = keye.processor.requests(conversations)
    expected = [answer.token_ids for answer in keye.generate(conversations, **GREEDY)]
    assert [answer.token_ids for answer in keye.generate(requests, **GREEDY)] == expected
    assert keye.generate(requests[1], **GREEDY).token_ids == expected[1]
    with pytest.raises(TypeError, match="messages must be all conversations, or all requests"):
        keye.generate([requests[0], conversations[0]])
    with pytest.raises(TypeError, match="all requests with thinking 'auto'"):
        keye.generate(requests, thinking=True)


def test_seeds_of_a_batch(keye, conversations):
    options = {"max_new_tokens": 8, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    same = keye.generate([conversations[3]] * 2, seed=5, **options)
    assert same[0].token_ids == same[1].token_ids
    other = keye.generate([conversations[3]] * 2, seed=[5, 6], **options)
    assert other[0].token_ids == same[0].token_ids != other[1].token_ids
    with pytest.raises(ValueError, match="seed must be one value or 2 values, got 3"):
        keye.generate([conversations[3]] * 2, seed=[1, 2, 3])


def test_repr(keye):
    assert repr(keye) == f"Keye({keye.model.config.variant.name}, float32, cpu, backend='auto')"


def test_limits_must_be_limits(keye):
    with pytest.raises(TypeError, match="limits must be a Limits, got dict"):
        Keye(keye.model, keye.processor, limits={"max_prefill_tokens": 5})


def test_cuda_graphs_must_be_a_switch(keye):
    with pytest.raises(TypeError, match="cuda_graphs must be True or False, got 'off'"):
        Keye(keye.model, keye.processor, cuda_graphs="off")


def test_cache_must_be_a_switch(keye):
    with pytest.raises(TypeError, match="cache must be True or False, got 0"):
        Keye(keye.model, keye.processor, cache=0)


def test_backend_of_the_environment_that_cannot_serve(preview_checkpoint, monkeypatch):
    monkeypatch.setattr("keye_kernels._backends._default", "cuda")
    with pytest.raises(RuntimeError, match=r"backend must serve .* no cuda kernel"):
        Keye.from_pretrained(preview_checkpoint)


def test_backend_is_asked_about_the_models_device(preview_checkpoint, monkeypatch):
    """A kernel that serves GPU tensors only must not be promised to a model on the CPU."""
    asked = []

    def none(device_type):
        asked.append(device_type)
        return {}

    monkeypatch.setattr("keye_model.keye.backends", none)
    Keye.from_pretrained(preview_checkpoint, device="cpu")
    assert asked == ["cpu", "cpu"]


def test_pixel_bounds_reach_the_processor(preview_checkpoint, conversations):
    small = Keye.from_pretrained(preview_checkpoint, max_pixels=4 * 784)
    assert small.generate(conversations[0], **GREEDY).usage.image_tokens <= 4


def test_stop_string_cuts_the_text(keye, conversations):
    options = {"max_new_tokens": 12, "seed": 7, "temperature": 1.2}
    raw = "".join(keye.stream(conversations[3], **options))
    stop = raw[len(raw) // 2 : len(raw) // 2 + 2]
    stream = keye.stream(conversations[3], stop_strings=[stop], **options)
    assert "".join(stream) == raw[: raw.index(stop)]
    assert stream.answer.finish_reason == "stop"
    assert len(stream.answer.token_ids) < 12


@pytest.mark.parametrize(
    ("thinking", "suffix"), [("auto", ""), (True, "/think"), (False, "/no_think")]
)
def test_thinking_changes_the_prompt(keye, conversations, thinking, suffix):
    request = keye.processor.request(conversations[3], thinking=thinking)
    prompt = keye.processor.tokenizer.decode(request.input_ids.tolist(), skip_special_tokens=False)
    assert f"Words alone.{suffix}<|im_end|>" in prompt
    tokens = keye.generate(conversations[3], thinking=thinking, **GREEDY).usage.prompt_tokens
    assert tokens == len(request.input_ids)


def test_limits_do_not_change_answers(keye, conversations):
    small = Limits(max_prefill_tokens=50, max_patches_per_call=100, max_cache_tokens=1024)
    bounded = Keye(keye.model, keye.processor, limits=small)
    expected = [answer.token_ids for answer in keye.generate(conversations, **GREEDY)]
    assert [answer.token_ids for answer in bounded.generate(conversations, **GREEDY)] == expected


def test_the_parts_of_an_answer_come_back_parsed(keye, conversations, monkeypatch):
    said = "<analysis>easy</analysis><think>so</think><answer>done</answer>"
    ids = keye.processor.tokenizer.encode(said).ids
    tokens = iter(ids)

    def scripted(*_, out, **__):
        out.fill_(next(tokens))

    monkeypatch.setattr("keye_model.engine.decode_batch.sample", scripted)
    answer = keye.generate(conversations[3], max_new_tokens=len(ids))
    assert (answer.analysis, answer.thinking, answer.text) == ("easy", "so", "done")


CONTENT = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.sampled_from(["a", "see 12.5", "世界", ""])),
        st.tuples(st.just("image"), st.tuples(st.integers(1, 90), st.integers(1, 90))),
        st.tuples(st.just("video"), st.integers(2, 4)),
    ),
    min_size=1,
    max_size=4,
)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENT), max_size=3)


@settings(max_examples=25)
@given(turns=TURNS.filter(lambda turns: turns and turns[-1][0] != "assistant"))
def test_placeholders_features_and_positions_agree(keye, turns):
    """Any order of text, images, videos and turns packs: ids, grids, patches, positions."""

    def item(kind, value):
        if kind == "text":
            return {"type": "text", "text": value}
        if kind == "image":
            return {"type": "image", "image": Image.new("RGB", value)}
        frames = [Image.new("RGB", (40, 30), (60 * k, 0, 0)) for k in range(value)]
        return {"type": "video", "video": frames, "fps": 1.0}

    messages = [
        {"role": role, "content": [item(kind, value) for kind, value in content]}
        for role, content in turns
    ]
    opened = turns[-1][0] != "assistant"  # a turn of its own must not follow another
    request = keye.processor.request(messages, add_generation_prompt=opened)
    config = keye.model.config
    packed = pack([request, request], config)
    counts = {
        name: sum(t * h * w for t, h, w in grid) // 4
        for name, grid in (("image", request.image_grid_thw), ("video", request.video_grid_thw))
    }
    kinds = [kind for _, content in turns for kind, _ in content]
    assert len(request.image_grid_thw) == kinds.count("image")
    assert (counts["video"] > 0) == ("video" in kinds)
    ids = request.input_ids
    assert int((ids == config.image_token_id).sum()) == counts["image"]
    assert int((ids == config.video_token_id).sum()) == counts["video"]
    assert packed.positions.shape == (3, 2 * len(ids))
    assert packed.next_positions[0] == int(packed.positions[:, : len(ids)].max()) + 1
    features = keye.model.model.embed(packed)
    assert features.shape == (2 * len(ids), config.text_config.hidden_size)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("value", [0, -3])
def test_max_new_tokens_must_be_positive(keye, conversations, value):
    with pytest.raises(ValueError, match=f"max_new_tokens must be a positive integer, got {value}"):
        keye.generate(conversations[3], max_new_tokens=value)


def test_unknown_option(keye, conversations):
    message = "unknown keyword 'num_beams'; known: max_new_tokens, .* stop_strings, thinking, prog"
    for door in (keye.generate, keye.stream):
        with pytest.raises(TypeError, match=message):
            door(conversations[3], num_beams=4)


@pytest.mark.parametrize("messages", [[], [[]]], ids=["none", "an empty conversation"])
def test_empty_messages(keye, messages):
    with pytest.raises(ValueError, match="messages must hold at least one message"):
        keye.generate(messages)


def test_messages_of_the_wrong_kind(keye):
    with pytest.raises(TypeError, match="messages must be a list of dicts, got dict"):
        keye.generate({"role": "user", "content": "hello"})


@pytest.mark.parametrize("key", ["images", "videos", "tool_calls", "contents"])
def test_unknown_keys_of_a_message(keye, key):
    turn = {"role": "user", "content": "Hi", key: ["a.png"]}
    for door in (keye.generate, keye.stream, lambda messages: keye.generate([messages])):
        with pytest.raises(ValueError, match=rf"messages\[0\] has unknown key '{key}'"):
            door([turn])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [[{"role": "user", "content": "Hi"}], {"role": "user"}],
            "conversation 2: .* list of dic",
        ),
        ([{"role": "user", "content": "Hi"}, [{"role": "user"}]], r"messages\[1\] must be a dict"),
        ([("user", "Hi")], r"messages\[0\] must be a dict, got str"),
    ],
)
def test_batches_mixed_up(keye, messages, message):
    with pytest.raises(TypeError, match=message):
        keye.generate(messages)


def test_an_answer_that_was_begun_goes_on(keye):
    begun = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two"}]
    request = keye.processor.request(begun, continue_final_message=True)
    assert keye.processor.decode(request.input_ids).endswith("One, two")
    assert keye.generate(request, **GREEDY).usage.prompt_tokens == len(request.input_ids)


def test_missing_picture_is_named(keye):
    item = {"type": "image", "image": "no/such/file.png"}
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.png"):
        keye.generate([{"role": "user", "content": [item]}])


def test_prompt_longer_than_the_context(keye):
    words = [{"role": "user", "content": "never " * 5000}]
    with pytest.raises(ValueError, match="prompt must have at most 4095 tokens"):
        keye.generate(words)


def test_backend_that_cannot_serve(preview_checkpoint):
    message = r"^backend must serve (\w+), got 'cuda', which does not: no cuda kernel for \1$"
    with pytest.raises(RuntimeError, match=message):
        Keye.from_pretrained(preview_checkpoint, backend="cuda")


def test_unknown_device(preview_checkpoint):
    with pytest.raises(ValueError, match=r"^device must be 'auto', a CPU or a CUDA device"):
        Keye.from_pretrained(preview_checkpoint, device="gpu")


def test_unknown_backend(preview_checkpoint):
    with pytest.raises(
        ValueError, match="backend must be one of auto, cuda, triton, reference, got 'gpu'"
    ):
        Keye.from_pretrained(preview_checkpoint, backend="gpu")


def test_named_backend_holds_for_this_object_only(keye, conversations, monkeypatch):
    chosen = []
    real = keye.model.model.language_model.forward

    def forward(*arguments):
        chosen.append(backends()["rms_norm"].why_not["triton"])
        return real(*arguments)

    monkeypatch.setattr(keye.model.model.language_model, "forward", forward)
    named = Keye(keye.model, keye.processor, backend="reference")
    assert named.generate(conversations[3], **GREEDY).token_ids == (
        keye.generate(conversations[3], **GREEDY).token_ids
    )
    assert chosen[0] == "backend 'reference' was asked for"
    assert chosen[-1] != chosen[0]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("config.json", FileNotFoundError),
        ("tokenizer.json", FileNotFoundError),
        ("model-00002-of-00002.safetensors", FileNotFoundError),
    ],
)
def test_missing_file_is_named(checkpoints, tmp_path, name, error):
    directory = shutil.copytree(checkpoints[PREVIEW.name], tmp_path / "checkpoint")
    (directory / name).unlink()
    with pytest.raises(error, match=name):
        Keye.from_pretrained(directory)


def test_bfloat16_runs(preview_checkpoint, conversations):
    keye = Keye.from_pretrained(preview_checkpoint, dtype="bfloat16")
    assert keye.generate(conversations[:1], **GREEDY)[0].usage.new_tokens == 6
