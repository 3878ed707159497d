"""Every method on the digits: those that are declared, and the repairs of one merge."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...merging import METHODS, Objective, diagonal_fisher, gram_matrices, merge_state_dicts
from ...surgery import SurgeryModel, regmean_plus_plus
from ..declared import rows, settings
from ..declared.published import order_text
from ..declared.rows import Row
from ..jobs import one_thread, progress_bar
from ..repair import Setting
from ..report import average, plot_averages, say
from .experts import Config, Experts, load_experts
from .measure import accuracies, experts_at, measure, repaired_by
from .merges import entropy, merge
from .tasks import TASKS
from .training import classify

NUM_IMAGES = 64  # unlabeled, of each task, for what looks at inputs once
STEPS = 500  # of what learns, a batch of each task in each
START = "task arithmetic"  # of the repairs

REGMEAN_PLUS_PLUS = "regmean_plus_plus"  # starts from the experts' mean
REPAIRS = {
    "calibrate": Setting("calibrate", num_samples=NUM_IMAGES),
    "calibrate_residual": Setting("calibrate", num_samples=NUM_IMAGES, residual=True),
    "surgery": Setting("v1", rank=16),
    "closed_form": Setting("v2", rank=16, num_samples=NUM_IMAGES, solver="closed_form"),
}

# Why methods come out of the published order here, where the tasks conflict by construction.
REASONS = {
    "wudi": "it stays near the sum of all task vectors, which is too long where they are almost orthogonal",
    "consensus_ta": "two experts or more need five of six entries here: the mask spares little, and what is left is "
    "task arithmetic at another scale",
    "regmean": "it looks at inputs, and one matrix that answers all tasks' inputs is nearer to conflicting experts "
    "than a mean of theirs",
    "surgery": "it is told the task, and where tasks conflict that is worth more than any single model",
}


@dataclass(frozen=True)
class DigitsInputs:
    """What unlabeled test images say, as in the papers."""

    experts: Experts
    steps: int = STEPS

    @cached_property
    def images(self) -> Tensor:
        return self.experts.test.images[:, :NUM_IMAGES]

    def objective(self) -> Objective:
        return entropy(self.experts)

    def fishers(self) -> list[Mapping[str, Tensor]]:
        found: list[Mapping[str, Tensor]] = []
        for task, (expert, images) in enumerate(zip(self.experts.experts, self.images, strict=True)):
            head = self.experts.heads[task][None]
            encoder = self.experts.config.encoder(expert).eval()
            found.append(diagonal_fisher(encoder, images, partial(classify, heads=head), seed=task))
        return found

    def grams(self) -> list[Mapping[str, Tensor]]:
        encoders = [self.experts.config.encoder(expert).eval() for expert in self.experts.experts]
        return [gram_matrices(encoder, images) for encoder, images in zip(encoders, self.images, strict=True)]


def names() -> list[str]:
    return [*settings.names(from_inputs=True), REGMEAN_PLUS_PLUS, *REPAIRS]


def row_of(config: Config, folder: Path, steps: int, name: str) -> Row:
    """A function of its arguments alone."""
    experts = experts_at(config, folder)
    if name not in METHODS:
        return row_of_repair(experts, name, steps)
    of_models = partial(accuracies, experts)
    return rows.row(experts.pretrained, experts.experts, of_models, name, DigitsInputs(experts, steps))


def row_of_repair(experts: Experts, name: str, steps: int) -> Row:
    start = time.process_time()
    model = repaired(experts, name, 2 * steps)
    seconds = time.process_time() - start
    found = measure(experts, [model] * len(TASKS)).accuracy
    if isinstance(model, SurgeryModel):
        model.detach()
    return Row(name, found, seconds, rows.nbytes_held(lambda: repaired(experts, name, rows.FEW_STEPS)), 0)


def repaired(experts: Experts, name: str, steps: int) -> nn.Module:
    config = experts.config
    if name == REGMEAN_PLUS_PLUS:
        mean = config.encoder(merge(experts, "weight averaging"))
        images = dict(zip(TASKS, experts.test.images[:, :NUM_IMAGES], strict=True))
        return config.encoder(regmean_plus_plus(mean, dict(zip(TASKS, experts.experts, strict=True)), images))
    return repaired_by(experts, config.encoder(merge(experts, START)), replace(REPAIRS[name], steps=steps))


def run(config: Config, out: Path, pool: Executor, wanted: Sequence[str], *, steps: int = 2 * STEPS) -> list[Row]:
    """Prints the table of these methods, and where it differs from what is published; writes both and a plot."""
    folder = out / f"digits-{config.fingerprint()}"
    say(f"{len(wanted)} methods on {len(TASKS)} tasks from scikit-learn's handwritten digits, seed {config.seed}")
    experts = load_experts(config, folder, pool)
    found = _side_by_side(pool, partial(row_of, config, folder, steps // 2), wanted)
    averages = {row.method: average(row.accuracy) for row in found}
    text = [rows.whole_text(found, TASKS), facts(experts), order_text(averages, REASONS)]
    say("\n" + "\n\n".join(text))
    (folder / "methods.txt").write_text("\n\n".join(text) + "\n")
    (folder / "methods.json").write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    plot_averages(
        {rows.starred(row): row.accuracy for row in found},
        folder / "methods.png",
        title="Every method on the digits",
        label="accuracy on held-out digits, average of eight tasks (%)",
    )
    say(f"\nmethods.txt, methods.json and methods.png are in {folder}")
    return found


def _side_by_side(pool: Executor, work: partial[Row], wanted: Sequence[str]) -> list[Row]:
    # those that learn take longest
    order = sorted(wanted, key=lambda name: name in METHODS and not METHODS[name].from_inputs)
    with progress_bar("methods", len(wanted), "method") as progress:
        futures: dict[str, Future[Row]] = {}
        for name in order:
            futures[name] = pool.submit(work, name)
            futures[name].add_done_callback(lambda _: progress.update())
        try:
            return [futures[name].result() for name in wanted]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@one_thread()
def facts(experts: Experts) -> str:
    """How much the tasks conflict, in numbers."""
    base = experts.pretrained
    vectors = [torch.cat([(expert[name] - base[name]).flatten() for name in base]) for expert in experts.experts]
    units = torch.stack(vectors) / torch.stack(vectors).norm(dim=1, keepdim=True)
    cosine = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)].mean()
    at_one = merge_state_dicts(base, experts.experts, method="task_arithmetic", lam=1.0)
    of_sum = average(accuracies(experts, [at_one] * len(TASKS)))
    return (
        f"The tasks conflict by construction: their task vectors have a mean cosine of {cosine:.2f}, and the sum of\n"
        f"all of them at scale 1 comes to {of_sum:.1f} %. published: the average of eight tasks on CLIP ViT-B/32."
    )
