"""The experiment in half a minute: experts of fewer steps, merges without training, and the closed form on each."""

from __future__ import annotations

from pathlib import Path

from ..jobs import Job, one_thread, processes
from ..methods import MERGES
from ..report import plot_averages, say
from .experiment import CLOSED_FORM, SURGERIES, Outcomes, individual, table_of
from .experts import Config, load_experts
from .measure import measure, measure_jobs
from .tasks import TASKS

CHOSEN = ("weight averaging", "task arithmetic", "TIES")
STEPS = {"pretrain_steps": 360, "expert_steps": 70, "multi_task_steps": 1}


def run(seed: int, out: Path) -> Outcomes:
    """Prints the table; writes it, and its plot, beside the checkpoints."""
    config = Config(seed=seed, **STEPS)
    folder = out / f"digits-{config.fingerprint()}"
    say(f"{len(TASKS)} tasks from scikit-learn's handwritten digits, seed {seed}, in few steps")
    setting = SURGERIES[CLOSED_FORM]
    jobs = [job for name in MERGES if name in CHOSEN for job in (Job(name), Job(name, setting))]
    with processes() as pool:
        experts = load_experts(config, folder, pool)
        measured = measure_jobs(pool, config, folder, jobs)
    with one_thread():
        outcomes = {"pretrained": measure(experts, [config.encoder(experts.pretrained)] * len(TASKS))}
        for job in jobs:
            outcomes[f"{job.merge} + {CLOSED_FORM}" if job.setting else job.merge] = measured[job]
        outcomes["individual"] = individual(experts)
    text = table_of(outcomes)
    say(f"\n{text}")
    (folder / "results.txt").write_text(f"{text}\n")
    plot_averages(
        {name: outcome.accuracy for name, outcome in outcomes.items()},
        folder / "average_accuracy.png",
        title="Eight experts in one model, and what the closed form gives back",
        label="accuracy, average of the tasks (%)",
    )
    say(f"\nTable and plot are in {folder}")
    return outcomes
