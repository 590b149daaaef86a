"""The command line, called as a user calls it."""

import base64
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tqdm import tqdm

import keye_kernels
import keye_model
from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig
from keye_model.cli import main
from keye_model.cli.options import with_flags
from keye_model.engine.cuda_graph import why_no_graphs
from keye_model.inputs.answer import Usage
from keye_model.keye import Keye
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.video_file import VideoFile
from tests.model.pseudo_terminal import PATIENCE, ROOT, Screen


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_generate_prints_text(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, "--image", media["picture"], "--max-new-tokens", 4)
    status, out, err = run(capsys, "generate", *options, "--seed", 1, "Describe this image.")
    assert (status, err) == (0, "[cut at 4 tokens; --max-new-tokens]\n")
    assert out.strip()


def test_generate_json(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, "--video", media["video"], "--max-frames", 2)
    more = ("--greedy", "--json", "--max-new-tokens", 3, "--system", "Be brief.")
    status, out, _ = run(capsys, "generate", *options, *more, "What happened?")
    answer = json.loads(out)
    assert status == 0
    assert len(answer["token_ids"]) == answer["usage"]["new_tokens"] == 3
    assert answer["usage"]["video_tokens"] > 0


def test_mistakes_are_found_before_the_weights_are_read(capsys, monkeypatch, preview_checkpoint):
    def load_model(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("keye_model.conditional_generation.load_model", load_model)
    for *mistake, expected in (
        ("--image", "nowhere.png", 1),
        ("--top-p", 7, 2),
        ("--stop", "", 1),
        ("--device", "x", 1),
    ):
        for command in (("generate", "Hello"), ("chat",)):
            status, _, err = run(capsys, *command, "--model", preview_checkpoint, *mistake)
            assert (status, err.count("\n")) == (expected, 1)
            assert "keye: error: " in err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == keye_kernels.__version__


def test_info(capsys, preview_checkpoint):
    status, out, _ = run(capsys, "info", "--model", preview_checkpoint)
    assert status == 0
    for line in ("keye-kernels", "csrc ", "varlen_attention", "Keye-VL-8B-Preview", "4,096 tokens"):
        assert line in out
    reasons = [line for line in out.splitlines() if line.startswith(" " * 16)]
    assert 0 < len(reasons) < len(keye_kernels.backends()) / 2  # equal ones stand once
    assert all(out.count(f" {op},") + out.count(f" {op}\n") == 1 for op in keye_kernels.backends())
    why_not = why_no_graphs(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert f"cuda graphs   {f'no: {why_not}' if why_not else 'yes'}\n" in out


def test_plan(capsys, preview_checkpoint, media):
    options = ("--model", preview_checkpoint, "--image", media["picture"], "--batch", 3)
    status, out, _ = run(capsys, "plan", *options, "Describe this image.")
    assert status == 0
    assert "72 image tokens" in out
    assert "3 x 58 tokens each" in out
    # The context or more: two layers, keys and values of one head, fp32.
    context = KeyeConfig.from_pretrained(preview_checkpoint).text_config.max_position_embeddings
    kept = max(context, 3 * 576) * 2 * 2 * 128 * 4
    assert f"found again: pages of {kept / 1e9:.3f} GB with these, features of " in out
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


def test_a_video_that_does_not_fit_is_fitted(capsys, checkpoints, media):
    for line in (PREVIEW, V1_5):
        model = ("--model", checkpoints[line.name], "--max-new-tokens", 2)
        videos = ("--video", media["video"]) * (9 if line is PREVIEW else 60)
        status, out, fitted = run(capsys, "plan", *model, *videos)
        assert status == 0
        assert re.match(r"video '.*video.mp4': \d+ frames", fitted)
        assert fitted.splitlines()[-1].endswith("to fit a prompt of 4,094 tokens")
        assert "TOO LONG" not in out
        status, out, err = run(capsys, "generate", *model, *videos, "--json", "What happens?")
        assert (status, err) == (0, fitted)
        usage = json.loads(out)["usage"]
        assert 3500 < usage["prompt_tokens"] <= 4094


def test_what_is_taken_of_a_video_can_be_said(capsys, monkeypatch, checkpoints, media):
    asked = []

    def request(_, messages, **__):
        asked.append(messages[-1]["content"][0])
        raise ValueError("enough")

    real = KeyeProcessor.request
    monkeypatch.setattr(KeyeProcessor, "request", request)
    options = ("--fps", 1, "--max-frames", 6, "--min-pixels", 4000, "--max-pixels", 9000)
    options += ("--total-pixels", 70000)
    for line, key in ((PREVIEW, "total_pixels"), (V1_5, "video_total_pixels")):
        model = ("--model", checkpoints[line.name])
        assert run(capsys, "plan", *model, "--video", media["video"], *options)[0] == 1
        assert asked.pop() == {
            "type": "video",
            "video": str(media["video"]),
            **{"fps": 1.0, "max_frames": 6, "min_pixels": 4000, "max_pixels": 9000, key: 70000},
        }
    monkeypatch.setattr(KeyeProcessor, "request", real)
    options = ("--model", checkpoints[PREVIEW.name], *("--video", media["video"]) * 9)
    options += ("--max-frames", 4)
    status, out, err = run(capsys, "plan", *options, "What happens?")
    assert (status, err) == (0, "")
    assert "TOO LONG" in out
    status, out, err = run(capsys, "generate", *options, "What happens?")
    assert (status, out) == (1, "")
    assert "prompt must have at most 4095 tokens" in err
    assert "--max-frames=" in err or "--max-pixels" in err


def test_demo(capsys):
    status, out, _ = run(capsys, "demo", "--max-new-tokens", 3)
    assert status == 0
    for line in ("Its words mean nothing", "A picture", "A video", "A mixed batch", "decode"):
        assert line in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "nowhere.png"), "image must be an existing file, got 'nowhere.png'"),
        (("--video", "nowhere.mp4"), "'nowhere.mp4'"),
        (("--greedy", "--temperature", "0.5"), "--temperature must be left out"),
        (("--backend", "cuda"), "--backend must serve "),
        (("--device", "toaster"), "error: --device must be"),
        (("--dtype", "int4"), "--dtype must be"),
        (("--stop", ""), "--stop must hold non-empty strings"),
        (("--min-pixels", "9000", "--max-pixels", "8000"), "--min-pixels"),
    ],
)
def test_mistakes_are_one_line(capsys, preview_checkpoint, arguments, message):
    status, out, err = run(
        capsys, "generate", "--model", preview_checkpoint, *arguments, "Describe this image."
    )
    assert (status, out) == (1, "")
    assert err.startswith("keye: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--fps", "0", "Hello"), "--fps must be a positive number, got '0'"),
        (("generate", "--fps", "nan", "Hello"), "--fps must be a positive number, got 'nan'"),
        (("generate", "--fps", "x", "Hello"), "--fps must be a positive number, got 'x'"),
        (("generate", "--max-frames", "-1", "Hello"), "--max-frames must be a positive integer"),
        (("generate", "--max-frames", "1.5", "Hello"), "--max-frames must be a positive integer"),
        (("generate", "--max-pixels", "0", "Hello"), "--max-pixels must be a positive integer"),
        (("chat", "--min-pixels", "-3"), "--min-pixels must be a positive integer"),
        (("plan", "--total-pixels", "no", "Hello"), "--total-pixels must be a positive integer"),
        (("generate", "--max-new-tokens", "0", "Hello"), "--max-new-tokens must be a positive"),
        (("demo", "--max-new-tokens", "0"), "--max-new-tokens must be a positive integer"),
        (("generate", "--top-p", "7", "Hello"), "--top-p must be in (0, 1], got '7'"),
        (("generate", "--top-k", "-1", "Hello"), "--top-k must be an integer of at least 0"),
        (("generate", "--temperature", "-1", "Hello"), "--temperature must be at least 0"),
        (("generate", "--repetition-penalty", "0", "Hello"), "--repetition-penalty must be a pos"),
        (("generate", "--seed", "-1", "Hello"), "--seed must be an integer in [0, 2^63)"),
        (("plan", "--batch", "0", "Hello"), "--batch must be a positive integer"),
        (("plan", "--matmul", "0", "Hello"), "--matmul must be a positive number"),
        (("plan", "--copy", "inf", "Hello"), "--copy must be a positive number"),
        (("generate", "--fps", "1", "Hello"), "--fps must come with a --video"),
        (("generate", "--image", "photo.jpg"), "generate must have a question"),
        (("generate", "--image", "photo.jpg", " "), 'question, as in keye generate "Hello", got'),
        (("plan",), "plan must have an --image, a --video or a question, got none"),
        (("generate", "--nonsense", "Hello"), "unrecognized arguments: --nonsense"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_flag(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("keye: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("fps must be a positive number, got 0", "--fps must be a positive number, got 0"),
        ("'a.mp4': nframes must be even", "'a.mp4': --max-frames must be even"),
        ("got 9 with 8 frames; max_frames=4 fits", "got 9 with 8 frames; --max-frames=4 fits"),
        ("shorter (max_pixels, max_frames, fps)", "shorter (--max-pixels, --max-frames, --fps)"),
        ("a lower video_total_pixels or max_frames may fit",
         "a lower --total-pixels or --max-frames may fit"),
        ("path_or_id 'a/b' is no directory", "--model 'a/b' is no directory"),
        ("video 'my/fps must go.mp4' is 2 fps", "video 'my/fps must go.mp4' is 2 fps"),
        ("this device has no dtype", "this device has no dtype"),
    ],
)  # fmt: skip
def test_errors_name_the_flag(message, shown):
    assert with_flags(message) == shown


def test_missing_checkpoint(capsys):
    status, _, err = run(capsys, "generate", "--model", "./nowhere", "Hello")
    assert status == 1
    assert "--model must be an existing directory or a Hub id 'owner/name', got './nowhere'" in err


def test_interrupt(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("keye_model.cli.commands.info", interrupted)
    assert main(["info"]) == 130


def test_without_a_command_it_helps(capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert "generate" in out
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    assert 'keye generate --image photo.jpg "Describe this image."' in capsys.readouterr().out


def test_the_question_from_standard_input(capsys, monkeypatch, preview_checkpoint):
    asked = []
    real = KeyeProcessor.request

    def request(self, messages, **options):
        asked.append(messages[-1]["content"][-1]["text"])
        return real(self, messages, **options)

    monkeypatch.setattr(KeyeProcessor, "request", request)
    options = ("--model", preview_checkpoint, "--max-new-tokens", 2)
    for said, status in (("What\nis it?\n", 0), ("\n", 2)):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        assert run(capsys, "generate", *options, "-")[0] == status
    assert asked == ["What\nis it?\n"]


def test_json_counts_the_time_before_the_weights_were_loaded(
    capsys, monkeypatch, preview_checkpoint, media
):
    now = itertools.count(step=1000.0)
    monkeypatch.setattr("keye_model.cli.commands.time", SimpleNamespace(perf_counter=now.__next__))
    options = ("--model", preview_checkpoint, "--image", media["picture"], "--max-new-tokens", 2)
    status, out, err = run(capsys, "generate", *options, "--json", "Hello")
    timings = json.loads(out)["timings"]
    assert (status, err) == (0, "")
    assert timings["processing"] >= 1000
    assert timings["first_token"] >= timings["processing"]


@pytest.mark.parametrize(
    ("reason", "prompt", "new", "said"),
    [
        ("stop", 100, 9, ""),
        ("length", 100, 1, "[cut at 1 token; --max-new-tokens]\n"),
        ("length", 100, 512, "[cut at 512 tokens; --max-new-tokens]\n"),
        ("length", 4000, 96, "[cut at 96 tokens; the context of 4096 tokens is full]\n"),
    ],
)
def test_an_answer_that_was_cut_says_why(
    capsys, monkeypatch, preview_checkpoint, reason, prompt, new, said
):
    answer = SimpleNamespace(finish_reason=reason, usage=Usage(prompt, 0, 0, new))
    spoken = SpokenAnswer(["\x1b[31m", "red"], answer)
    monkeypatch.setattr("keye_model.keye.Keye.stream", lambda *_, **__: spoken)
    done = run(capsys, "generate", "--model", preview_checkpoint, "Hello")
    assert done == (0, "\x1b[31mred\n", said)


class SpokenAnswer:
    def __init__(self, pieces, answer):
        self._pieces, self.answer = iter(pieces), answer

    def __iter__(self):
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("out of memory"), 1, "keye: error: out of memory\n"),
    ],
)
def test_an_answer_that_breaks_off_ends_its_line(
    capsys, monkeypatch, preview_checkpoint, error, status, said
):
    spoken = SpokenAnswer(["so far", error], None)
    monkeypatch.setattr("keye_model.keye.Keye.stream", lambda *_, **__: spoken)
    options = ("generate", "--model", preview_checkpoint, "Hello")
    assert run(capsys, *options) == (status, "so far\n", said)
    spoken = SpokenAnswer(["so far", error], None)
    assert run(capsys, *options, "--json") == (status, "", said)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_progress_on_a_terminal_ends_before_the_answer(
    monkeypatch, preview_checkpoint, media, command
):
    """Stages that take long are seen, each on one line that is cleared before the text begins."""
    screen, shown, drawn = Screen(), [], threading.Event()
    monkeypatch.setattr("keye_model.cli.terminal.INTERVAL", 0.001)

    class Bar(tqdm):
        def refresh(self, *arguments, **options):
            super().refresh(*arguments, **options)
            shown.append(self.desc.rstrip(": "))
            drawn.set()

    real = Keye.stream

    def stream(self, request, *, progress, **options):
        seen.extend(frames)

        def slow(*state):
            progress(*state)
            seen.append(state)
            drawn.clear()
            assert drawn.wait(PATIENCE)

        return real(self, request, progress=slow, **options)

    seen, frames = [], []
    real_request = KeyeProcessor.request

    def request(self, messages, *, progress, **options):
        def slow(*state):
            progress(*state)
            frames.append(state)
            drawn.clear()
            assert drawn.wait(PATIENCE)

        return real_request(self, messages, progress=slow, **options)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(Keye, "stream", stream)
    monkeypatch.setattr(KeyeProcessor, "request", request)
    monkeypatch.setattr("sys.stderr", screen.stream)
    monkeypatch.setattr("sys.stdout", screen.stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("What happens?\n"))
    options = [command, "--model", preview_checkpoint, "--video", media["video"]]
    options += ["--max-new-tokens", 3, "--seed", 1] + ["What happens?"] * (command == "generate")
    assert main(list(map(str, options))) == 0
    lines = screen.text().rstrip("\n").split("\n")
    screen.close()
    assert list(dict.fromkeys(shown)) == ["frames", "vision", "prefill"]
    assert [state for state in seen if state[0] != "frames"] == [
        ("vision", 0, 560),
        ("vision", 560, 560),
        ("prefill", 0, seen[-1][2]),
    ]
    assert [done for stage, done, _ in frames if stage == "frames"][:4] == [1, 2, 3, 4]
    assert lines[-1] == "[cut at 3 tokens; --max-new-tokens]"
    bars, _, answer = lines[-2].rpartition("\r")  # the line was cleared before
    assert answer
    assert "prefill" in bars
    assert not bars.rstrip("\r").rpartition("\r")[2].strip()


def test_nothing_of_progress_in_a_pipe(capsys, monkeypatch, preview_checkpoint, media):
    monkeypatch.setattr("keye_model.cli.terminal.INTERVAL", 0.0)
    options = ("--model", preview_checkpoint, "--video", media["video"], "--max-new-tokens", 3)
    status, _, err = run(capsys, "generate", *options, "--seed", 1, "What happens?")
    assert (status, err) == (0, "[cut at 3 tokens; --max-new-tokens]\n")


def test_a_terminal_gets_no_control_characters(monkeypatch, preview_checkpoint):
    answer = SimpleNamespace(finish_reason="stop")
    monkeypatch.setattr(
        "keye_model.keye.Keye.stream", lambda *_, **__: SpokenAnswer(["\x1b[31m", "red"], answer)
    )
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen.stream)
    monkeypatch.setattr("sys.stderr", screen.stream)
    assert main(["generate", "--model", str(preview_checkpoint), "Hello"]) == 0
    assert main(["generate", "--model", str(preview_checkpoint), "--image", "\x1bc", "Hi"]) == 1
    assert main(["generate", "--\x1bc", "Hello"]) == 2
    text = screen.text()
    screen.close()
    assert "\x1b" not in text
    assert text.startswith("\\x1b[31mred\n")


def test_exif(capsys, monkeypatch, preview_checkpoint, tmp_path):
    seen = []
    real = KeyeProcessor.request

    def request(self, messages, **options):
        seen.append(real(self, messages, **options))
        return seen[-1]

    monkeypatch.setattr(KeyeProcessor, "request", request)
    picture, exif = Image.new("RGB", (168, 112)), Image.Exif()
    grids = {}
    for orientation in (None, 1, 6, 9):
        if orientation:
            exif[0x0112] = orientation
        path = tmp_path / f"photo {orientation}.jpg"
        picture.save(path, exif=exif)
        for extra in ((), ("--exif",)):
            options = ("--model", preview_checkpoint, "--image", path, *extra)
            status, _, err = run(capsys, "plan", *options)
            assert status == 0
            hinted = "--exif applies it" in err
            assert hinted == (orientation == 6 and not extra)
            grids[orientation, bool(extra)] = seen[-1].image_grid_thw
    lying, standing = ((1, 8, 12),), ((1, 12, 8),)
    assert {key: value for key, value in grids.items() if value != lying} == {(6, True): standing}
    picture.save(tmp_path / "photo.tiff", exif=exif)
    exif[0x0112] = 6
    picture.save(tmp_path / "photo.tiff", exif=exif)  # which Pillow itself turns
    url = (tmp_path / "photo 6.jpg").as_uri()
    data = base64.b64encode((tmp_path / "photo 6.jpg").read_bytes()).decode()
    for source, turned in (
        (url, standing),
        (f"data:image/jpeg;base64,{data}", standing),
        (tmp_path / "photo.tiff", seen[-1].image_grid_thw),
    ):
        options = ("--model", preview_checkpoint, "--image", source, "--exif")
        assert run(capsys, "plan", *options)[0] == 0
        if source != tmp_path / "photo.tiff":
            assert seen[-1].image_grid_thw == turned


def as_process(command, *, setup="pass", **options):
    """Run a shell's command line in which KEYE is the script; ``setup`` is Python run before."""
    script = f"import sys; {setup}; from keye_model.cli import main; sys.exit(main())"
    keye = shlex.join([sys.executable, "-c", script])
    options |= {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": ROOT}}
    done = subprocess.run(["bash", "-c", command.replace("KEYE", keye)], **options)
    return done.returncode, done.stdout, done.stderr


NO_TORCH = "sys.modules['torch'] = None"  # importing it raises


def test_the_parser_and_its_mistakes_do_without_torch(tmp_path):
    (tmp_path / "not a model").mkdir()
    # A Ctrl-C before `main` runs is a traceback: little is imported until then.
    heavy = ["keye_kernels", "huggingface_hub", "numpy", "tqdm"]
    slow = f"import keye_model.cli; assert not {{*{heavy}}} & {{*sys.modules}}"
    assert as_process("KEYE --help", setup=slow)[0] == 0
    for command, status, text in (
        ("KEYE", 0, "generate"),
        ("KEYE --help", 0, "generate"),
        ("KEYE plan --help", 0, "--total-pixels"),
        ("KEYE --version", 0, keye_kernels.__version__),
        ("KEYE generate", 2, "must have a question"),
        ("KEYE generate --model 'not a model' Hi", 1, "checkpoint must contain config.json, got"),
        ("KEYE demo --model 'not a model'", 1, "checkpoint must contain config.json, got none in"),
        ("KEYE chat --model ./nowhere", 1, "--model must be an existing directory"),
    ):
        found, out, err = as_process(command, setup=NO_TORCH, cwd=tmp_path)
        assert found == status, err
        assert text in out + err


def test_closed_and_full_streams(tmp_path):
    for command, status, error in (
        ("KEYE chat --model . <&-", 1, "keye: error: standard input must be open, got it closed\n"),
        ("KEYE generate - <&-", 1, "keye: error: standard input must be open, got it closed\n"),
        ("KEYE --help >&-", 1, "keye: error: standard output must be open, got it closed\n"),
        ("KEYE --nonsense 2>&-", 2, ""),
        ("KEYE --help >/dev/full", 1, "keye: error: [Errno 28] No space left on device\n"),
    ):
        found = as_process(command, setup=NO_TORCH, cwd=tmp_path)
        assert found == (status, "", error), command


def test_who_reads_the_output_may_go_away():
    read, write = os.pipe()
    os.close(read)  # as `| head -1` does after its line
    for command in ("KEYE info >&%d", "KEYE --help >&%d"):
        done = as_process(command % write, pass_fds=[write])
        assert done == (141, "", "")
    os.close(write)


def test_interrupt_while_torch_is_imported():
    setup = "import builtins, os, signal; real = builtins.__import__; builtins.__import__ = "
    setup += "lambda name, *a, **k: name == 'torch' and os.kill(os.getpid(), signal.SIGINT) or "
    setup += "real(name, *a, **k)"
    assert as_process("KEYE info", setup=setup) == (130, "", "")


def test_an_interrupt_that_a_library_would_swallow():
    """Some import their optional parts with a bare `except:` and go on."""
    source = """
import builtins, os, signal
real = builtins.__import__
def interrupted(name, *a, **k):
    if name == "torch":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100): pass
        except: pass
    return real(name, *a, **k)
builtins.__import__ = interrupted
"""
    assert as_process("KEYE info", setup=f"exec({source!r})") == (130, "", "")


def test_names_of_the_package_are_imported_when_they_are_asked_for():
    for name in keye_model.__all__:
        assert getattr(keye_model, name).__name__ == name
        assert name in dir(keye_model)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = keye_model.nonsense
