"""Rows of declared methods, their settings, and the published order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import METHODS
from surgery_kernels.reproduce.declared import rows, settings
from surgery_kernels.reproduce.declared.published import APART, PUBLISHED, disordered, num_ordered, order_text

pytestmark = pytest.mark.any_isa


def models(num_tasks: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    base, *experts = (
        {
            "layers.0.weight": torch.randn(64, 64, generator=generator),
            "layers.1.bias": torch.randn(64, generator=generator),
        }
        for _ in range(num_tasks + 1)
    )
    return base, experts


class Known:
    """Inputs that say nothing special."""

    steps = 3

    def objective(self) -> Any:
        return lambda merged, step: sum(x.square().mean() for x in merged.values())

    def fishers(self) -> Any:
        return [{name: torch.ones_like(x) for name, x in expert.items()} for expert in models()[1]]

    def grams(self) -> Any:
        return [{"layers.0.weight": torch.eye(64)} for _ in models()[1]]


def of_first(states: list[dict[str, Tensor]]) -> list[float]:
    return [float(state["layers.0.weight"][0, 0]) for state in states]


@pytest.mark.parametrize("name", settings.names(from_inputs=True))
def test_every_declaration_has_a_row(name: str) -> None:
    """Without a line of its own here, newly declared ones too."""
    base, experts = models()
    found = rows.row(base, experts, of_first, name, Known())
    size = 4 * (64 * 64 + 64)
    assert found.method == name and len(found.accuracy) == 3 and found.seconds > 0
    assert found.in_turn == (METHODS[name].num_experts[1] is not None)
    assert found.nbytes_held >= size  # its result at the least
    assert found.nbytes % size == 0 and found.nbytes >= 4 * size
    if not found.in_turn:
        options = settings.options(name, 3, Known())
        for task, value in enumerate(found.accuracy):
            given = options | ({"task": task} if settings.of_each(METHODS[name]) else {})
            merged = merge_state_dicts(base, experts, method=name, progress=False, **given)
            assert value == merged["layers.0.weight"][0, 0].item()


def test_names_leave_out_what_does_not_merge_or_needs_what_is_not_there() -> None:
    free, known = settings.names(from_inputs=False), settings.names(from_inputs=True)
    assert not {"passthrough", "wise_ft", "adamerging"} & set(free) and "ties" in free
    assert {"adamerging", "atlas", "fisher", "regmean"} <= set(known) and set(free) < set(known)


def test_memory_is_counted() -> None:
    def call() -> Tensor:
        twice = torch.ones(1 << 20) + 1  # of two at a time
        del twice
        return torch.ones(1 << 10)

    found = rows.nbytes_held(call)
    assert 8 << 20 <= found < (8 << 20) + 10_000


def row(name: str, accuracy: float, **more: Any) -> rows.Row:
    return rows.Row(name, [accuracy, accuracy], 0.25, 3_000_000, 12_000_000, **more)


def test_texts() -> None:
    found = [row("ties", 70.0), row("slerp", 60.0, in_turn=True)]
    short = rows.short_text(found).splitlines()
    assert [line.split() for line in short[2:4]] == [
        ["ties", "70.0", "250.0", "ms", "12.0", "MB"],
        ["slerp", "*", "60.0", "250.0", "ms", "12.0", "MB"],
    ]
    whole = rows.whole_text(found, ["a", "b"]).splitlines()
    assert whole[0].split() == [
        "accuracy",
        "in",
        "%",
        "a",
        "b",
        "average",
        "ms",
        "MB",
        "held",
        "MB",
        "read",
        "published",
    ]
    assert whole[2].split() == ["ties", "70.0", "70.0", "70.0", "250", "3.0", "12.0", "72.4"]
    assert whole[3].split() == ["slerp", "*", "60.0", "60.0", "60.0", "250", "3.0", "12.0"]
    assert short[-1] == whole[-1] and "one expert after the other" in short[-1]
    assert len(rows.whole_text(found[:1], ["a", "b"]).splitlines()) == 3


def test_order_is_held_against_the_published_one() -> None:
    assert PUBLISHED["ties"] - PUBLISHED["regmean"] < APART < PUBLISHED["wudi"] - PUBLISHED["ties"]
    averages = {"ties": 70.0, "regmean": 75.0, "wudi": 60.0, "emr": 80.0, "slerp": 1.0}
    assert disordered(averages) == [("ties", "wudi"), ("regmean", "wudi")]
    assert num_ordered(averages) == 5
    lines = order_text(averages, {"wudi": "because"}).splitlines()
    assert lines == [
        "The published order holds in 3 of 5 pairs that are 2 points apart there.",
        "  wudi is below ties, regmean",
        "    because",
    ]
    averages |= {"pcb": 71.0}  # what one method explains is not told of another
    assert order_text(averages, {}).splitlines()[1:] == ["  wudi is below ties, regmean, pcb", "  regmean is above pcb"]
    assert max(map(len, order_text(averages, {"wudi": "long " * 50}).splitlines())) <= 110
    assert "holds in 1 of 1 pairs" in order_text({"ties": 1.0, "emr": 2.0}, {})
