"""The results as lines, as a plain-text table and as plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Accuracies = Mapping[str, Sequence[float]]  # method -> percentage for each task

# Okabe and Ito's colours, apart for colour-blind readers too.
REFERENCE, MERGE, SURGERY, SURGERY_V2 = "#999999", "#56B4E9", "#E69F00", "#D55E00"
CLOSED_FORM, CALIBRATED = "#009E73", "#0072B2"


def say(line: str) -> None:
    print(line, flush=True)


def color(method: str) -> str:
    """By what was done after the merge, if it is one."""
    if method in ("pretrained", "multi-task", "individual"):
        return REFERENCE
    if "closed form" in method:
        return CLOSED_FORM
    if "calibrate" in method:
        return CALIBRATED
    return SURGERY_V2 if "SurgeryV2" in method else SURGERY if "Surgery" in method else MERGE


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(accuracies: Accuracies, tasks: Sequence[str], more: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """One row per method, one column per task, then the average; long names of tasks break at a plus sign.

    `more` adds columns: header -> method -> cell, empty for a method that is not in it.
    """
    more = more or {}
    headers = [[*name.replace("+", "\n+").split("\n"), ""][:2] for name in (*tasks, "average", *more)]
    widths = [max(5, *map(len, header)) for header in headers]
    labels = {method: short(method, accuracies) for method in accuracies}
    label = max(map(len, ("accuracy in %", *labels.values())))

    def line(first: str, cells: Sequence[str]) -> str:
        return "  ".join([first.ljust(label), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    rows = [
        line("accuracy in %", [header[0] for header in headers]),
        *([line("", [header[1] for header in headers])] if any(header[1] for header in headers) else []),
        "-" * (label + sum(width + 2 for width in widths)),
    ]
    for method, values in accuracies.items():
        cells = [f"{value:.1f}" for value in (*values, average(values))]
        rows.append(line(labels[method], cells + [column.get(method, "") for column in more.values()]))
    return "\n".join(row.rstrip() for row in rows)


def short(method: str, methods: Iterable[str]) -> str:
    """What was done to a merge is named below the merge alone."""
    merge, plus, repair = method.partition(" + ")
    return f"  + {repair}" if plus and merge in methods else method


def plot_averages(
    accuracies: Accuracies, path: Path, *, title: str, label: str, published: Mapping[str, float] | None = None
) -> None:
    """One bar per method, coloured by the repair, with a line where others report it to end."""
    methods = list(accuracies)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(methods)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    averages = [average(accuracies[method]) for method in methods]
    axes.barh(range(len(methods)), averages, color=[color(method) for method in methods])
    axes.set_yticks(range(len(methods)), [short(method, accuracies).strip() for method in methods])
    for row, value in enumerate(averages):
        axes.text(106, row, f"{value:.1f}", ha="right", va="center")
    reported = [(published[method], row) for row, method in enumerate(methods) if published and method in published]
    for value, row in reported:
        (line,) = axes.plot([value, value], [row - 0.4, row + 0.4], color="black")
    if reported:
        axes.legend([line], ["published"], loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.invert_yaxis()
    axes.set(xlim=(0, 106), xlabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", weight="bold")
    figure.savefig(path)
