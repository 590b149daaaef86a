"""The command line, called as a user calls it."""

import json

import pytest
import torch

import keye_kernels
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.cli import main
from keye_model.engine.cuda_graph import why_no_graphs
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.video_file import VideoFile


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_generate_prints_text(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, "--image", media["picture"], "--max-new-tokens", 4)
    status, out, err = run(capsys, "generate", *options, "--seed", 1, "Describe this image.")
    assert (status, err) == (0, "")
    assert out.strip()


def test_generate_json(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, "--video", media["video"], "--max-frames", 2)
    more = ("--greedy", "--json", "--max-new-tokens", 3, "--system", "Be brief.")
    status, out, _ = run(capsys, "generate", *options, *more, "What happened?")
    answer = json.loads(out)
    assert status == 0
    assert len(answer["token_ids"]) == answer["usage"]["new_tokens"] == 3
    assert answer["usage"]["video_tokens"] > 0


def test_chat_keeps_the_conversation(capsys, monkeypatch, preview_checkpoint, media):
    lines = iter([f"/image {media['picture']}", "What is it?", "/nonsense", "And now?", "/reset",
                  "/image nowhere.png", "Look.", "/quit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    seen = []
    from keye_model.keye import Keye

    real = Keye.stream

    def stream(self, messages, **options):
        seen.append(messages)
        return real(self, messages, **options)

    monkeypatch.setattr(Keye, "stream", stream)
    status, out, err = run(
        capsys, "chat", "--model", preview_checkpoint, "--max-new-tokens", 3, "--seed", 0
    )
    assert status == 0
    assert [len(messages) for messages in seen] == [1, 3, 1]
    assert [item["type"] for item in seen[0][0]["content"]] == ["image", "text"]
    assert [item["type"] for item in seen[1][2]["content"]] == ["text"]
    assert seen[1][1]["role"] == "assistant"
    assert out.startswith(seen[1][1]["content"])
    assert "unknown command /nonsense" in err
    assert "nowhere.png" in err


def test_chat_outlives_an_answer_that_fails_or_is_stopped(
    capsys, monkeypatch, preview_checkpoint, media
):
    lines = iter([f"/image {media['picture']}", "one", "two", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    outcomes = iter([RuntimeError("out of memory"), KeyboardInterrupt(), None])
    seen = []

    def stream(_, messages, **__):
        seen.append((len(messages), len(messages[-1]["content"])))
        yield "said"
        outcome = next(outcomes)
        if outcome:
            raise outcome

    monkeypatch.setattr("keye_model.keye.Keye.stream", stream)
    status, out, err = run(capsys, "chat", "--model", preview_checkpoint)
    assert status == 0
    # A failed turn is forgotten but its picture stays; a stopped one is kept as far as it went.
    assert seen == [(1, 2), (1, 2), (3, 1)]
    assert "keye: error: out of memory" in err
    assert "(stopped)" in err
    assert out.count("said") == 3


def test_mistakes_are_found_before_the_weights_are_read(capsys, monkeypatch, preview_checkpoint):
    def load_model(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("keye_model.conditional_generation.load_model", load_model)
    for mistake in (("--image", "nowhere.png"), ("--top-p", 7), ("--stop", ""), ("--device", "x")):
        status, _, err = run(capsys, "generate", "--model", preview_checkpoint, *mistake, "Hello")
        assert status == 1
        assert "keye: error: " in err
    assert run(capsys, "chat", "--model", preview_checkpoint, "--top-p", 7)[0] == 1


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == keye_kernels.__version__


def test_chat_ends_with_the_input(capsys, monkeypatch, preview_checkpoint):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run(capsys, "chat", "--model", preview_checkpoint)[0] == 0


def test_info(capsys, preview_checkpoint):
    status, out, _ = run(capsys, "info", "--model", preview_checkpoint)
    assert status == 0
    for line in ("keye-kernels", "csrc ", "varlen_attention", "Keye-VL-8B-Preview", "4,096 tokens"):
        assert line in out
    why_not = why_no_graphs(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert f"cuda graphs   {f'no: {why_not}' if why_not else 'yes'}\n" in out


def test_plan(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, "--image", media["picture"], "--batch", 3)
    status, out, _ = run(capsys, "plan", *options, "Describe this image.")
    assert status == 0
    assert "72 image tokens" in out
    assert "3 x 58 tokens each" in out
    kept = 8192 * 2 * 2 * 128 * 4  # two layers, keys and values of one head, fp32
    assert f"with CUDA graphs 8,192 tokens or more, {kept / 1e9:.3f} GB" in out
    assert "not a measurement" in out


def test_plan_decodes_no_video(capsys, monkeypatch, checkpoints, media):
    paths = {line: checkpoints[line.name] for line in (PREVIEW, V1_5)}
    question = [{"type": "video", "video": media["video"]}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": question}]
    request = KeyeProcessor.from_pretrained(paths[PREVIEW]).request(messages)
    monkeypatch.setattr(VideoFile, "read", lambda *_: pytest.fail("decoded"))
    _, out, _ = run(capsys, "plan", "--model", paths[PREVIEW], "--video", media["video"], "What?")
    assert f"1 x {len(request.input_ids)} tokens each" in out
    assert f"{len(request.pixel_values_videos) // 4} video tokens" in out
    _, out, _ = run(capsys, "plan", "--model", paths[V1_5], "--video", media["video"], "What?")
    assert "1 x at most " in out
    assert "image tokens, at most " in out


def test_plan_fits_videos_as_generate_does(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, *("--video", media["video"]) * 9)
    status, out, _ = run(capsys, "plan", *options, "What happens?")
    assert status == 0
    assert "fitted        video '" in out
    assert "TOO LONG" not in out
    status, out, _ = run(capsys, "plan", *options, "--max-frames", 4, "What happens?")
    assert status == 0
    assert "fitted" not in out
    assert "TOO LONG" in out


def test_demo(capsys):
    status, out, _ = run(capsys, "demo", "--max-new-tokens", 3)
    assert status == 0
    for line in ("Its words mean nothing", "A picture", "A video", "A mixed batch", "decode"):
        assert line in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--max-new-tokens", "0"), "max_new_tokens must be a positive integer, got 0"),
        (("--greedy", "--temperature", "0.5"), "temperature must be left out"),
        (("--backend", "cuda"), "backend must serve "),
        (("--device", "toaster"), "error: device must be"),
        (("--dtype", "int4"), "dtype must be"),
    ],
)
def test_mistakes_are_one_line(capsys, preview_checkpoint, arguments, message):
    status, out, err = run(
        capsys, "generate", "--model", preview_checkpoint, *arguments, "Describe this image."
    )
    assert (status, out) == (1, "")
    assert err.startswith("keye: error: ")
    assert message in err
    assert "Traceback" not in err


def test_missing_checkpoint(capsys):
    status, _, err = run(capsys, "generate", "--model", "./nowhere", "Hello")
    assert status == 1
    assert "'./nowhere'" in err


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [("--batch", 0, "--batch must be"), ("--matmul", 0, "--matmul and --copy must be positive")],
)
def test_plan_refuses(capsys, preview_checkpoint, option, value, match):
    status, _, err = run(capsys, "plan", "--model", preview_checkpoint, option, value, "Hello")
    assert status == 1
    assert match in err


def test_interrupt(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("keye_model.cli._info", interrupted)
    assert main(["info"]) == 130
