"""The command line: `keye generate | chat | demo | tune | info | plan`.

Only the parser is imported here: importing torch takes seconds, and `--help` and mistakes need not
wait for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from keye_model.cli import terminal
from keye_model.cli.options import (
    ERRORS,
    POSITIVE,
    POSITIVE_INT,
    Parser,
    UsageError,
    add_exif,
    add_frames,
    add_pixels,
    number,
    with_flags,
)
from keye_model.inputs.options import SamplingOptions

_DEFAULT_MODEL = "Kwai-Keye/Keye-VL-8B-Preview"
_EXAMPLES = """\
examples:
  keye generate --image photo.jpg "Describe this image."
  keye generate --image a.jpg --image b.jpg "What differs?"
  keye generate --video clip.mp4 --max-frames 32 "What happens?"
  git log -5 | keye generate -
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is printed as one line, without a traceback.

    Returns:
        The exit status: 1 after an error, 2 if the command line is wrong, 130 after Ctrl-C, and 141
        if the reader of the output closed the pipe.
    """
    try:
        terminal.prepare()
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        status = 141
    except UsageError as error:
        _complain(f"{error}; see keye --help, or keye COMMAND --help")
        return 2
    except ERRORS as error:
        _complain(with_flags(str(error)))
        status = 1
    if sys.stdout is not None:
        terminal.give_up_stdout()
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if "command" not in arguments:
        parser.print_help()
        return 0
    _check(arguments)
    if "thinking" in arguments:
        arguments.thinking = {"on": True, "off": False}.get(arguments.thinking, "auto")
    if arguments.model is not None:
        with terminal.interrupt_exits():
            from keye_model.checkpoint.checkpoint import Checkpoint

        offline = getattr(arguments, "local_files_only", False)
        arguments.model = Checkpoint.at(arguments.model, local_files_only=offline)
        arguments.model.json("config.json")
    with terminal.interrupt_exits():
        from keye_model.cli import commands

    return getattr(commands, arguments.command)(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Check the question, and options that depend on each other."""
    command, text = arguments.command, getattr(arguments, "text", None)
    if command in ("generate", "plan") and not arguments.video:
        for name in ("fps", "max_frames", "total_pixels"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} must come with a --video")
    if (command == "chat" or text == "-") and sys.stdin is None:
        raise OSError("standard input must be open, got it closed")
    if text == "-":
        text = arguments.text = sys.stdin.read()
    if command == "generate" and not (text or "").strip():
        got = "none" if text is None else "an empty one"
        raise UsageError(f'generate must have a question, as in keye generate "Hello", got {got}')
    if command == "plan" and not (text or arguments.image or arguments.video):
        raise UsageError("plan must have an --image, a --video or a question, got none")


def _complain(text: str) -> None:
    print(terminal.printable(f"keye: error: {text}", sys.stderr), file=sys.stderr)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("keye-kernels"))
        except PackageNotFoundError:  # run from its sources
            import keye_kernels

            print(keye_kernels.__version__)
        parser.exit()


def _parser() -> Parser:
    parser = Parser(prog="keye", description="Keye-VL on keye-kernels.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, text: str, epilog: str | None = None) -> Parser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            usage=f"keye {name} [options]{' [QUESTION]' if name in ('generate', 'plan') else ''}",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=name)
        return sub

    generate = command("generate", "answer one question about images and videos", _EXAMPLES)
    _add_text(generate, "the question; - reads it from standard input")
    _add_inputs(generate)
    _add_answer(generate)
    _add_model(generate, _DEFAULT_MODEL, loaded=True)
    generate.add_argument("--json", action="store_true", help="print the whole answer as JSON")

    chat = command("chat", "talk about images and videos; /help lists the commands")
    _add_inputs(chat)
    _add_answer(chat)
    _add_model(chat, _DEFAULT_MODEL, loaded=True)

    demo = command("demo", "show a picture, a video and a mixed batch")
    demo.add_argument("--model", help="directory or Hub id; without it random weights")
    _add_max_new_tokens(demo, "of each answer (%(default)s)", 32)

    tune = command("tune", "prove and time the kernels on this machine")
    tune.set_defaults(model=None)
    tune.add_argument("--op", metavar="OP", help="this op alone; verdicts of others stay")
    tune.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    tune.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one, else cpu")
    tune.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print the verdicts and tune nothing")
    instead.add_argument("--clear", action="store_true", help="delete them and tune nothing")

    info = command("info", "print versions, backends and a checkpoint's facts")
    _add_model(info, None)

    plan = command("plan", "print tokens, memory and least time of a request")
    _add_text(plan, "the question, to count its tokens too")
    _add_inputs(plan)
    costs = plan.add_argument_group("costs")
    _add_max_new_tokens(costs, "of each request (%(default)s)")
    for name, kind, default, text in (
        ("batch", POSITIVE_INT, 1, "number of equal requests (1)"),
        ("matmul", POSITIVE, 790.0, "TFLOP/s of the GPU (H200: 790)"),
        ("copy", POSITIVE, 4.3, "TB/s of the GPU (H200: 4.3)"),
    ):
        costs.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    _add_model(plan, _DEFAULT_MODEL)
    return parser


def _add_text(parser: Parser, text: str) -> None:
    parser.add_argument("text", nargs="?", metavar="QUESTION", help=text)


def _add_inputs(parser: Parser) -> None:
    group = parser.add_argument_group("pictures and videos")
    for kind in ("image", "video"):
        group.add_argument(
            f"--{kind}", action="append", default=[], metavar="PATH_OR_URL", help="repeatable"
        )
    add_exif(group)
    add_frames(group)
    add_pixels(group, "a picture or a frame")
    group.description = (
        "A video too long for the context is sampled to the most frames that fit, unless\n"
        "--fps or --max-frames says how many to take."
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")


def _add_answer(parser: Parser) -> None:
    group = parser.add_argument_group("the answer")
    not_negative = number(int, "an integer of at least 0", lambda x: x >= 0)
    _add_max_new_tokens(group, "most tokens of an answer (%(default)s)")
    group.add_argument(
        "--thinking", choices=("auto", "on", "off"), default="auto", help="auto: the model decides"
    )
    group.add_argument(
        "--greedy",
        action="store_const",
        const=False,
        dest="do_sample",
        help="always the most likely token",
    )
    for name, kind, metavar, off in (
        ("temperature", number(float, "at least 0", lambda x: x >= 0), "T", "0 is greedy"),
        ("top-k", not_negative, "K", "0 is off"),
        ("top-p", number(float, "in (0, 1]", lambda x: 0 < x <= 1), "P", "1 is off"),
        ("repetition-penalty", POSITIVE, "R", "1 is off"),
    ):
        text = f"{off}; default: the checkpoint's"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    seed = number(int, "an integer in [0, 2^63)", lambda x: 0 <= x < 2**63)
    group.add_argument("--seed", type=seed, metavar="N", help="makes a sampled answer repeatable")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        dest="stop_strings",
        metavar="TEXT",
        help="end before TEXT; repeatable",
    )


def _add_max_new_tokens(
    parser: argparse._ActionsContainer, text: str, default: int = SamplingOptions.max_new_tokens
) -> None:
    parser.add_argument(
        "--max-new-tokens", type=POSITIVE_INT, default=default, metavar="N", help=text
    )


def _add_model(parser: Parser, default: str | None, *, loaded: bool = False) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model", default=default, help=f"directory or Hub id{f' ({default})' if default else ''}"
    )
    group.add_argument("--local-files-only", action="store_true", help="never touch the network")
    if loaded:
        group.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16")
        group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
        group.add_argument("--backend", default="auto", help="auto, cuda, triton, reference")
