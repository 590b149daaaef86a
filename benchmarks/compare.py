"""Two runs side by side: the time of each row in both, and what only one of them has."""

from __future__ import annotations

from benchmarks.record import Report, Row, describe

_FORMAT = "  {:30} {:20} {:>12} {:>12} {:>8}  {}"
_MACHINE = ("gpu", "cpu")
Key = tuple[str, str, str]


def compare(old: Report, new: Report) -> str:
    """A table per op; the ratio is old time / new time, above 1 the new run is faster."""
    rows = [{_key(row): row for row in report.rows} for report in (old, new)]
    lines = [f"old: {describe(old.environment)}", f"new: {describe(new.environment)}"]
    machines = [[report.environment.get(name, "") for name in _MACHINE] for report in (old, new)]
    if machines[0] != machines[1]:
        lines.append("the machines differ, so ratios compare them too")
    lines.append("ratio: old time / new time, above 1 the new run is faster")
    both = [key for key in rows[0] if key in rows[1]]
    op = case = None
    for key in both:
        before, after = rows[0][key], rows[1][key]
        if key[0] != op:
            op, case = key[0], None
            header = _FORMAT.format("case", "provider", "old µs", "new µs", "ratio", "note")
            lines += ["", op, header.rstrip()]
        lines.append(_line(key[1] if key[1] != case else "", before, after))
        case = key[1]
    for name, have, lack in (("old", *rows), ("new", *reversed(rows))):
        only = [" · ".join(key) for key in have if key not in lack]
        if only:
            lines += ["", f"only in the {name} run:", *(f"  {one}" for one in only)]
    return "\n".join(lines)


def _key(row: Row) -> Key:
    return row.op, row.case, row.provider


def _line(case: str, old: Row, new: Row) -> str:
    ratio, notes = "", []
    if old.seconds and new.seconds:
        ratio = f"{old.seconds / new.seconds:.2f}"
    for name, row in (("old", old), ("new", new)):
        # What a limit says does not matter here, but that the time is a neighbour's does.
        contended = row.flag if row.flag.startswith("contended") else ""
        if contended or row.seconds is None:
            notes.append(f"{name} {contended or row.note}")
    if (old.num_bytes, old.flops) != (new.num_bytes, new.flops):
        notes.append("the work differs")
    times = ("-" if row.seconds is None else f"{1e6 * row.seconds:.1f}" for row in (old, new))
    return _FORMAT.format(case, new.provider, *times, ratio, ", ".join(notes)).rstrip()
