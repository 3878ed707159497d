"""The experiment on scikit-learn's handwritten digits: experts, merges, their accuracy and the time a merge takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..merging import merge_state_dicts
from .experts import Config, Experts, load_experts, one_thread
from .report import average, plot_averages, plot_tasks, table
from .tasks import TASKS
from .timing import time_ties
from .training import accuracy

DENSITY, LAM = 0.2, 0.3  # the papers' settings
MERGES: dict[str, dict[str, Any]] = {
    "weight averaging": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic", "lam": LAM},
    "TIES": {"method": "ties", "density": DENSITY, "lam": LAM, "reduce": "sum"},
}


def evaluate(experts: Experts) -> dict[str, list[float]]:
    """Accuracy of every method on the test images of each task, in percent."""
    states = {  # one per task
        "pretrained": [experts.pretrained] * len(TASKS),
        "individual": experts.experts,
        "multi-task": [experts.multi_task] * len(TASKS),
    }
    for name, options in MERGES.items():
        states[name] = [merge_state_dicts(experts.pretrained, experts.experts, **options)] * len(TASKS)
    return {
        name: [
            accuracy(experts.config.encoder(state), experts.heads, experts.test, task)
            for task, state in enumerate(state_of_task)
        ]
        for name, state_of_task in states.items()
    }


def run(config: Config, out: Path, *, retrain: bool = False) -> None:
    """Prints the table and the timing; writes both, and the plots, beside the checkpoints."""
    folder = out / f"digits-{config.fingerprint()}"
    if retrain:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    say(f"{len(TASKS)} tasks from scikit-learn's handwritten digits, seed {config.seed}")
    say(f"Reading checkpoints from {folder}, training those that are missing")
    experts = load_experts(config, folder)

    say(f"Merging {len(TASKS)} experts, testing on {len(experts.test.labels)} held-out images per task\n")
    with one_thread():
        accuracies = evaluate(experts)
        timing = time_ties(experts.pretrained, experts.experts, density=DENSITY, lam=LAM)
    say(table(accuracies))
    averages = {name: average(values) for name, values in accuracies.items()}
    best = max(MERGES, key=averages.__getitem__)
    say(f"\nThe best merge, {best}, is {averages['individual'] - averages[best]:.1f} points below the experts.\n")
    say(str(timing))

    results = {
        "accuracy": {name: dict(zip(TASKS, values, strict=True)) for name, values in accuracies.items()},
        "timing": asdict(timing),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "results.txt").write_text(f"{table(accuracies)}\n\n{timing}\n")
    a_six = (experts.test.labels == 6).nonzero()[0, 0]  # upside down it is a nine
    plot_tasks(accuracies, experts.test.images[:, a_six], folder / "accuracy_by_task.png")
    plot_averages(accuracies, folder / "average_accuracy.png")
    say(f"\nTable and plots: results.txt, results.json, accuracy_by_task.png, average_accuracy.png in {folder}")


def say(line: str) -> None:
    print(line, flush=True)
