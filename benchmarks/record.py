"""What was measured: rows, the table for people, the JSON for scripts."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.timing import Ceilings, Timing

CPU_NOTE = "CPU, small shapes: no claim about a GPU"
_MAX_PERCENT = 105  # of a limit that was measured in the same run


@dataclass(frozen=True)
class Row:
    """One provider of one case.

    Attributes:
        op, case, provider: What, at which shape, by whom.
        ours: One of our backends; all others are peers.
        size: Orders the cases of a plot.
        seconds, spread: Median and half the distance of the quartiles, of one call. None: `note`
            says why there is no time.
        num_bytes, flops: What the result takes at the least; formulas stand beside the runners.
        limit: Seconds that this takes at the ceilings of the same run. None: no formula.
        best_peer: Seconds of the fastest peer of the case, if there is one.
        graph, cold: As in `timing.Timing`.
        stages: Seconds by stage, where a run has stages.
        flag: "contended: ..." or "implausible: ...", with the reason: why the percent of the limit
            means nothing. "" if it does.
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
    flag: str = ""
    note: str = ""

    def timed(self, timing: Timing, contended: str = "") -> Row:
        """This row with what was measured, and why it may mean nothing."""
        found = dataclasses.replace(
            self,
            seconds=timing.median,
            spread=timing.spread,
            graph=timing.graph,
            cold=timing.cold,
        )
        flag, percent = "", found.percent_of_limit
        if contended:
            flag = f"contended: {contended}"
        elif percent is not None and percent > _MAX_PERCENT:
            why = "the ceiling is too low" if timing.cold else "inputs may stay in a cache"
            flag = f"implausible: {percent:.0f} % of the limit, {why}"
        return dataclasses.replace(found, flag=flag)

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
            return bytes_per_second(self.num_bytes / self.seconds)
        return flops_per_second(self.flops / self.seconds)


def bytes_per_second(rate: float) -> str:
    """In the largest unit up to GB/s that leaves a digit before the point."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if rate >= size:
            return f"{rate / size:.1f} {unit}"
    return f"{rate / 1e3:.1f} kB/s"


def flops_per_second(rate: float) -> str:
    """In the largest unit up to TFLOP/s that leaves a digit before the point."""
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if rate >= size:
            return f"{rate / size:.2f} {unit}"
    return f"{rate / 1e6:.2f} MFLOP/s"


def with_best_peer(rows: list[Row]) -> list[Row]:
    """Rows of one case, each of ours with the time of the fastest peer that gave a right result."""
    times = [row.seconds for row in rows if row.seconds and not row.ours]
    best = min(times, default=None)
    return [dataclasses.replace(row, best_peer=best) if row.ours else row for row in rows]


class Report:
    """Collects rows; with a folder, writes all to `results.json` and `.csv` after each case.

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
            write_text(self.folder / "results.csv", self.to_csv())
            write_text(self.folder / "table.txt", self.table())

    def to_json(self) -> str:
        document = {
            "environment": self.environment,
            "ceilings": dataclasses.asdict(self.ceilings),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(document, indent=1) + "\n"

    def to_csv(self) -> str:
        """The rows as in the JSON, their stages as JSON, with the percent and the ratio."""
        names = [field.name for field in dataclasses.fields(Row)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, "percent_of_limit", "speedup"])
        for row in self.rows:
            values = [getattr(row, name) for name in names]
            values[names.index("stages")] = json.dumps(row.stages) if row.stages else ""
            writer.writerow([*values, row.percent_of_limit, row.speedup])
        return text.getvalue()

    def table(self) -> str:
        env, ceilings = self.environment, self.ceilings
        reached = (
            f"copy {bytes_per_second(ceilings.copy_bandwidth)} (read + written), "
            f"bf16 matmul {flops_per_second(ceilings.matmul_rate)}"
        )
        if ceilings.contended:
            reached = f"contended ({ceilings.contended}), so no percent of them is given: {reached}"
        lines = [
            describe(env),
            f"ceilings of this run: {reached}",
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


_FORMAT = "  {:30} {:20} {:>10} {:>8} {:>15} {:>11} {:>6}  {}"
_HEADER = _FORMAT.format("case", "provider", "µs", "±", "rate", "%", "peer", "note").rstrip()


def _line(row: Row, case: str, ceilings: Ceilings, on_gpu: bool) -> str:
    if row.seconds is None:
        return _FORMAT.format(case, row.provider, "-", "", "", "", "", row.note)
    percent, speedup = row.percent_of_limit, row.speedup
    notes = [text for text in (row.flag, row.note) if text]
    shown_percent = f"{percent:.0f}" if percent is not None else ""
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
        row.flag.partition(":")[0] or shown_percent,
        f"{speedup:.2f}" if speedup is not None else "",
        ", ".join(notes),
    ).rstrip()


def describe(environment: dict) -> str:
    """One line: machine, versions, commit."""
    return " · ".join(f"{name} {value}" for name, value in environment.items() if value)


def load(path: Path) -> Report:
    """Read `results.json`; the report has no folder, so it writes nothing.

    Raises:
        ValueError: It is no such file.
    """
    try:
        document = json.loads(path.read_text())
        report = Report(document["environment"], Ceilings(**document["ceilings"]))
        report.rows = [Row(**row) for row in document["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a results.json of a run, got {error!r}") from error
    return report


def write_text(path: Path, text: str) -> None:
    """All or nothing: a run that is killed leaves the file of the case before."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
