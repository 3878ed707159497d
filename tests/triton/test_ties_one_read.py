"""ties_merge on CUDA tensors where it reads them once: assumed limits, whose wrong decisions are corrected."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import (
    SEMANTICS,
    assert_same,
    bits,
    cancelling,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    option_id,
    rows,
    sparse,
    weights_of,
)
from tests.guards import Counted, assert_border_kept, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu", "reading_once")]

SIZE = 601
OPTIONS: list[dict[str, Any]] = [
    {"lam": 0.3},
    {"reduce": "max", "elect": "count"},
    {"semantics": "mergekit", "weights": weights_of(3), "lam": -0.7},
    {"semantics": "exact", "elect": "none", "min_count": 2},
    {"semantics": "peft", "weights": weights_of(3)},
    {"semantics": "exact", "elect": "none", "scales": torch.tensor([[0.5, 2.0, 1.5]]).double()},
]


@pytest.fixture
def reading_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From any size on; with large blocks, which the interpreter goes through faster."""
    from surgery_kernels.triton import ties_one_read, trim

    monkeypatch.setattr(trim, "DIRECT", 200)
    monkeypatch.setattr(ties_one_read, "ONE_READ_FROM", 0)
    monkeypatch.setattr(ties_one_read, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(ties_one_read, "TILE", 512)


@pytest.fixture
def corrected(monkeypatch: pytest.MonkeyPatch) -> Counted:
    from surgery_kernels.triton import ties_one_read

    counted = Counted(ties_one_read._correct)
    monkeypatch.setattr(ties_one_read, "_correct", counted)
    return counted


def merge(base: Tensor | None, experts: list[Tensor], gpu: torch.device, **options: Any) -> Tensor:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    out = guarded(torch.full_like(experts[0], math.nan), gpu)
    bases = [] if base is None else [guarded(base, gpu)]
    ties_merge_out(bases, [guarded(expert, gpu) for expert in experts], **options, out=[out])
    assert_border_kept(out)
    return out.cpu()


def check(base: Tensor | None, experts: list[Tensor], gpu: torch.device, **options: Any) -> None:
    options = {"density": densities_of(len(experts)), **options}
    bases = [] if base is None else [base]
    expected = torch.empty_like(experts[0])
    torch.ops.surgery_kernels.ties_merge_out(bases, experts, **options, out=[expected])
    assert torch.equal(bits(merge(base, experts, gpu, **options)), bits(expected)), str(options)


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_the_bits_of_two_reads(options: dict[str, Any], gpu: torch.device, corrected: Counted) -> None:
    for kind, dtype in ((gaussian, torch.float32), (sparse, torch.float64)):
        check(*inputs(kind, SIZE, 3, dtype), gpu, **options)
    assert corrected.launches == 2


@pytest.mark.parametrize("kind", [grid, equal, rows], ids=option_id)
def test_ties_and_ranges_that_miss(kind: Any, gpu: torch.device) -> None:
    base, experts = inputs(kind, SIZE, 3, torch.float32)
    for semantics in SEMANTICS:
        check(base, experts, gpu, semantics=semantics, density=[0.2, 0.9, 0.55])


@pytest.mark.parametrize("way", ["range below", "range above", "wrong middle", "lists that are too short"])
def test_a_guess_that_is_wrong(way: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import ties_one_read, trim_lists
    from surgery_kernels.triton.trim_rounds import FIRST, LAST, THRESHOLD

    found = ties_one_read.guess_from_sample

    def misled(scope: Any, state: Tensor, *rest: Any) -> Tensor:
        guess = found(scope, state, *rest)
        span = guess[:, LAST.value] - guess[:, FIRST.value] + 1
        if way == "wrong middle":
            guess[:, THRESHOLD.value] = guess[:, LAST.value]
        elif way.startswith("range"):
            by = torch.where(span > 0, span if way == "range above" else -span, 0)
            for column in (FIRST, THRESHOLD, LAST):
                guess[:, column.value] += by
            for column in (THRESHOLD, LAST):
                state[:, column.value] += by
        return guess

    monkeypatch.setattr(ties_one_read, "guess_from_sample", misled)
    if way == "lists that are too short":
        monkeypatch.setattr(trim_lists, "SHARE", 1000)
    check(*inputs(leaning_down, SIZE, 4, torch.float32), gpu)
    check(*inputs(gaussian, SIZE, 4, torch.float32), gpu, semantics="mergekit")


@pytest.mark.parametrize("room", [0, 7, 4096])
def test_chunks_with_more_near_elements_than_fit(room: int, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import ties_one_read

    monkeypatch.setattr(ties_one_read, "ROOM", room)
    for kind in (gaussian, leaning_up):
        check(*inputs(kind, SIZE, 3, torch.float32), gpu)


@pytest.mark.parametrize("kind", [cancelling, leaning_down], ids=option_id)
def test_draws_take_the_sign_of_the_scope(kind: Any, gpu: torch.device) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    bases, experts, by_tensor = [], [], []
    for size in (4_200, 0, 30, 300):
        base, of_tensor = inputs(kind, size, 4, torch.float32)
        bases.append(base)
        by_tensor.append(of_tensor)
        experts += [expert.to(gpu) for expert in of_tensor]
    out = [torch.full_like(base, math.nan, device=gpu) for base in bases]
    ties_merge_out([base.to(gpu) for base in bases], experts, [0.3] * 4, out=out)
    expected = reference.scope_merge(bases, list(zip(*by_tensor, strict=True)), density=0.3)
    for merged, wanted in zip(out, expected, strict=True):
        assert_same(merged.cpu(), wanted)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_several_dtypes_are_one_scope(semantics: str, gpu: torch.device, corrected: Counted) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    bases, experts, by_tensor = [], [], []
    for i, size in enumerate((300, 2_100, 20, 65)):
        base, of_tensor = inputs(grid, size, 3, (torch.bfloat16, torch.float32, torch.float16)[i % 3])
        bases.append(base)
        by_tensor.append(of_tensor)
        experts += [expert.to(gpu) for expert in of_tensor]
    out = [torch.full_like(base, math.nan, device=gpu) for base in bases]
    ties_merge_out([base.to(gpu) for base in bases], experts, [0.3] * 3, semantics=semantics, out=out)
    expected = reference.scope_merge(bases, list(zip(*by_tensor, strict=True)), density=0.3, semantics=semantics)
    for merged, wanted in zip(out, expected, strict=True):
        assert_same(merged.cpu(), wanted)
    assert corrected.launches == 3


@pytest.mark.parametrize("num_tasks", [1, 32])
def test_as_many_experts_as_have_a_bit(num_tasks: int, gpu: torch.device, corrected: Counted) -> None:
    from surgery_kernels.triton.addresses import Scope
    from surgery_kernels.triton.ties_one_read import reads_once

    base, experts = inputs(gaussian, 201, num_tasks, torch.float32)
    check(base, experts, gpu)
    assert corrected.launches == 1
    for more in (0, 1):
        assert reads_once(Scope([], [base.to(gpu)] * (32 + more), 32 + more)) == (more == 0)


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_nonfinite_values(nonfinite: str, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, SIZE, 3, torch.float32)
    experts[0][::50] = math.nan
    experts[1][7::60] = math.inf
    experts[2][7::30] = -math.inf
    for semantics in SEMANTICS:
        check(base, experts, gpu, density=[0.2, 0.02, 0.5], semantics=semantics, nonfinite=nonfinite)


def test_what_is_not_finite_is_named(gpu: torch.device) -> None:
    for place in (0, SIZE - 1):  # in a whole block, and behind the last one
        base, experts = inputs(gaussian, SIZE, 2, torch.float32)
        experts[1][place] = math.inf
        message = "experts[1] must be finite, got 1 NaN or infinite values"
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            merge(base, experts, gpu, density=[0.2] * 2)


def test_inputs_are_read_once(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the listed elements: all others are something else behind the first read."""
    from surgery_kernels.triton import ties_one_read

    base, experts = inputs(gaussian, 2_048, 3, torch.float32)
    expected = reference.ties_merge(base, experts, density=0.2)
    moved = [x.clone().to(gpu) for x in (base, *experts)]
    take_lists = ties_one_read.take_lists
    near = []

    class Kept(ties_one_read.Near):
        def __init__(self, *arguments: Tensor) -> None:
            super().__init__(*arguments)
            near.append(self)

    def taken(*arguments: Any) -> None:
        take_lists(*arguments)
        listed = near[0].entries[0, : int(near[0].counts[0])] >> 32
        others = torch.ones(2_048, dtype=torch.bool, device=gpu).index_fill_(0, listed, False)
        assert 0 < len(listed) < 1_024
        for x in moved:
            x[others] = 1e9

    monkeypatch.setattr(ties_one_read, "Near", Kept)
    monkeypatch.setattr(ties_one_read, "take_lists", taken)
    out = torch.empty_like(moved[0])
    from surgery_kernels.triton.ties_merge import ties_merge_out

    ties_merge_out(moved[:1], moved[1:], [0.2] * 3, out=[out])
    assert_same(out.cpu(), expected)


def test_chosen_by_size(gpu: torch.device, corrected: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import ties_one_read

    base, experts = inputs(gaussian, 1_024, 3, torch.float32)
    monkeypatch.setattr(ties_one_read, "ONE_READ_FROM", 4 * base.nbytes)
    check(base, experts, gpu)
    assert corrected.launches == 1
    monkeypatch.setattr(ties_one_read, "ONE_READ_FROM", 4 * base.nbytes + 1)
    check(base, experts, gpu)
    narrow = [x.bfloat16() for x in (base, *experts)]
    monkeypatch.setattr(ties_one_read, "ONE_READ_FROM", 1)
    check(narrow[0], narrow[1:], gpu)  # their bytes do not count
    for options in (
        {"semantics": "mergekit", "rescale": True},
        {"keep_density": [0.5] * 3},
        {"upper": torch.ones(3)},
        {"thresholds": torch.ones(3)},
        {"density": [1.0] * 3},  # nothing to find
    ):
        check(base, experts, gpu, **options)
    assert corrected.launches == 1
