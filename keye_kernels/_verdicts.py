"""Verdicts of `tune`: which candidate is right and fastest on this machine, kept in one file.

The file belongs to one device and one set of versions. What was made by others, or is damaged, is
as if it were not there.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

_VARIABLE = "KEYE_KERNELS_CACHE"
_SOURCES = Path(__file__).parent

FAULTS = ("wrong", "failed", "crashed", "hung")

Kind = tuple[str, ...]  # what must be equal: dtype, and what else the op says
Sizes = tuple[int, ...]  # what may differ: rows, lengths


@dataclass(frozen=True)
class Row:
    """One candidate of one op at one case.

    Attributes:
        op, candidate: Names in the registry.
        case: The shapes in words.
        kind, sizes: The class of shapes of the case, see `_backends.classify`.
        status: "chosen" for the one that serves this class of shapes, "right" for others that
            could, "refused", "absent" (not installed, not built), or one of FAULTS, after which the
            candidate serves no shape.
        reason: Why, in words.
        microseconds, spread: Median of a call and half the range of its rounds; None: not timed.
    """

    op: str
    candidate: str
    case: str
    kind: Kind
    sizes: Sizes
    status: str
    reason: str = ""
    microseconds: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        texts = (self.op, self.candidate, self.case, self.status, self.reason)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a row must name op, candidate, case, status and reason, got {texts}")
        object.__setattr__(self, "kind", tuple(map(str, self.kind)))
        object.__setattr__(self, "sizes", tuple(map(int, self.sizes)))


@dataclass(frozen=True)
class Verdicts:
    """What `tune` found on one device: ``str()`` is a table.

    Attributes:
        machine: Device, driver, versions and digest of the sources that were tuned.
        made: Seconds since 1970 at which the newest row was written.
        rows: One per op, case and candidate.
        path: The file; None if it could not be written.
    """

    machine: dict[str, str]
    made: float
    rows: tuple[Row, ...]
    path: Path | None = None

    def choice(self, op: str, kind: Kind, sizes: Sizes) -> Row | None:
        """The chosen row of the tuned case whose sizes are nearest, as ratios; None: none is."""
        rows = [r for r in self.rows if (r.op, r.kind, r.status) == (op, kind, "chosen")]
        return min(rows, key=lambda row: _distance(row.sizes, sizes), default=None)

    def of(self, op: str) -> list[Row]:
        """Rows of one op, in the order in which they were tried."""
        return [row for row in self.rows if row.op == op]

    def bad(self, op: str, candidate: str) -> Row | None:
        """The row that shows a fault of the candidate, None if none was found."""
        rows = self.of(op)
        return next((r for r in rows if r.candidate == candidate and r.status in FAULTS), None)

    def describe(self, op: str) -> tuple[str, ...]:
        """A line per case: what was chosen, its time, and how much slower the next best is."""
        lines = []
        for row in self.of(op):
            if row.status == "chosen":
                times = [r.microseconds for r in self.of(op) if r.case == row.case and r is not row]
                next_best = min((time for time in times if time is not None), default=None)
                margin = f", {next_best / row.microseconds:.2f}x" if next_best else ""
                took = f"{row.microseconds:.1f} us{margin}, {age(self.made)}"
                lines.append(f"{row.candidate} for {row.case}: {took}")
        return tuple(lines)

    def __str__(self) -> str:
        lines = [f"{self.machine['device']}, {age(self.made)}"]
        cases = list(dict.fromkeys((row.op, row.case) for row in self.rows))
        width = max((len(row.candidate) for row in self.rows), default=0)
        for case in cases:
            lines.append(", ".join(case))
            for row in self.rows:
                if (row.op, row.case) == case:
                    took = "" if row.microseconds is None else f"{row.microseconds:.1f} us"
                    took += "" if row.spread is None else f" ± {row.spread:.1f}"
                    what = f"{row.status}: {row.reason}" if row.reason else row.status
                    lines.append(f"  {row.candidate:{width}} {took:>22}  {what}")
        return "\n".join(lines)


def _distance(tuned: Sizes, asked: Sizes) -> float:
    if len(tuned) != len(asked):
        return math.inf
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(tuned, asked, strict=True))


def age(made: float) -> str:
    """Time since ``made`` in words."""
    seconds = max(time.time() - made, 0)
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= unit:
            count = int(seconds // unit)
            return f"tuned {count} {name}{'s' if count > 1 else ''} ago"
    return "tuned just now"


def directory() -> Path:
    """Where verdicts are kept: KEYE_KERNELS_CACHE, else the user's cache directory."""
    if named := os.environ.get(_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "keye_kernels"


@functools.cache
def _digest() -> str:
    """Of the sources of the ops and of the compiled extension."""
    found = hashlib.sha256()
    files = [p for p in _SOURCES.rglob("*") if p.suffix in (".py", ".so") and p.is_file()]
    for path in sorted(files):
        found.update(str(path.relative_to(_SOURCES)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _processor() -> str:
    """Model of the CPU, with family and stepping where Linux tells them."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        names = ("model name", "cpu family", "model", "stepping")
        facts = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in names]
        if facts[0]:
            return " ".join(fact[1].strip() for fact in facts if fact)
    return platform.processor() or platform.machine()


def _driver() -> str:
    with contextlib.suppress(OSError):
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", line):
            return found[0]
    # Outside of Linux: the newest CUDA that the driver knows.
    return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


@functools.cache
def machine(device_type: str) -> dict[str, str]:
    """What a verdict depends on beside shapes."""
    facts = {"type": device_type}
    if device_type == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
        }
    else:
        facts |= {"device": _processor(), "cores": str(os.cpu_count())}
    return facts | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": _digest(),
    }


def _stem(facts: dict[str, str]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['type']} {facts['device']}".lower()).strip("-")


def path_of(facts: dict[str, str]) -> Path:
    """The file of a machine and its versions."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return directory() / f"{_stem(facts)}-{digest}.json"


def load(device_type: str) -> tuple[Verdicts | None, str]:
    """Read the verdicts of this machine; None, and why, if there are none that count."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return None, "there is no GPU"
    facts = machine(device_type)
    path = path_of(facts)
    try:
        found = json.loads(path.read_text())
        if found["machine"] != facts:
            return None, f"{path} is of another machine"
        rows = tuple(Row(**row) for row in found["rows"])
        return Verdicts(facts, float(found["made"]), rows, path), ""
    except FileNotFoundError:
        stale = any(directory().glob(f"{_stem(facts)}-*.json"))
        return None, "other versions were tuned here, not these" if stale else "never tuned here"
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError) as error:
        return None, f"{path} is damaged: {type(error).__name__}: {error}"


@functools.cache
def current(device_type: str) -> Verdicts | None:
    """The verdicts that hold for the life of this process; says once if there are none."""
    verdicts, reason = load(device_type)
    here = device_type == "cpu" or torch.cuda.is_available()  # others are only asked about
    if verdicts is None and here and sys.stderr is not None and sys.stderr.isatty():
        where = "" if device_type == "cuda" else " --device cpu"
        print(
            f"keye_kernels: no verdicts, {reason}; `python -m keye_kernels tune{where}` proves and "
            "times the kernels on this machine",
            file=sys.stderr,
        )
    return verdicts


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Wait for other processes that hold the lock ``name``; where locks do not work, do not."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            directory().mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((directory() / f"{name}.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(device_type: str, rows: Iterable[Row]) -> Verdicts:
    """Put ``rows`` in the place of older ones of the same ops; the file is whole at any time.

    Where it cannot be written, the verdicts' ``path`` is None.
    """
    facts, rows = machine(device_type), tuple(rows)
    new = {row.op for row in rows}
    path = path_of(facts)
    with locked("save"):
        old, _ = load(device_type)
        kept = tuple(row for row in old.rows if row.op not in new) if old else ()
        verdicts = Verdicts(facts, time.time(), kept + rows, path)
        content = {"machine": facts, "made": verdicts.made}
        content["rows"] = [asdict(row) for row in verdicts.rows]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new_file = path.with_suffix(f".{os.getpid()}.new")
            new_file.write_text(json.dumps(content, indent=1))
            new_file.replace(path)
        except OSError as error:
            print(f"keye_kernels: {path} cannot be written: {error.strerror}", file=sys.stderr)
            return replace(verdicts, path=None)
    return verdicts


def clear(device_type: str) -> list[Path]:
    """Delete the verdicts of this device, those of other versions too; returns what was deleted."""
    found = sorted(directory().glob(f"{_stem(machine(device_type))}-*.json"))
    for path in found:
        path.unlink(missing_ok=True)
    return found
