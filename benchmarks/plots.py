"""Pictures of a report: latency against size with percent of the limit, and stages stacked."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.report import CPU_NOTE, Report, Row

_COLUMNS = 4


def draw(report: Report, folder: Path) -> list[Path]:
    """Write `latency.png` and `stages.png`, each if there are rows for it; returns their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    env = report.environment
    where = env.get("gpu") or CPU_NOTE
    title = f"{where} · torch {env.get('torch')} · {env.get('commit') or env.get('sources')}"
    paths = []
    timed = [row for row in report.rows if row.seconds]
    curves = [row for row in timed if row.size and not row.stages]
    staged = [row for row in timed if row.stages]
    if curves:
        paths.append(_latency(curves, title, folder / "latency.png"))
    if staged:
        paths.append(_stages(staged, title, folder / "stages.png"))
    return paths


def _latency(rows: list[Row], title: str, path: Path) -> Path:
    """Per op two axes: µs per call with the limit dashed, and below it the percent of the limit."""
    from matplotlib import pyplot

    ops = list(dict.fromkeys(row.op for row in rows))
    colours = _colours(rows)
    columns = min(_COLUMNS, len(ops))
    lines = -(-len(ops) // columns)
    figure, axes = pyplot.subplots(
        2 * lines,
        columns,
        figsize=(4.5 * columns, 5 * lines + 1),
        squeeze=False,
        layout="constrained",
        height_ratios=[2, 1] * lines,
    )
    for k in range(lines * columns):
        above, below = (axes[2 * (k // columns) + i][k % columns] for i in range(2))
        if k >= len(ops):
            above.axis("off")
            below.axis("off")
            continue
        chosen = [row for row in rows if row.op == ops[k]]
        limits = sorted({(row.size, 1e6 * row.limit) for row in chosen if row.limit})
        if limits:
            above.plot(*zip(*limits, strict=True), "k--", linewidth=1)
        for provider in dict.fromkeys(row.provider for row in chosen):
            points = sorted(
                (row.size, 1e6 * row.seconds, row.percent_of_limit)
                for row in chosen
                if row.provider == provider
            )
            style = {"color": colours[provider], "marker": "o", "markersize": 3}
            style["linewidth"] = 2 if provider.startswith("ours") else 1
            if len({size for size, *_ in points}) < len(points):
                style["linestyle"] = ""  # kinds of one size: a line through them would mean nothing
            above.plot([p[0] for p in points], [p[1] for p in points], **style)
            shown = [(size, percent) for size, _, percent in points if percent is not None]
            if shown:
                below.plot(*zip(*shown, strict=True), **style)
        above.set(title=ops[k], xscale="log", yscale="log", ylabel="µs")
        below.set(xscale="log", ylabel="% of limit", ylim=(0, None))
    handles = [pyplot.Line2D([], [], color=c, marker="o") for c in colours.values()]
    handles.append(pyplot.Line2D([], [], color="k", linestyle="--"))
    figure.legend(handles, [*colours, "limit of the run"], loc="outside lower center", ncols=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _stages(rows: list[Row], title: str, path: Path) -> Path:
    """One bar per run, its stages side by side."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 1.5 + 0.4 * len(rows)), layout="constrained")
    names = list(dict.fromkeys(itertools.chain.from_iterable(row.stages for row in rows)))
    labels = [f"{row.case} · {row.provider}" for row in rows]
    left = [0.0] * len(rows)
    for name in names:
        widths = [1e3 * row.stages.get(name, 0.0) for row in rows]
        axis.barh(labels, widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="ms", title=title)
    figure.legend(loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _colours(rows: list[Row]) -> dict[str, str]:
    """One colour for each provider, the same in every panel."""
    return {p: f"C{i}" for i, p in enumerate(dict.fromkeys(row.provider for row in rows))}
