"""What fit takes: batches and experts of every form, tasks of any name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.cases import assert_same
from tests.encoders import samples
from tests.fits import BATCH, TASKS, Samples, fitted

pytestmark = pytest.mark.any_isa


def test_only_the_samples_in_use_are_run(merged: nn.Module, experts: dict[str, nn.Module]) -> None:
    seen = []
    experts["dtd"].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    fitted(merged, {"dtd": experts["dtd"]}, {"dtd": samples(64, 5, 3).double()}, "v2", steps=2)
    assert sum(seen) == 1 + 2 * BATCH  # one alone tells the layout


class Stream(torch.utils.data.IterableDataset):
    """Batches of three, whose number is known."""

    def __init__(self, inputs: Tensor) -> None:
        self.batches = inputs.split(3)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_every_form_of_batches(merged: nn.Module, experts: dict[str, nn.Module], mode: str) -> None:
    expert = {"dtd": experts["dtd"]}
    x = samples(10, 5, 3).double()
    expected = fitted(merged, expert, {"dtd": x}, mode)
    forms: list[Any] = [
        Samples(x),
        Stream(x),
        TensorDataset(x, torch.zeros(10)),
        [x[:7], x[7:]],
        [(x[:7], torch.zeros(7)), (x[7:], torch.zeros(3))],
        (batch for batch in x.split(3)),
        DataLoader(TensorDataset(x, torch.zeros(10)), batch_size=3),
        {"samples": x, "labels": torch.zeros(10)},
        [{"samples": x[:7]}, {"samples": x[7:]}],
    ]
    for form in forms:
        result = fitted(merged, expert, {"dtd": form}, mode)
        for actual, adapter in zip(result.adapters.parameters(), expected.adapters.parameters(), strict=True):
            assert_same(actual.detach(), adapter.detach())


def test_a_dataset_may_be_read_by_workers(merged: nn.Module, experts: dict[str, nn.Module]) -> None:
    before = torch.random.get_rng_state()
    x = samples(10, 5, 3).double()
    expected = fitted(merged, {"dtd": experts["dtd"]}, {"dtd": x}, "v2", steps=2)
    actual = fitted(merged, {"dtd": experts["dtd"]}, {"dtd": Samples(x)}, "v2", steps=2, num_workers=1)
    assert_same(actual.log.bias, expected.log.bias)
    assert_same(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_every_form_of_experts(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str
) -> None:
    expected = fitted(merged, experts, batches, mode)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    for forms in (states, {t: lambda t=t: experts[t] for t in TASKS}, {t: lambda t=t: states[t] for t in TASKS}):
        assert_same(fitted(merged, forms, batches, mode).log.bias, expected.log.bias)
    for name, tensor in merged.state_dict().items():
        assert_same(tensor, before[name])


def test_names_of_tasks_may_be_anything(merged: nn.Module, experts: dict[str, nn.Module], tmp_path: Path) -> None:
    name = "../a/b: c"
    x = samples(5, 5, 3).double()
    fitted(merged, {name: experts["dtd"]}, {name: x}, "v1", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert json.loads(next((tmp_path / "cache").glob("targets*.json")).read_text())["shape"] == [5, 12]
