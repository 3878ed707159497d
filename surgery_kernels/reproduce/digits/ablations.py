"""What surgery owes to its rank, its steps and its unlabeled images, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from ..jobs import Job
from ..repair import Setting
from ..report import average
from .measure import Outcome

SWEEPS: dict[str, dict[str, dict[str, Setting]]] = {  # what is varied -> method -> value -> setting
    "rank": {
        "Surgery": {str(rank): Setting("v1", rank) for rank in (4, 16, 52, 64)},
        "SurgeryV2": {str(rank): Setting("v2", rank) for rank in (1, 4, 16)},
    },
    "steps": {
        "Surgery": {str(steps): Setting("v1", 16, steps=steps) for steps in (100, 300, 1000)},
        "SurgeryV2": {str(steps): Setting("v2", 4, steps=steps) for steps in (100, 300, 1000)},
    },
    "unlabeled images per task": {
        "Surgery": {str(count): Setting("v1", 16, num_samples=count) for count in (16, 64, 256)},
        "SurgeryV2": {str(count): Setting("v2", 4, num_samples=count) for count in (16, 64, 256)},
    },
    "unlabeled images from": {
        "Surgery": {"test": Setting("v1", 16), "train": Setting("v1", 16, on_train=True)},
        "SurgeryV2": {"test": Setting("v2", 4), "train": Setting("v2", 4, on_train=True)},
    },
}
COLORS = {"Surgery": "#0072B2", "SurgeryV2": "#009E73"}


def jobs(merge: str) -> list[Job]:
    settings = [setting for sweep in SWEEPS.values() for values in sweep.values() for setting in values.values()]
    return [Job(merge, setting) for setting in dict.fromkeys(settings)]


def text(merge: str, outcomes: Mapping[Job, Outcome]) -> str:
    """One line per sweep and method: value and average accuracy, side by side."""
    lines = [f"Average accuracy in %, {merge} with surgery"]
    for varied, methods in SWEEPS.items():
        for method, values in methods.items():
            averages = {value: average(outcomes[Job(merge, setting)].accuracy) for value, setting in values.items()}
            cells = [f"{value}: {accuracy:.1f}".rjust(11) for value, accuracy in averages.items()]
            lines.append(f"  {varied:26} {method:10} {'  '.join(cells)}")
    return "\n".join(lines)


def plot(merge: str, outcomes: Mapping[Job, Outcome], best: float, path: Path) -> None:
    """A panel per sweep, a line per method; `best` is the average of the experts."""
    figure = Figure(figsize=(11, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(SWEEPS), sharey=True)
    for panel, (varied, methods) in zip(panels, SWEEPS.items(), strict=True):
        for method, values in methods.items():
            accuracies = [average(outcomes[Job(merge, setting)].accuracy) for setting in values.values()]
            numeric = all(value.isdecimal() for value in values)
            where = [int(value) for value in values] if numeric else list(values)
            panel.plot(where, accuracies, "o-", color=COLORS[method], label=method)
            if numeric:
                panel.set_xscale("log", base=2)
                panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        panel.axhline(best, color="black", linestyle="--", linewidth=1, label="individual")
        panel.set_xlabel(varied)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
    panels[0].set_ylabel("average accuracy (%)")
    panels[0].legend(frameon=False)
    figure.suptitle(f"What surgery on {merge} owes to its settings", x=0.01, ha="left", weight="bold")
    figure.savefig(path)
