"""Pictures of a report: time of each case with percent of the limit, and stages stacked."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.record import CPU_NOTE, Report, Row

_COLUMNS = 4
_MAX_PERCENT = 110  # of the axis: more is implausible and not drawn


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
    curves = [row for row in timed if not row.stages]
    staged = [row for row in timed if row.stages]
    if curves:
        paths.append(_latency(curves, title, folder / "latency.png"))
    if staged:
        paths.append(_stages(staged, title, folder / "stages.png"))
    return paths


def _latency(rows: list[Row], title: str, path: Path) -> Path:
    """Per op two axes: time of each case with its limit as a bar, below it percent of the limit.

    A point per case and provider. Hollow: contended or implausible; such a row has no percent.
    """
    from matplotlib import pyplot

    ops = list(dict.fromkeys(row.op for row in rows))
    colours = _colours(rows)
    columns = min(_COLUMNS, len(ops))
    lines = -(-len(ops) // columns)
    figure, axes = pyplot.subplots(
        2 * lines,
        columns,
        figsize=(max(5 * columns, 9), 6.5 * lines + 1),
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
        sizes = {row.case: row.size or 0 for row in chosen}
        cases = sorted(sizes, key=sizes.get)
        limits = {cases.index(row.case): 1e6 * row.limit for row in chosen if row.limit}
        above.plot(
            list(limits), list(limits.values()), "k", linestyle="", marker="_", markersize=16
        )
        providers = list(dict.fromkeys(row.provider for row in chosen))
        for i, provider in enumerate(providers):
            beside = 0.5 * ((i + 0.5) / len(providers) - 0.5)  # so that none hides another
            for row in (row for row in chosen if row.provider == provider):
                at, colour = cases.index(row.case) + beside, colours[provider]
                style = {"color": colour, "marker": "o", "markersize": 6 if row.ours else 4}
                style["markerfacecolor"] = "none" if row.flag else colour
                above.plot([at], [1e6 * row.seconds], **style)
                if row.percent_of_limit is not None and not row.flag:
                    below.plot([at], [row.percent_of_limit], **style)
        above.set(title=ops[k], yscale="log", ylabel="time of a call in µs")
        above.set_xticks(range(len(cases)), [])
        below.set(xlabel="case", ylabel="% of the limit", ylim=(0, _MAX_PERCENT))
        below.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
        for axis in (above, below):
            axis.set_xlim(-0.5, len(cases) - 0.5)
            axis.grid(axis="y", alpha=0.3)
    handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="") for c in colours.values()]
    handles.append(pyplot.Line2D([], [], color="k", marker="_", linestyle="", markersize=12))
    labels = [*colours, "limit of the run"]
    if any(row.flag for row in rows):
        empty = {"color": "k", "marker": "o", "markerfacecolor": "none", "linestyle": ""}
        handles.append(pyplot.Line2D([], [], **empty))
        labels.append("contended or implausible")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns))
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _stages(rows: list[Row], title: str, path: Path) -> Path:
    """One bar per run, its stages side by side."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 1.5 + 0.4 * len(rows)), layout="constrained")
    names = list(dict.fromkeys(itertools.chain.from_iterable(row.stages for row in rows)))
    labels = [f"{row.case} · {row.provider}{' (contended)' if row.flag else ''}" for row in rows]
    left = [0.0] * len(rows)
    for name in names:
        widths = [1e3 * row.stages.get(name, 0.0) for row in rows]
        axis.barh(labels, widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="time in ms", ylabel="case · provider", title=title)
    figure.legend(loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path


def _colours(rows: list[Row]) -> dict[str, str]:
    """One colour for each provider, the same in every panel."""
    return {p: f"C{i}" for i, p in enumerate(dict.fromkeys(row.provider for row in rows))}
