"""The results as a plain-text table and as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .tasks import TASKS

Accuracies = Mapping[str, Sequence[float]]  # method -> percentage for each of TASKS

# Okabe and Ito's colours, apart for colour-blind readers too; markers differ as well.
STYLES = {
    "pretrained": ("#999999", "X"),
    "weight averaging": ("#56B4E9", "v"),
    "task arithmetic": ("#E69F00", "s"),
    "TIES": ("#D55E00", "o"),
    "multi-task": ("#009E73", "D"),
    "individual": ("#000000", "^"),
}


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(accuracies: Accuracies) -> str:
    """One row per method, one column per task, then the average; long names of tasks break at a plus sign."""
    headers = [[*name.replace("+", "\n+").split("\n"), ""][:2] for name in (*TASKS, "average")]
    widths = [max(5, *map(len, header)) for header in headers]
    label = max(len(name) for name in ("accuracy in %", *accuracies))

    def line(first: str, cells: Sequence[str]) -> str:
        return "  ".join([first.ljust(label), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    rows = [
        line("accuracy in %", [header[0] for header in headers]),
        line("", [header[1] for header in headers]),
        "-" * (label + sum(width + 2 for width in widths)),
    ]
    for method, values in accuracies.items():
        rows.append(line(method, [f"{value:.1f}" for value in (*values, average(values))]))
    return "\n".join(row.rstrip() for row in rows)


def plot_tasks(accuracies: Accuracies, examples: Tensor, path: Path) -> None:
    """A marker per method and task; below, what each task makes of one digit, examples [num_tasks, 8, 8]."""
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5.3, 1))
    methods = methods_in_order(accuracies)
    for index, method in enumerate(methods):
        color, marker = STYLES[method]
        shift = 0.11 * (index - (len(methods) - 1) / 2)
        positions = [task + shift for task in range(len(TASKS))]
        axes.plot(positions, accuracies[method], marker, color=color, markersize=7, label=method)
    axes.set(xlim=(-0.5, len(TASKS) - 0.5), ylim=(0, 100), ylabel="accuracy on held-out digits (%)")
    axes.set_xticks(range(len(TASKS)), [name.replace("+", "\n+") for name in TASKS])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.9")
    axes.vlines([task - 0.5 for task in range(1, len(TASKS))], 0, 100, color="0.9", linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Eight experts merged into one model: accuracy by task", loc="left", weight="bold", pad=28)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(methods), frameon=False, columnspacing=1, handletextpad=0
    )

    for task, example in enumerate(examples):
        strip.imshow(
            example.numpy(), cmap="gray", vmin=-1, vmax=1, aspect="auto", extent=(task - 0.3, task + 0.3, 0, 1)
        )
        strip.add_patch(Rectangle((task - 0.3, 0), 0.6, 1, fill=False, color="0.6"))
    strip.set(xlim=axes.get_xlim(), ylim=(-0.02, 1.02))
    strip.tick_params(axis="x", length=0)
    strip.set_yticks([])
    strip.spines[:].set_visible(False)
    figure.savefig(path)


def plot_averages(accuracies: Accuracies, path: Path) -> None:
    """One bar per method, and how far it stays below the individual experts."""
    methods = methods_in_order(accuracies)
    averages = [average(accuracies[method]) for method in methods]
    best = average(accuracies["individual"])
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(methods, averages, color=[STYLES[method][0] for method in methods])
    below = [f"   ({best - value:.1f} below the experts)" if best - value >= 0.05 else "" for value in averages]
    axes.bar_label(bars, [f"{value:.1f}{text}" for value, text in zip(averages, below, strict=True)], padding=4)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy on held-out digits, average of eight tasks (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("What is left of eight experts in one model", loc="left", weight="bold")
    figure.savefig(path)


def methods_in_order(accuracies: Accuracies) -> list[str]:
    return [method for method in STYLES if method in accuracies]
