"""What `report` of a model or a family gives back."""

from dataclasses import dataclass

import transformers


@dataclass(frozen=True)
class Row:
    """One class of a family in a report.

    Attributes:
        part: Name of the class.
        ops: Ops of ours that its forward calls, or would call.
        replaced: Modules that call them; for a family 0 or 1.
        modules: Modules of that class; for a family 1.
        note: Why not, or what to know.
    """

    part: str
    ops: tuple[str, ...]
    replaced: int
    modules: int
    note: str


@dataclass(frozen=True)
class Report:
    """What `report` found; ``str()`` of it is a table."""

    target: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("part", "ops", "replaced", "note")]
        for row in self.rows:
            ops = ", ".join(row.ops) or "-"
            cells.append((row.part, ops, f"{row.replaced} of {row.modules}", row.note))
        widths = [max(len(line[i]) for line in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in cells
        ]
        return "\n".join([f"{self.target} (transformers {transformers.__version__})", *lines])
