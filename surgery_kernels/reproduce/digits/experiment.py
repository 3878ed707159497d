"""The experiment on scikit-learn's handwritten digits: experts, merges, surgery, and the time each takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from ...surgery import plot_bias, plot_features
from ..declared import rows, settings
from ..jobs import Job, one_thread, processes
from ..methods import DENSITY, LAM, MERGES
from ..repair import STEPS, Setting
from ..report import average, plot_averages, say, short, table
from . import ablations
from .experts import Config, Experts, load_experts
from .measure import Outcome, measure, measure_jobs
from .methods import row_of
from .plots import plot_tasks
from .tasks import TASKS
from .timing import SurgeryTiming, Timing, time_surgery, time_ties

CLOSED_FORM, BY_GRADIENT = "closed form", "SurgeryV2"
SURGERIES = {  # a rank of 52 gives Surgery as many parameters as SurgeryV2 has
    "Surgery": Setting("v1", rank=16),
    "Surgery, rank 52": Setting("v1", rank=52),
    BY_GRADIENT: Setting("v2", rank=4),  # of the full run: it takes as long as all the others together
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
    """Prints tables and timings; writes them, and the plots, beside the checkpoints.

    Args:
        full: With SurgeryV2 by gradient, and with what rank, steps and images do.
    """
    folder = out / f"digits-{config.fingerprint()}"
    if retrain:
        forget(folder)
    say(f"{len(TASKS)} tasks from scikit-learn's handwritten digits, seed {config.seed}")
    say(f"Reading checkpoints from {folder}, training those that are missing")
    with processes() as pool:
        experts = load_experts(config, folder, pool)
        repairs = surgeries(steps, full=full)
        say(f"Merging in {len(MERGES)} ways, repairing each in {len(repairs)}, {steps} steps per task")
        jobs = jobs_of(repairs)
        if full:
            jobs += [job for job in ablations.jobs(SHOWN) if job not in jobs]
        repaired = measure_jobs(pool, config, folder, jobs, adamerging_steps=steps // 2)
        free = list(pool.map(partial(row_of, config, folder, steps // 2), settings.names(from_inputs=False)))
        with one_thread():
            outcomes = evaluate(experts, repaired, repairs)
            timing = time_ties(experts.pretrained, experts.experts, density=DENSITY, lam=LAM)
            fits = time_fits(experts, repairs, repaired)
    text = [
        f"{table_of(outcomes)}\n\n{in_words(outcomes)}",
        rows.short_text(free),
        str(timing),
        timing_text(fits),
    ]
    say("\n" + "\n\n".join(text))
    if full:
        text.append(ablations.text(SHOWN, repaired))
        say("\n" + text[-1])
        ablations.plot(SHOWN, repaired, average(outcomes["individual"].accuracy), folder / "ablations.png")

    write(folder, outcomes, timing, fits, text)
    draw(experts, outcomes, folder)
    say(f"\nTables and plots: results.txt, results.json and {', '.join(sorted(p.name for p in folder.glob('*.png')))}")
    say(f"in {folder}")
    return outcomes


def forget(folder: Path) -> None:
    """Leaves nothing that would be read instead of trained."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def surgeries(steps: int, *, full: bool) -> dict[str, Setting]:
    chosen = {name: setting for name, setting in SURGERIES.items() if full or name != BY_GRADIENT}
    return {name: replace(setting, steps=steps) for name, setting in chosen.items()}


def jobs_of(repairs: Mapping[str, Setting]) -> list[Job]:
    """Every merge alone and with every repair, those that take long first."""
    settings = [*reversed(list(repairs.values())), None]
    return [Job(name, setting) for name in MERGES for setting in settings]


def evaluate(experts: Experts, repaired: Mapping[Job, Outcome], repairs: Mapping[str, Setting]) -> Outcomes:
    """Every row of the table, from the pretrained encoder to the experts."""
    config, num_tasks = experts.config, len(TASKS)
    outcomes = {"pretrained": measure(experts, [config.encoder(experts.pretrained)] * num_tasks)}
    for name in MERGES:
        outcomes[name] = repaired[Job(name)]
        for surgery, setting in repairs.items():
            outcomes[f"{name} + {surgery}"] = repaired[Job(name, setting)]
    outcomes["multi-task"] = measure(experts, [config.encoder(experts.multi_task)] * num_tasks)
    outcomes["individual"] = individual(experts)
    return outcomes


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
    """How far the best of each kind is below the experts."""
    averages = {name: average(outcome.accuracy) for name, outcome in outcomes.items()}

    def below(repair: str) -> str:
        return f"{averages['individual'] - max(averages[f'{merged}{repair}'] for merged in MERGES):.1f}"

    by_gradient = f", with SurgeryV2 {below(f' + {BY_GRADIENT}')}" if f"{SHOWN} + {BY_GRADIENT}" in outcomes else ""
    images = SURGERIES[CLOSED_FORM].num_samples
    return (
        f"The best merge is {below('')} points below the experts, with Surgery {below(' + Surgery')}{by_gradient},\n"
        f"in closed form, from {images} images of each task instead of all, {below(f' + {CLOSED_FORM}')}."
    )


def time_fits(experts: Experts, repairs: Mapping[str, Setting], repaired: Mapping[Job, Outcome]) -> list[SurgeryTiming]:
    """Surgery, SurgeryV2 if that was fitted, and the closed form, which does what SurgeryV2 does."""
    found: dict[str, SurgeryTiming] = {}
    for name, published in (("Surgery", "Surgery"), (CLOSED_FORM, BY_GRADIENT)):
        setting, ours = SURGERIES[published], repaired[Job(SHOWN, repairs[name])].cpu_seconds
        assert isinstance(setting.rank, int)
        steps = repairs[name].steps
        found[name] = time_surgery(
            experts, name, setting.mode, setting.rank, lam=LAM, steps=steps, ours=ours, eager_steps=EAGER_STEPS
        )
    if BY_GRADIENT in repairs:
        ours = repaired[Job(SHOWN, repairs[BY_GRADIENT])].cpu_seconds
        found[BY_GRADIENT] = replace(found[CLOSED_FORM], method=BY_GRADIENT, seconds=ours)
    return [found[name] for name in repairs if name in found]


def timing_text(timings: Sequence[SurgeryTiming]) -> str:
    steps, eager_steps = timings[0].steps, timings[0].eager_steps
    seconds = {timing.method: timing.seconds for timing in timings}
    lines = [
        f"Surgery on {SHOWN}, {steps} steps of {len(TASKS)} tasks; seconds of a processor",
        f"  {'':30}      here  published way, from {eager_steps} steps",
        *map(str, timings),
        "  Published: every step of a task merges again, and loads and runs the expert, in eager PyTorch.",
        "  The closed form takes no steps, and stands beside the published way of SurgeryV2.",
    ]
    if BY_GRADIENT in seconds:
        ratio = seconds[BY_GRADIENT] / seconds[CLOSED_FORM]
        lines.append(f"  It is {ratio:.0f} times faster than {BY_GRADIENT} here.")
    return "\n".join(lines)


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
    shown |= {f"{SHOWN} + {name}": f"+ {name}" for name in ("Surgery", BY_GRADIENT, CLOSED_FORM)}
    shown |= {"individual": "individual"}
    shown = {name: label for name, label in shown.items() if name in outcomes}
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
