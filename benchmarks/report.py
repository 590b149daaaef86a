"""Runs that were kept: the table of one and its plots, or two side by side.

`python -m benchmarks.report results.json` prints the table of an earlier run and draws its plots;
`python -m benchmarks.report old.json new.json` compares two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.compare import compare
from benchmarks.plots import draw
from benchmarks.record import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("old", type=Path, metavar="results.json")
    parser.add_argument("new", type=Path, metavar="new.json", nargs="?", help="compared with it")
    given = parser.parse_args(arguments)
    try:
        reports = [load(path) for path in (given.old, given.new) if path is not None]
    except ValueError as error:
        parser.error(str(error))
    if len(reports) == 2:
        print(compare(*reports))
        return
    print(reports[0].table())
    try:
        for path in draw(reports[0], given.old.parent):
            print(f"drawn: {path}")
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing}")


if __name__ == "__main__":
    main()
