"""`python -m keye_kernels tune`: prove and time the kernels on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import keye_kernels
from keye_kernels import _verdicts
from keye_kernels._tune import DTYPES, checked_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of `run`."""
    parser.add_argument("--op", metavar="OP", help="this op alone; verdicts of others stay")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=list(DTYPES.values()), default="bfloat16", help="(%(default)s)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print the verdicts and tune nothing")
    instead.add_argument("--clear", action="store_true", help="delete them and tune nothing")


def run(arguments: argparse.Namespace) -> int:
    """Tune, show or clear; returns the exit status."""
    device = checked_device(arguments.device)
    if arguments.clear:
        for path in _verdicts.clear(device):
            print(f"deleted {path}")
        return 0
    if arguments.show:
        verdicts, reason = _verdicts.load(device)
        if verdicts is None:
            print(f"no verdicts for {device}: {reason}", file=sys.stderr)
            return 1
    else:
        dtype = next(dtype for dtype, name in DTYPES.items() if name == arguments.dtype)
        verdicts = keye_kernels.tune(
            op=arguments.op, quick=arguments.quick, device=device, dtype=dtype, progress=_draw
        )
        _draw("", 0, 0)
    print(verdicts)
    if verdicts.path is not None:
        print(f"kept in {verdicts.path}")
    return 0


def _draw(case: str, done: int, total: int) -> None:
    """A bar on a terminal's standard error; no ``total`` clears it."""
    if sys.stderr is not None and sys.stderr.isatty():
        filled = 20 * done // total if total else 0
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total} {case:.50}" if total else ""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; mistakes are one line, not a traceback."""
    parser = argparse.ArgumentParser(prog="python -m keye_kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_arguments(commands.add_parser("tune", help="prove and time the kernels on this machine"))
    try:
        return run(parser.parse_args(argv))
    except (ValueError, RuntimeError) as error:
        print(f"keye_kernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
