"""The demo: a picture, a video and a mixed batch through the whole stack."""

from __future__ import annotations

import tempfile
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from keye_kernels import backends, tune, verdicts
from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import PREVIEW
from keye_model.cli.terminal import Progress, say
from keye_model.demo_checkpoint import build
from keye_model.inputs.answer import Answer
from keye_model.keye import Keye


def run(model: str | Checkpoint | None = None, *, max_new_tokens: int = 32) -> None:
    """Show the stack at work on checkpoint ``model``; None: on random weights."""
    with tempfile.TemporaryDirectory(prefix="keye-demo-") as name:
        folder = Path(name)
        if model is None:
            say("No model named: making a tiny checkpoint with random weights.")
            say("Its words mean nothing; pass MODEL=<directory or Hub id> for a real one.\n")
            model = build(folder / "checkpoint", PREVIEW)
        tune_first()
        keye = Keye.from_pretrained(model)
        config, device = keye.model.config, keye.model.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        say(f"{config.variant.name}, {keye.model.dtype}, on {where}".replace("torch.", ""))

        picture = draw_picture(folder / "picture.png")
        video = draw_video(folder / "video.mp4")
        look = _turn({"type": "image", "image": str(picture)}, "Describe this image.")
        watch = _turn({"type": "video", "video": str(video)}, "What happened in the video?")
        both = _turn({"type": "image", "image": str(picture)}, "Which colours do you see?")
        both[0]["content"].insert(1, {"type": "video", "video": str(video)})

        for title, messages in (("A picture", look), ("A video", watch)):
            say(f"\n{title}: {messages[0]['content'][-1]['text']}\n> ", end="")
            with Progress() as progress:
                options = {"max_new_tokens": max_new_tokens, "seed": 0, "progress": progress}
                stream = keye.stream(messages, **options)
                for piece in stream:
                    progress.close()
                    say(piece, end="")
            say("")
            _print_costs([stream.answer])

        say("\nA mixed batch: a picture, a video, both at once, and words alone")
        words = [{"role": "user", "content": "How many objects are there?"}]
        batch = [look, watch, both, words]
        with Progress() as progress:
            options["progress"] = progress
            answers = keye.generate(batch, **options)
        for answer in answers:
            say(f"> {answer.text}")
        _print_costs(answers)

    say("\n" + describe_backends())


def tune_first() -> None:
    """On a GPU that was never tuned, prove and time the kernels before one of them is used."""
    if torch.cuda.is_available() and verdicts("cuda") is None:
        say("Proving and timing the kernels on this GPU, once.\n")
        with Progress() as progress:
            tune(quick=True, progress=lambda _, done, total: progress("cases", done, total))


def describe_backends() -> str:
    """The backend of each op, and why the others do not serve it; equal ops are grouped."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups: dict[tuple[str, ...], list[str]] = {}
    found = backends(device)
    for op, served in found.items():
        reasons = (
            f"{name}: {why}".replace(f" for {op}", "") for name, why in served.why_not.items()
        )
        groups.setdefault((str(served.backend), *reasons), []).append(op)
    lines = [f"backend of each op for {device} tensors"]
    for (backend, *reasons), ops in groups.items():
        head = f"  {backend:10}  "
        lines.append(
            textwrap.fill(", ".join(ops), 100, initial_indent=head, subsequent_indent=" " * 14)
        )
        lines += [f"{'':16}not {reason}" for reason in reasons]
    tuned = [f"  {op}: {line}" for op, served in found.items() for line in served.verdicts]
    return "\n".join(lines + (["verdicts of keye tune", *tuned] if tuned else []))


def draw_picture(path: Path) -> Path:
    """A red square and a yellow disc on blue."""
    image = Image.new("RGB", (168, 112), (30, 60, 160))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 30, 70, 80), fill=(200, 30, 30))
    draw.ellipse((95, 25, 150, 80), fill=(240, 210, 40))
    image.save(path)
    return path


def draw_video(path: Path, *, seconds: int = 2, fps: int = 4) -> Path:
    """A white square that moves from left to right over grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for number in range(seconds * fps):
            frame = np.full((96, 128, 3), 90, np.uint8)
            left = number * 100 // (seconds * fps)
            frame[36:60, left : left + 24] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def _turn(item: dict, question: str) -> list[dict]:
    return [{"role": "user", "content": [item, {"type": "text", "text": question}]}]


def _print_costs(answers: list[Answer]) -> None:
    usage, t = [answer.usage for answer in answers], answers[0].timings
    prompt, new = sum(u.prompt_tokens for u in usage), sum(u.new_tokens for u in usage)
    images, videos = sum(u.image_tokens for u in usage), sum(u.video_tokens for u in usage)
    say(f"  {prompt} prompt tokens ({images} image, {videos} video), {new} new tokens")
    stages = ("processing", "vision", "prefill", "decode")
    say("  " + ", ".join(f"{name} {1000 * getattr(t, name):.1f} ms" for name in stages))
