"""A closed form that is stopped and resumed, and one of tasks that do not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import ClosedForm, Fit
from surgery_kernels.surgery.closed_form import solver, walk
from surgery_kernels.surgery.storage.resume import Checkpoint
from tests.cases import assert_same
from tests.encoders import CASES, Case, made, perturbed
from tests.fits import TASKS, refusal
from tests.surgery.closed_form.test_solver import solved

pytestmark = pytest.mark.any_isa


def assert_equal(result: Fit, expected: Fit) -> None:
    for x, y in zip(result.adapters.parameters(), expected.adapters.parameters(), strict=True):
        assert torch.equal(x, y)
    assert_same(result.log.bias, expected.log.bias)


def stop_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first site after so many that were written down."""
    save, done = Checkpoint.save, []

    def interrupting(self: Checkpoint, state: Any) -> None:
        if len(done) == saves:
            raise KeyboardInterrupt
        done.append(save(self, state))

    monkeypatch.setattr(Checkpoint, "save", interrupting)


@pytest.mark.parametrize("memory", [2**31, 1], ids=["together", "one-by-one"])
@pytest.mark.parametrize("saves", [0, 1, 3, 4, 6])
def test_resumed_at_any_site(
    merged: nn.Module,
    experts: dict[str, nn.Module],
    batches: dict[str, Tensor],
    memory: int,
    saves: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = solved(merged, experts, batches, holdout=batches)
    monkeypatch.setattr(solver, "MEMORY", memory)
    options: dict[str, Any] = {"checkpoint": tmp_path / "fit.pt", "holdout": batches}
    num_sites, groups = 4, 1 if memory > 1 else 3
    if saves >= num_sites * groups:
        assert_equal(solved(merged, experts, batches, **options), expected)
    else:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stop_after(saves, patched)
            solved(merged, experts, batches, **options)
    problems = []
    plain = walk.solve
    monkeypatch.setattr(walk, "solve", lambda *given: problems.append(given) or plain(*given))
    result = solved(merged, experts, batches, **options)
    assert len(problems) == max(num_sites * groups - saves, 0)
    assert_equal(result, expected)
    assert result.log.held_out is not None and expected.log.held_out is not None
    assert_same(result.log.held_out, expected.log.held_out)
    assert_equal(solved(merged, experts, batches, **{**options, "resume": False}), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_model_on_disk_and_resumed(
    case: Callable[[], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = made(case)
    experts = {task: perturbed(it.model, seed, 0.05) for seed, task in enumerate(TASKS[:2])}
    given = it.model, experts, dict.fromkeys(experts, it.inputs)
    expected = solved(*given, batch_size=4)
    options: dict[str, Any] = {"batch_size": 4, "cache": tmp_path / "cache", "checkpoint": tmp_path / "fit.pt"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(1, patched)
        solved(*given, **options)
    result = solved(*given, **options)
    torch.testing.assert_close(result.log.bias, expected.log.bias, rtol=1e-3, atol=1e-6)
    assert not list((tmp_path / "cache").glob("streams-*"))


def test_a_checkpoint_of_another_fit(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    solved(merged, experts, batches, checkpoint=path)
    others: list[tuple[str, dict[str, Any]]] = [
        ("rank=2, got 3", {"rank": 2}),
        ("ridge=0.5, got 0.01", {"solver": ClosedForm(ridge=0.5)}),
        ("unread_weight=1.0, got 0.01", {"solver": ClosedForm(unread_weight=1.0)}),
        ("row_weights=True, got False", {"solver": ClosedForm(row_weights=lambda x: torch.ones(x.shape[:2]))}),
        ("samples={'mnist': 2, ", {"batches": {**batches, "mnist": batches["mnist"][:2]}}),
        ("experts['cars']='", {"experts": {**experts, "cars": perturbed(merged, 9)}}),
        ("merged='", {"merged": perturbed(merged, 9)}),
    ]
    for wanted, changed in others:
        given = {"merged": merged, "experts": experts, "batches": batches, "checkpoint": path, **changed}
        message = refusal(lambda given=given: solved(**given))
        assert message.startswith(f"checkpoint must be of a fit with {wanted}"), message


def test_experts_of_tasks_that_are_done_are_not_run(
    merged: nn.Module,
    experts: dict[str, nn.Module],
    batches: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solver, "MEMORY", 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(5, patched)
        solved(merged, experts, batches, checkpoint=tmp_path / "fit.pt")
    ran = set()
    for task, expert in experts.items():
        expert.register_forward_hook(lambda *_, task=task: ran.add(task))
    solved(merged, experts, batches, checkpoint=tmp_path / "fit.pt")
    assert ran == set(TASKS[1:])
