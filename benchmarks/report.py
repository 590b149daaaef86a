"""What was measured: rows, the table for people, the JSON for scripts.

`python -m benchmarks.report results.json` prints the table of an earlier run and draws its plots.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.timing import Ceilings, Timing

CPU_NOTE = "CPU, small shapes: no claim about a GPU"


@dataclass(frozen=True)
class Row:
    """One provider of one case.

    Attributes:
        op, case, provider: What, at which shape, by whom.
        ours: One of our backends; all others are peers.
        size: The number that a plot puts on its x axis.
        seconds, spread: Median and half the distance of the quartiles, of one call. None: `note`
            says why there is no time.
        num_bytes, flops: What the result takes at the least; formulas stand beside the runners.
        limit: Seconds that this takes at the ceilings of the same run. None: no formula.
        best_peer: Seconds of the fastest peer of the case, if there is one.
        graph, cold: As in `timing.Timing`.
        stages: Seconds by stage, where a run has stages.
        note: Reason of absence, or what else must be known.
    """

    op: str
    case: str
    provider: str
    ours: bool = False
    size: float | None = None
    seconds: float | None = None
    spread: float | None = None
    num_bytes: int = 0
    flops: int = 0
    limit: float | None = None
    best_peer: float | None = None
    graph: bool = False
    cold: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def timed(self, timing: Timing, note: str = "") -> Row:
        """This row with what was measured."""
        return dataclasses.replace(
            self,
            seconds=timing.median,
            spread=timing.spread,
            graph=timing.graph,
            cold=timing.cold,
            note=note,
        )

    @property
    def percent_of_limit(self) -> float | None:
        return 100 * self.limit / self.seconds if self.seconds and self.limit else None

    @property
    def speedup(self) -> float | None:
        """Time of the best peer over our time: above 1 we are faster, below 1 slower."""
        ours = self.ours and self.seconds and self.best_peer
        return self.best_peer / self.seconds if ours else None

    def rate(self, ceilings: Ceilings) -> str:
        """Bytes or FLOP per second, whichever bounds the case."""
        if not self.seconds or not self.limit:
            return ""
        if self.num_bytes / ceilings.copy_bandwidth >= self.flops / ceilings.matmul_rate:
            return f"{self.num_bytes / self.seconds / 1e9:.1f} GB/s"
        return f"{self.flops / self.seconds / 1e12:.2f} TFLOP/s"


def with_best_peer(rows: list[Row]) -> list[Row]:
    """Rows of one case, each of ours with the time of the fastest peer that gave a right result."""
    times = [row.seconds for row in rows if row.seconds and not row.ours]
    best = min(times, default=None)
    return [dataclasses.replace(row, best_peer=best) if row.ours else row for row in rows]


class Report:
    """Collects rows; with a folder, writes all of them to `results.json` after each case.

    A file that is there already is continued when it is of the same machine, versions and sources:
    its rows stay until they are measured again.
    """

    def __init__(self, environment: dict, ceilings: Ceilings, folder: Path | None = None) -> None:
        self.environment, self.ceilings, self.folder = environment, ceilings, folder
        self.rows: list[Row] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = folder / "results.json"
            if earlier.exists() and (report := load(earlier)).environment == environment:
                self.rows = report.rows

    def add(self, rows: list[Row]) -> None:
        key = (rows[0].op, rows[0].case)
        self.rows = [row for row in self.rows if (row.op, row.case) != key]
        self.rows += with_best_peer(rows)
        if self.folder is not None:
            write_text(self.folder / "results.json", self.to_json())
            write_text(self.folder / "table.txt", self.table())

    def to_json(self) -> str:
        document = {
            "environment": self.environment,
            "ceilings": dataclasses.asdict(self.ceilings),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(document, indent=1) + "\n"

    def table(self) -> str:
        env, ceilings = self.environment, self.ceilings
        lines = [
            " · ".join(f"{name} {value}" for name, value in env.items() if value),
            f"ceilings of this run: copy {ceilings.copy_bandwidth / 1e9:.1f} GB/s (read + written),"
            f" bf16 matmul {ceilings.matmul_rate / 1e12:.2f} TFLOP/s",
            "%: time at the ceiling / time. peer: time of the best peer / ours, above 1 is faster.",
        ]
        if not env.get("gpu"):
            lines.insert(0, CPU_NOTE)
        for op in dict.fromkeys(row.op for row in self.rows):
            title = f"{op} ({CPU_NOTE})" if not env.get("gpu") else op
            lines += ["", title, _HEADER]
            case = None
            for row in (row for row in self.rows if row.op == op):
                shown = row.case if row.case != case else ""
                lines.append(_line(row, shown, ceilings, bool(env.get("gpu"))))
                case = row.case
        return "\n".join(lines) + "\n"


_FORMAT = "  {:30} {:20} {:>10} {:>8} {:>15} {:>5} {:>6}  {}"
_HEADER = _FORMAT.format("case", "provider", "µs", "±", "rate", "%", "peer", "note").rstrip()


def _line(row: Row, case: str, ceilings: Ceilings, on_gpu: bool) -> str:
    if row.seconds is None:
        return _FORMAT.format(case, row.provider, "-", "", "", "", "", row.note)
    percent, speedup = row.percent_of_limit, row.speedup
    notes = [row.note] if row.note else []
    if on_gpu and not row.graph:
        notes.append("with launches")
    if on_gpu and not row.cold:
        notes.append("inputs in L2")
    return _FORMAT.format(
        case,
        row.provider,
        f"{1e6 * row.seconds:.1f}",
        f"{1e6 * row.spread:.1f}",
        row.rate(ceilings),
        f"{percent:.0f}" if percent is not None else "",
        f"{speedup:.2f}" if speedup is not None else "",
        ", ".join(notes),
    ).rstrip()


def load(path: Path) -> Report:
    """Read `results.json`; the report has no folder, so it writes nothing."""
    document = json.loads(path.read_text())
    report = Report(document["environment"], Ceilings(**document["ceilings"]))
    report.rows = [Row(**row) for row in document["rows"]]
    return report


def write_text(path: Path, text: str) -> None:
    """All or nothing: a run that is killed leaves the file of the case before."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    from benchmarks.plots import draw

    for name in sys.argv[1:]:
        loaded = load(Path(name))
        print(loaded.table())
        draw(loaded, Path(name).parent)
