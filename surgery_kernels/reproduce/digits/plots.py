"""What each merge makes of each task, with the task beside it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..report import Accuracies, color
from .tasks import TASKS

MARKERS = ("X", "v", "s", "o", "D", "^")


def plot_tasks(accuracies: Accuracies, examples: Tensor, path: Path) -> None:
    """A marker per method and task; below, what each task makes of one digit, examples [num_tasks, 8, 8]."""
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5.3, 1))
    for index, ((method, values), marker) in enumerate(zip(accuracies.items(), MARKERS, strict=False)):
        shift = 0.11 * (index - (len(accuracies) - 1) / 2)
        positions = [task + shift for task in range(len(TASKS))]
        shade = "#000000" if method == "individual" else color(method)
        axes.plot(positions, values, marker, color=shade, markersize=7, label=method)
    axes.set(xlim=(-0.5, len(TASKS) - 0.5), ylim=(0, 100), ylabel="accuracy on held-out digits (%)")
    axes.set_xticks(range(len(TASKS)), [name.replace("+", "\n+") for name in TASKS])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.9")
    axes.vlines([task - 0.5 for task in range(1, len(TASKS))], 0, 100, color="0.9", linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Eight experts merged into one model: accuracy by task", loc="left", weight="bold", pad=28)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(accuracies), frameon=False, columnspacing=1, handletextpad=0
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
