"""The experiment on scikit-learn's handwritten digits: experts, merges, surgery, and the time each takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from ...surgery import plot_bias, plot_features
from .. import training_free
from ..jobs import Job, one_thread
from ..methods import DENSITY, LAM, MERGES
from ..repair import STEPS, Setting
from ..report import average, plot_averages, say, short, table
from . import ablations
from .experts import Config, Experts, StateDict, load_experts
from .measure import Outcome, measure, measure_jobs
from .plots import plot_tasks
from .tasks import TASKS
from .timing import SurgeryTiming, Timing, time_surgery, time_ties
from .training import accuracy

CLOSED_FORM = "closed form"
SURGERIES = {  # a rank of 52 gives Surgery as many parameters as SurgeryV2 has
    "Surgery": Setting("v1", rank=16),
    "Surgery, rank 52": Setting("v1", rank=52),
    "SurgeryV2": Setting("v2", rank=4),
    CLOSED_FORM: Setting("v2", rank=16, num_samples=64, solver="closed_form"),
    "calibrate": Setting("calibrate", num_samples=64),  # one model for all tasks
    "calibrate, residual": Setting("calibrate", num_samples=64, residual=True),
    "calibrate, adapters": Setting("v2", rank=16, num_samples=64, solver="closed_form", calibrated=True),
}
SHOWN = "task arithmetic"  # by the plots of a single merge and the ablations
EAGER_STEPS = 5

Outcomes = dict[str, Outcome]  # by method


def run_seeds(
    configs: Sequence[Config], out: Path, *, retrain: bool = False, steps: int = STEPS, full: bool = False
) -> list[Outcomes]:
    """One run per seed; of several also their mean and spread."""
    outcomes = [run(config, out, retrain=retrain, steps=steps, full=full) for config in configs]
    if len(outcomes) > 1:
        text = over_seeds(outcomes)
        say(f"\n{text}")
        (out / f"digits-seeds-{configs[0].seed}-{configs[-1].seed}.txt").write_text(f"{text}\n")
    return outcomes


def run(config: Config, out: Path, *, retrain: bool = False, steps: int = STEPS, full: bool = False) -> Outcomes:
    """Prints tables and timings; writes them, and the plots, beside the checkpoints."""
    folder = out / f"digits-{config.fingerprint()}"
    if retrain:
        forget(folder)
    say(f"{len(TASKS)} tasks from scikit-learn's handwritten digits, seed {config.seed}")
    say(f"Reading checkpoints from {folder}, training those that are missing")
    experts = load_experts(config, folder)

    jobs = jobs_of(steps)
    say(f"Merging in {len(MERGES)} ways, repairing each in {len(SURGERIES)}, {steps} steps per task")
    repaired = measure_jobs(config, folder, jobs, adamerging_steps=steps // 2)
    with one_thread():
        outcomes = evaluate(experts, repaired, steps)
        timing = time_ties(experts.pretrained, experts.experts, density=DENSITY, lam=LAM)
        surgery = [time_fit(experts, name, steps, repaired) for name in ("Surgery", "SurgeryV2")]
        methods = training_free.rows(experts.pretrained, experts.experts, partial(accuracy_of, experts))
    text = [
        f"{table_of(outcomes)}\n\n{in_words(outcomes)}",
        training_free.text(methods),
        str(timing),
        timing_text(surgery, repaired[Job(SHOWN, surgeries(steps)[CLOSED_FORM])].seconds),
    ]
    say("\n" + "\n\n".join(text))
    if full:
        repaired |= measure_jobs(config, folder, [job for job in ablations.jobs(SHOWN) if job not in repaired])
        text.append(ablations.text(SHOWN, repaired))
        say("\n" + text[-1])
        ablations.plot(SHOWN, repaired, average(outcomes["individual"].accuracy), folder / "ablations.png")

    write(folder, outcomes, timing, surgery, text)
    draw(experts, outcomes, folder)
    say(f"\nTables and plots: results.txt, results.json and {', '.join(sorted(p.name for p in folder.glob('*.png')))}")
    say(f"in {folder}")
    return outcomes


def forget(folder: Path) -> None:
    """Leaves nothing that would be read instead of trained."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def surgeries(steps: int) -> dict[str, Setting]:
    return {name: replace(setting, steps=steps) for name, setting in SURGERIES.items()}


def jobs_of(steps: int) -> list[Job]:
    """Every merge alone and with every surgery, those that take long first."""
    settings = [*reversed(surgeries(steps).values()), None]
    return [Job(name, setting) for name in MERGES for setting in settings]


def evaluate(experts: Experts, repaired: dict[Job, Outcome], steps: int) -> Outcomes:
    """Every row of the table, from the pretrained encoder to the experts."""
    config, num_tasks = experts.config, len(TASKS)
    outcomes = {"pretrained": measure(experts, [config.encoder(experts.pretrained)] * num_tasks)}
    for name in MERGES:
        outcomes[name] = repaired[Job(name)]
        for surgery, setting in surgeries(steps).items():
            outcomes[f"{name} + {surgery}"] = repaired[Job(name, setting)]
    outcomes["multi-task"] = measure(experts, [config.encoder(experts.multi_task)] * num_tasks)
    outcomes["individual"] = individual(experts)
    return outcomes


def accuracy_of(experts: Experts, state: StateDict, task: int) -> float:
    return accuracy(experts.config.encoder(state), experts.heads, experts.test, task)


def individual(experts: Experts) -> Outcome:
    return measure(experts, [experts.config.encoder(expert) for expert in experts.experts])


def table_of(outcomes: Outcomes) -> str:
    accuracies = {name: outcome.accuracy for name, outcome in outcomes.items()}
    return table(accuracies, TASKS, {"bias": {name: f"{o.final_bias:.3f}" for name, o in outcomes.items()}})


def over_seeds(outcomes: Sequence[Outcomes]) -> str:
    """One row per method: the average accuracy of the seeds and its range; the final bias, and as a share of the
    merge's own."""
    lines = [f"{f'mean of {len(outcomes)} seeds':24}  accuracy  lowest  highest   bias  of the merge's", "-" * 72]
    for name in outcomes[0]:
        accuracies = [average(of_seed[name].accuracy) for of_seed in outcomes]
        biases = [of_seed[name].final_bias for of_seed in outcomes]
        cells = f"{average(accuracies):8.1f}  {min(accuracies):6.1f}  {max(accuracies):7.1f}  {average(biases):5.3f}"
        lines.append(f"{short(name, outcomes[0]):24}  {cells}")
        merged = name.split(" + ")[0]
        if merged != name:
            ratios = [of_seed[name].final_bias / of_seed[merged].final_bias for of_seed in outcomes]
            lines[-1] += f"  {average(ratios):14.0%}"
    return "\n".join(lines)


def in_words(outcomes: Outcomes) -> str:
    averages = {name: average(outcome.accuracy) for name, outcome in outcomes.items()}
    below = {
        name: averages["individual"] - max(averages[f"{merged}{name}"] for merged in MERGES)
        for name in ("", *(f" + {surgery}" for surgery in SURGERIES))
    }
    images = SURGERIES[CLOSED_FORM].num_samples
    return (
        f"The best merge is {below['']:.1f} points below the experts, with Surgery {below[' + Surgery']:.1f}, "
        f"with SurgeryV2 {below[' + SurgeryV2']:.1f},\n"
        f"in closed form, from {images} images of each task instead of all, {below[f' + {CLOSED_FORM}']:.1f}."
    )


def time_fit(experts: Experts, surgery: str, steps: int, repaired: dict[Job, Outcome]) -> SurgeryTiming:
    setting = surgeries(steps)[surgery]
    assert isinstance(setting.rank, int)
    return time_surgery(
        experts,
        surgery,
        setting.mode,
        setting.rank,
        lam=LAM,
        steps=steps,
        ours=repaired[Job(SHOWN, setting)].seconds,
        eager_steps=EAGER_STEPS,
    )


def timing_text(timings: list[SurgeryTiming], closed_form: float) -> str:
    """`closed_form`: the seconds that one took, in one process of the same run."""
    steps, eager_steps = timings[0].steps, timings[0].eager_steps
    ratio = timings[-1].seconds / closed_form
    return "\n".join(
        [
            f"Surgery on {SHOWN}, {steps} steps of {len(TASKS)} tasks; 1 thread",
            f"  {'':30}      here  published way, from {eager_steps} steps",
            *map(str, timings),
            f"  {CLOSED_FORM:30}{closed_form:8.2f} s {'':12}{ratio:6.0f} times faster than {timings[-1].method}",
            "  Published: every step of a task merges again, and loads and runs the expert, in eager PyTorch.",
        ]
    )


def write(folder: Path, outcomes: Outcomes, timing: Timing, surgery: list[SurgeryTiming], text: list[str]) -> None:
    results = {
        "accuracy": {name: dict(zip(TASKS, o.accuracy, strict=True)) for name, o in outcomes.items()},
        "bias": {name: o.bias for name, o in outcomes.items()},
        "seconds": {name: o.seconds for name, o in outcomes.items() if o.seconds},
        "timing": asdict(timing),
        "surgery_timing": [asdict(t) for t in surgery],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "results.txt").write_text("\n\n".join(text) + "\n")


def draw(experts: Experts, outcomes: Outcomes, folder: Path) -> None:
    """Accuracy by task and on average, bias by depth, and one task's features."""
    accuracies = {name: outcome.accuracy for name, outcome in outcomes.items()}
    a_six = (experts.test.labels == 6).nonzero()[0, 0]  # upside down it is a nine
    shown = {"pretrained": "pretrained", SHOWN: SHOWN}
    shown |= {f"{SHOWN} + {name}": f"+ {name}" for name in ("Surgery", "SurgeryV2", CLOSED_FORM)}
    shown |= {"individual": "individual"}
    of_one = {label: accuracies[name] for name, label in shown.items()}
    plot_tasks(of_one, experts.test.images[:, a_six], folder / "accuracy_by_task.png")
    plot_averages(
        accuracies,
        folder / "average_accuracy.png",
        title="Eight experts in one model, and what surgery gives back",
        label="accuracy on held-out digits, average of eight tasks (%)",
    )
    biases = {label: outcomes[name].bias for name, label in shown.items() if label not in ("pretrained", "individual")}
    plot_bias(biases).savefig(folder / "bias_by_depth.png")
    features = {label: outcomes[name].features for name, label in shown.items() if label != "pretrained"}
    plot_features(features).savefig(folder / "features.png")
