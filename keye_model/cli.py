"""The command line: `keye generate | chat | demo | info | plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import keye_kernels
from keye_model import demo
from keye_model.checkpoint.config import KeyeConfig
from keye_model.checkpoint.hub import locate
from keye_model.conditional_generation import KeyeForConditionalGeneration, resolve_device
from keye_model.engine.cuda_graph import GRAPH_BYTES, why_no_graphs
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.plan import Costs, plan
from keye_model.engine.sampling import GenerationDefaults
from keye_model.engine.workspace import KEPT_TOKENS
from keye_model.keye import Keye
from keye_model.processing.processor import KeyeProcessor

_DEFAULT_MODEL = "Kwai-Keye/Keye-VL-8B-Preview"
_THINKING = {"auto": "auto", "on": True, "off": False}
_ERRORS = (ValueError, TypeError, OSError, RuntimeError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Mistakes are one line, not a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except _ERRORS as error:
        print(f"keye: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keye", description="Keye-VL on keye-kernels.")
    parser.add_argument("--version", action="version", version=keye_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", _generate, "answer one question about images and videos")
    chat = command("chat", _chat, "talk; /image and /video add to the next message")
    for sub in (generate, chat):
        _add_model(sub, _DEFAULT_MODEL)
        sub.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
        sub.add_argument("--backend", default="auto", help="auto, cuda, triton, reference")
        sub.add_argument(
            "--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (512)"
        )
        sub.add_argument("--thinking", choices=_THINKING, default="auto", help="ask for it or not")
        sub.add_argument("--greedy", action="store_true", help="always the most likely token")
        sub.add_argument("--temperature", type=float, metavar="T", help="as the checkpoint says")
        sub.add_argument("--top-k", type=int, metavar="K", help="as the checkpoint says; 0 is off")
        sub.add_argument(
            "--top-p", type=float, metavar="P", help="as the checkpoint says; 1 is off"
        )
        sub.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off")
        sub.add_argument("--seed", type=int, help="makes a sampled answer repeatable")
        sub.add_argument(
            "--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable"
        )
    generate.add_argument("--json", action="store_true", help="the whole answer as JSON")
    _add_inputs(generate)

    showing = command("demo", _demo, "a picture, a video and a mixed batch")
    showing.add_argument("--model", help="directory or Hub id; without it random weights")
    showing.add_argument("--max-new-tokens", type=int, default=32, metavar="N")

    info = command("info", _info, "versions, device, backend of each op, and a checkpoint's facts")
    _add_model(info, None)

    planning = command("plan", _plan, "tokens, memory and least time of a request, before it runs")
    _add_model(planning, _DEFAULT_MODEL)
    _add_inputs(planning)
    planning.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="of each request (512)"
    )
    planning.add_argument("--batch", type=int, default=1, help="as many equal requests (1)")
    planning.add_argument("--matmul", type=float, default=790, help="TFLOP/s (H200: 790)")
    planning.add_argument("--copy", type=float, default=4.3, help="TB/s (H200: 4.3)")
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--model", default=default, help=f"directory or Hub id{f' ({default})' if default else ''}"
    )
    parser.add_argument("--local-files-only", action="store_true", help="never touch the network")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="PATH_OR_URL", help="repeatable"
        )
    parser.add_argument("--fps", type=float, help="frames per second taken of each video (2)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="at most, of each video")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="of each image")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("text", help="the question")


def _generate(arguments: argparse.Namespace) -> None:
    processor, options = _checked(arguments)
    context = processor.config.text_config.max_position_embeddings
    request = processor.request(
        _messages(arguments), thinking=_THINKING[arguments.thinking], max_tokens=context - 1
    )
    stream = _load(arguments, processor).stream(request, **options)
    for piece in stream:
        if not arguments.json:
            print(piece, end="", flush=True)
    print(json.dumps(dataclasses.asdict(stream.answer)) if arguments.json else "")


def _chat(arguments: argparse.Namespace) -> None:
    processor, options = _checked(arguments)
    keye = _load(arguments, processor)
    options["thinking"] = _THINKING[arguments.thinking]
    print("/image PATH_OR_URL, /video PATH_OR_URL, /reset, /quit", file=sys.stderr)
    messages: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, source = (part.strip() for part in line.partition(" "))
        if command == "/quit":
            return
        if command == "/reset":
            messages, items = [], []
        elif command in ("/image", "/video"):
            if "://" in source or Path(source).expanduser().is_file():
                items.append({"type": command[1:], command[1:]: source})
            else:
                print(f"keye: error: {command[1:]} must be a file or URL, got {source!r}",
                      file=sys.stderr)  # fmt: skip
        elif line.startswith("/"):
            print(f"keye: error: unknown command {command}", file=sys.stderr)
        elif line:
            turn = {"role": "user", "content": [*items, {"type": "text", "text": line}]}
            said = ""
            try:
                for piece in keye.stream([*messages, turn], **options):
                    print(piece, end="", flush=True)
                    said += piece
            except KeyboardInterrupt:
                print(" (stopped)", file=sys.stderr)
            except _ERRORS as error:
                print(f"keye: error: {error}; /reset forgets all", file=sys.stderr)
                continue
            print()
            messages += [turn, {"role": "assistant", "content": said}]
            items = []


def _demo(arguments: argparse.Namespace) -> None:
    demo.run(arguments.model, max_new_tokens=arguments.max_new_tokens)


def _info(arguments: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    print(f"keye-kernels  {keye_kernels.__version__}")
    print(f"python        {platform.python_version()}")
    for package in ("torch", "triton", "av", "tokenizers"):
        print(f"{package:13} {_version(package)}")
    print(f"device        {torch.cuda.get_device_name() if cuda else 'CPU'}")
    print(f"csrc          {keye_kernels.describe_extension()}")
    print(demo.describe_backends())
    why_not = why_no_graphs(torch.device("cuda" if cuda else "cpu"))
    print(f"cuda graphs   {f'no: {why_not}' if why_not else 'yes'}")
    if arguments.model:
        config = KeyeConfig.from_pretrained(
            arguments.model, local_files_only=arguments.local_files_only
        )
        weight_bytes = Costs.of(config).weight_bytes
        print(f"model         {config.variant.name}")
        print(f"parameters    {weight_bytes // config.dtype.itemsize:,}")
        print(f"dtype         {str(config.dtype).removeprefix('torch.')}")
        print(f"context       {config.text_config.max_position_embeddings:,} tokens")


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1:
        raise ValueError(f"--batch must be a positive integer, got {arguments.batch}")
    if arguments.matmul <= 0 or arguments.copy <= 0:
        raise ValueError(
            f"--matmul and --copy must be positive, got {arguments.matmul} and {arguments.copy}"
        )
    local = {"local_files_only": arguments.local_files_only}
    config = KeyeConfig.from_pretrained(arguments.model, **local)
    processor = KeyeProcessor.from_pretrained(
        arguments.model, max_pixels=arguments.max_pixels, **local
    )
    context = config.text_config.max_position_embeddings
    request = processor.request(
        _messages(arguments),
        max_tokens=context - 1,
        fit_videos=lambda line: print(f"fitted        {line}"),
        shapes_only=True,
    )
    counts = plan(config, [request] * arguments.batch, arguments.max_new_tokens)
    seconds = counts.floor_seconds(arguments.matmul * 1e12, arguments.copy * 1e12)
    # Which frames of a video are slow, and which fast, only decoding tells.
    at_most = "at most " * bool(config.variant.timestamped_frames and counts.video_tokens)
    tokens = f"{at_most}{counts.prompt_tokens[0]:,} tokens each"
    if counts.prompt_tokens[0] >= context:
        tokens += ", TOO LONG"
    print(f"prompt        {arguments.batch} x {tokens}, context {context:,}")
    print(
        f"vision        {counts.image_tokens:,} image tokens, {at_most}{counts.video_tokens:,} "
        f"video tokens, {counts.patches:,} patches, longest segment {counts.longest_segment:,}"
    )
    print(f"weights       {counts.weight_bytes / 1e9:.2f} GB")
    print(
        f"cache         {counts.cache_bytes / 1e9:.3f} GB with {arguments.max_new_tokens} new "
        f"tokens each; with CUDA graphs {KEPT_TOKENS:,} tokens or more, "
        f"{KEPT_TOKENS * Costs.of(config).cache_bytes / 1e9:.3f} GB, and {GRAPH_BYTES / 1e9:.3f} "
        "GB left for the graphs"
    )
    print(f"activations   {counts.activation_bytes / 1e9:.3f} GB at most")
    print(f"pixels        {counts.pixel_bytes / 1e9:.3f} GB")
    print(
        f"arithmetic    vision {counts.vision_flops / 1e12:.3f} TFLOP, prefill "
        f"{counts.prefill_flops / 1e12:.3f} TFLOP, last decode step "
        f"{counts.decode_step_bytes / 1e9:.3f} GB"
    )
    print(
        f"least time    vision {1e3 * seconds['vision']:.2f} ms, prefill "
        f"{1e3 * seconds['prefill']:.2f} ms, decode step {1e3 * seconds['decode_step']:.2f} ms"
    )
    print(
        f"              at {arguments.matmul:g} TFLOP/s and {arguments.copy:g} TB/s: a floor by "
        "arithmetic, not a measurement"
    )


def _checked(arguments: argparse.Namespace) -> tuple[KeyeProcessor, dict[str, Any]]:
    """The processor and the options of an answer: what can be wrong before weights are read."""
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": False if arguments.greedy else None,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
    }
    local = {"local_files_only": arguments.local_files_only}
    resolve_device("device", arguments.device)
    directory = locate(arguments.model, weights=False, **local)
    GenerationDefaults.from_directory(directory).params(**options)
    max_pixels = getattr(arguments, "max_pixels", None)
    processor = KeyeProcessor.from_pretrained(directory, max_pixels=max_pixels, **local)
    Detokenizer(processor.tokenizer, arguments.stop)
    return processor, options | {"stop_strings": arguments.stop}


def _load(arguments: argparse.Namespace, processor: KeyeProcessor) -> Keye:
    model = KeyeForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        device_map=resolve_device("device", arguments.device),
        local_files_only=arguments.local_files_only,
    )
    return Keye(model, processor, backend=arguments.backend)


def _messages(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    sampling = {"fps": arguments.fps, "max_frames": arguments.max_frames}
    sampling = {key: value for key, value in sampling.items() if value is not None}
    content: list[dict[str, Any]] = [{"type": "image", "image": path} for path in arguments.image]
    content += [{"type": "video", "video": path, **sampling} for path in arguments.video]
    content.append({"type": "text", "text": arguments.text})
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, {"role": "user", "content": content}]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
