"""fit from the closed form on: steps that help are kept, task by task, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import ClosedForm, Fit, attach, fit, representation_bias
from tests.cases import assert_same
from tests.encoders import samples
from tests.fits import TASKS

pytestmark = pytest.mark.any_isa


def refined(merged: nn.Module, experts: Any, batches: Any, mode: str = "v2", **options: Any) -> Fit:
    defaults = {"solver": "closed_form+gradient", "rank": 3, "batch_size": 8, "steps": 20, "lr": 3e-4}
    return fit(merged, experts, batches, mode, progress=False, **{**defaults, **options})


def of_task(result: Fit, t: int) -> list[Tensor]:
    return [parameter[t].detach() for parameter in result.adapters.parameters()]


def objective(merged: nn.Module, result: Fit, experts: Any, batches: Any) -> list[float]:
    """Of every task the bias of the samples, summed over the sites of the adapters."""
    sums = []
    with attach(merged, result.adapters) as surgery:
        for task in TASKS:
            bias = representation_bias(surgery, experts[task], batches[task], task=task)
            sums.append(sum(bias[site] for site in result.adapters.sites))
    return sums


@pytest.mark.parametrize("rank", [3, "full"])
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_steps_that_help_are_kept(
    merged: nn.Module, experts: Any, batches: dict[str, Tensor], mode: str, rank: int | str
) -> None:
    start = fit(merged, experts, batches, mode, solver="closed_form", rank=rank, batch_size=8, progress=False)
    result = refined(merged, experts, batches, mode, rank=rank)
    log = result.log
    assert result.adapters.kind == "linear" and log.kept is not None and "gradient" in log.kept
    assert log.bias.shape == (20, 3, len(result.adapters.sites)) and log.held_out is None
    assert log.closed_form is not None
    assert_same(log.closed_form, start.log.bias)
    before, after = (objective(merged, x, experts, batches) for x in (start, result))
    for t, kept in enumerate(log.kept):
        same = all(torch.equal(x, y) for x, y in zip(of_task(result, t), of_task(start, t), strict=True))
        assert same == (kept == "closed_form")
        assert after[t] < before[t] or kept == "closed_form"


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_steps_that_do_harm_are_not(merged: nn.Module, experts: Any, batches: dict[str, Tensor], mode: str) -> None:
    start = fit(merged, experts, batches, mode, solver="closed_form", rank=3, batch_size=8, progress=False)
    result = refined(merged, experts, batches, mode, lr=5.0, steps=3)
    assert result.log.kept == ("closed_form",) * 3
    for x, y in zip(result.adapters.parameters(), start.adapters.parameters(), strict=True):
        assert torch.equal(x, y) and x.requires_grad


def test_samples_held_out_decide(merged: nn.Module, experts: Any) -> None:
    """One sample is learned by heart: what it lowers rises elsewhere."""
    batches = {task: samples(2, 5, 3, seed=t).double() for t, task in enumerate(TASKS)}
    others = {task: samples(40, 5, 3, seed=9 + t).double() for t, task in enumerate(TASKS)}
    options: dict[str, Any] = {"rank": 12, "steps": 60, "lr": 3e-3}
    seen = refined(merged, experts, batches, **options)
    told = refined(merged, experts, batches, holdout={task: iter(x.split(7)) for task, x in others.items()}, **options)
    assert seen.log.kept == ("gradient",) * 3
    assert told.log.kept is not None and told.log.held_out is not None
    start = fit(merged, experts, batches, "v2", solver="closed_form", rank=12, batch_size=8, progress=False)
    better = [
        moved < closed
        for moved, closed in zip(*(objective(merged, x, experts, others) for x in (seen, start)), strict=True)
    ]
    assert [kept == "gradient" for kept in told.log.kept] == better and not all(better)
    torch.testing.assert_close(
        told.log.held_out[1].sum(1), torch.tensor(objective(merged, told, experts, others)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_resumed(merged: nn.Module, experts: Any, batches: dict[str, Tensor], mode: str, tmp_path: Path) -> None:
    expected = refined(merged, experts, batches, mode)
    options: dict[str, Any] = {"checkpoint": tmp_path / "fit.pt", "checkpoint_every": 4}
    refined(merged, experts, batches, mode, **{**options, "steps": 12})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.pt", "fit.pt.closed_form"]
    assert torch.load(tmp_path / "fit.pt")["step"] == 12
    result = refined(merged, experts, batches, mode, **options)
    assert_same(result.log.bias, expected.log.bias)
    for x, y in zip(result.adapters.parameters(), expected.adapters.parameters(), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with start=None, got 'closed_form'$"):
        fit(merged, experts, batches, mode, rank=3, batch_size=8, steps=20, lr=3e-4, progress=False, **options)


def test_options_of_the_closed_form_and_of_the_steps(merged: nn.Module, experts: Any, batches: Any) -> None:
    how = ClosedForm(ridge=0.3, refine=True)
    result = refined(merged, experts, batches, solver=how, legacy_zero_grad=True, detach_layers=True, seed=3, steps=2)
    start = fit(merged, experts, batches, "v2", solver=ClosedForm(ridge=0.3), rank=3, batch_size=8, progress=False)
    assert result.log.closed_form is not None
    assert_same(result.log.closed_form, start.log.bias)
