"""Cross-entropy on labelled inputs; the entropy of unlabelled ones is among the tests of AdaMerging."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import cross_entropy_objective
from tests.cases import generator

pytestmark = pytest.mark.any_isa

INPUTS = {task: torch.randn(12, 6, generator=generator(task)) for task in ("even", "odd")}
LABELS = {"even": torch.arange(12) % 4, "odd": (torch.arange(12, dtype=torch.int32) + 1) % 4}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 4).eval()


def test_cross_entropy_is_that_of_the_labels() -> None:
    """Of few inputs all are in every batch; of more, those that were drawn go with their labels."""
    model = network()
    state = {name: x + 1 for name, x in model.state_dict().items()}
    expected = sum(
        nn.functional.cross_entropy(functional_call(model, state, (INPUTS[task],)), LABELS[task].long())
        for task in INPUTS
    )
    objective = cross_entropy_objective(model, INPUTS, LABELS)
    torch.testing.assert_close(objective(state, 0), expected)
    torch.testing.assert_close(objective(state, 1), expected)
    one = cross_entropy_objective(model, {"even": INPUTS["even"]}, {"even": LABELS["even"]}, batch_size=1, seed=3)
    of_each = nn.functional.cross_entropy(
        functional_call(model, state, (INPUTS["even"],)), LABELS["even"], reduction="none"
    )
    values = [one(state, step).item() for step in range(20)]
    assert all((of_each - value).abs().min() < 1e-5 for value in values) and len(set(values)) > 3


def test_few_shots_are_learned() -> None:
    base = network().state_dict()
    experts = [
        {name: x + torch.randn(x.shape, generator=generator(t, name)) for name, x in base.items()} for t in range(3)
    ]
    objective = cross_entropy_objective(network(), INPUTS, LABELS)
    options: dict[str, Any] = {"method": "atlas", "groups": 4, "steps": 40, "lr": 0.1, "schedule": "cosine"}
    merged = merge_state_dicts(base, experts, objective=objective, **options)
    assert objective(merged, 0) < objective(base, 0) - 0.3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"even": LABELS["even"]}, "labels must be of the tasks of inputs, even, odd, got even"),
        ({**LABELS, "odd": torch.zeros(11)}, "labels['odd'] must have shape (12,), got (11,)"),
    ],
    ids=["tasks", "shape"],
)
def test_refused(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cross_entropy_objective(network(), INPUTS, labels)
