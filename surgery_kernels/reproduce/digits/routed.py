"""The digits' models that keep their experts: what SMILE, Twin-Merging and WEMoE get right.

python -m surgery_kernels.reproduce.digits.routed [FOLDER]      # .cache, where the experiment's checkpoints are
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ...merging import merge_state_dicts
from ...routed import fit_by_entropy, fit_router, smile, twin_merging, wemoe
from ..jobs import one_thread
from ..methods import LAM
from ..report import say, table
from .experts import Config, Experts, load_experts
from .tasks import TASKS
from .training import accuracy, classify

LABELED = 64  # images of each task whose task the router of Twin-Merging is told
ROUTER_STEPS, ENTROPY_STEPS = 300, 300


@one_thread()
def accuracies(
    experts: Experts, *, router_steps: int = ROUTER_STEPS, entropy_steps: int = ENTROPY_STEPS
) -> dict[str, list[float]]:
    """By method, of every task; no image's task is known to a model when it runs."""
    base = experts.config.encoder(experts.pretrained).eval()
    states = dict(zip(TASKS, experts.experts, strict=True))
    unlabeled = dict(zip(TASKS, experts.test.images, strict=True))
    few = dict(zip(TASKS, experts.train.images[:, :LABELED], strict=True))

    def logits(features: Tensor, task: str) -> Tensor:
        return classify(features, experts.heads[TASKS.index(task)][None])

    merged = merge_state_dicts(experts.pretrained, experts.experts, method="task_arithmetic", lam=LAM)
    twin, mixture = twin_merging(base, states, lam=LAM), wemoe(base, states, lam=LAM)
    fit_router(twin, few, steps=router_steps, seed=experts.config.seed)
    fit_by_entropy(mixture, unlabeled, logits, steps=entropy_steps, seed=experts.config.seed)
    models: dict[str, nn.Module] = {
        "pretrained": base,
        "task arithmetic": experts.config.encoder(merged),
        "SMILE, rank 16": smile(base, states, rank=16, gate_rank=16),
        "Twin-Merging, rank 20 %": twin,
        f"WEMoE, {entropy_steps} steps": mixture,
    }
    return {name: _of_tasks(model.eval(), experts) for name, model in models.items()}


@torch.no_grad()
def _of_tasks(model: nn.Module, experts: Experts) -> list[float]:
    return [accuracy(model(experts.test.images[t]), experts.heads, experts.test, t) for t in range(len(TASKS))]


def main(folder: str = ".cache") -> None:
    config = Config()
    experts = load_experts(config, Path(folder) / f"digits-{config.fingerprint()}")
    say(table(accuracies(experts), TASKS))


if __name__ == "__main__":
    main(*sys.argv[1:])
