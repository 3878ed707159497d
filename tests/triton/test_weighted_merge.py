"""Weighted means on CUDA tensors: the Triton kernels against the CPU, which tests/ops compares with the oracle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.ops.weighted_merge import INTER, Scored
from tests.cases import (
    DTYPES,
    KINDS,
    NOT_FINITE,
    SHAPES,
    assert_same,
    gaussian,
    generator,
    inputs,
    not_finite,
    option_id,
)
from tests.guards import Counted, assert_border_kept, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

ops = torch.ops.surgery_kernels
DENSITY = [0.05, 0.4, 1.0]
Tensors = list[Tensor]


def importance_of(experts: Tensors, wide: bool) -> Tensors:
    g = generator("importance", len(experts))
    dtypes = [torch.promote_types(x.dtype, torch.float32) if wide else x.dtype for x in experts]
    return [torch.rand(x.shape, generator=g).to(dtype) for x, dtype in zip(experts, dtypes, strict=True)]


def run(
    gpu: torch.device, name: str, tensors: list[Tensors], *arguments: Any, like: Tensors, shift: int = 0, **options: Any
) -> Tensors:
    """What an op fills, of tensors between borders."""
    from surgery_kernels.triton import weighted_merge

    out = [guarded(torch.zeros_like(x), gpu, shift) for x in like]
    moved = [[guarded(x, gpu, shift) for x in some] for some in tensors]
    getattr(weighted_merge, name)(*moved, *arguments, **options, out=out)
    for x in out:
        assert_border_kept(x.cpu())
    return [x.cpu() for x in out]


def check_mean(
    gpu: torch.device, bases: Tensors, experts: Tensors, num_tasks: int, wide: bool = False, **options: Any
) -> None:
    given = (importance_of(experts, wide), [1.0 + t for t in range(num_tasks)], 0.25)
    shift = options.pop("shift", 0)
    like = experts[::num_tasks]
    expected = [torch.empty_like(x) for x in like]
    ops.weighted_merge_out(bases, experts, *given, **options, out=expected)
    actual = run(gpu, "weighted_merge_out", [bases, experts, given[0]], *given[1:], like=like, shift=shift, **options)
    for x, wanted in zip(actual, expected, strict=True):
        assert_same(x, wanted, str(options))


def check_scored(
    gpu: torch.device, bases: Tensors, experts: Tensors, inter: str, drop: bool = False, shift: int = 0
) -> None:
    from surgery_kernels.triton.weighted_merge import weighted_merge_limits

    scored = Scored(bases, experts, 3, inter, "drop" if drop else "propagate")
    clipping, options = scored.clipping(0.01), {"inter": inter, "drop": drop}
    limits = scored.limits(clipping, DENSITY, [1.0, 0.5, -2.0])
    if scored.numel:
        ranks = [max(1, scored.numel - int(scored.numel * (1 - d))) for d in DENSITY]
        moved = ([guarded(x, gpu, shift) for x in some] for some in (bases, experts))
        found = weighted_merge_limits(*moved, clipping, ranks, **options)
        assert_same(found.cpu(), ops.weighted_merge_limits(bases, experts, clipping, ranks, **options), inter)
    expected = [torch.empty_like(x) for x in experts[::3]]
    scored.merge(clipping, limits, expected)
    name = "weighted_merge_scored_out"
    actual = run(gpu, name, [bases, experts], clipping, limits, like=expected, shift=shift, **options)
    for x, wanted in zip(actual, expected, strict=True):
        assert_same(x, wanted, inter)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(kind, 257, 3, dtype)
    check_mean(gpu, [base], experts, 3)
    check_mean(gpu, [], experts, 3, wide=True)
    if dtype == torch.float32:
        check_scored(gpu, [base], experts, "paper")


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_every_agreement(dtype: torch.dtype, inter: str, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, 300, 3, dtype)
    check_scored(gpu, [base] if inter == "paper" else [], [8 * x for x in experts], inter)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (20_001,)], ids=str)
def test_every_shape(shape: tuple[int, ...], gpu: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(gaussian, shape, 3, dtype)
        check_mean(gpu, [base], experts, 3, shift=1)
        check_scored(gpu, [base], experts, "paper", shift=1)


def test_several_tensors(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import weighted_merge

    kernels = [Counted(getattr(weighted_merge, name)) for name in ("_mean", "_merge_scored")]
    for kernel, name in zip(kernels, ("_mean", "_merge_scored"), strict=True):
        monkeypatch.setattr(weighted_merge, name, kernel)
    bases, experts = [], []
    for i, shape in enumerate([(5, 70), (0,), (), (4_200,), (3, 70)]):
        base, of_tensor = inputs(gaussian, shape, 3, (torch.float32, torch.bfloat16)[i % 2])
        bases.append(base)
        experts += of_tensor
    for wide in (False, True):
        check_mean(gpu, bases, experts, 3, wide=wide)
    check_scored(gpu, bases, experts, "paper")
    assert [kernel.launches for kernel in kernels] == [4, 2]  # one for each dtype


def test_nonfinite_that_is_let_through(gpu: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(gaussian, 400, 3, dtype)
        experts[1][[3, 50, 99]] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)
        for nonfinite in ("propagate", "drop"):
            check_mean(gpu, [base], experts, 3, nonfinite=nonfinite)
            check_scored(gpu, [base], experts, "paper", drop=nonfinite == "drop")


@pytest.mark.parametrize("which", NOT_FINITE)
def test_nonfinite_is_an_error(which: str, gpu: torch.device) -> None:
    bases, experts = not_finite(which)
    with pytest.raises(RuntimeError, match=f"^{re.escape(NOT_FINITE[which])}$"):
        run(
            gpu, "weighted_merge_out", [bases, experts, importance_of(experts, False)], [1.0, 1.0], like=bases,
            names=["a", "b"],
        )  # fmt: skip


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf], ids=str)
def test_importance_that_is_none(value: float, gpu: torch.device) -> None:
    for dtype in DTYPES:
        _, experts = inputs(gaussian, 600, 2, dtype)
        importance = importance_of(experts, wide=False)
        importance[1][[5, 599]] = value
        message = r"^fishers\[1\] must be finite and 0 or greater, got 2 other values in tensor 'a'$"
        with pytest.raises(RuntimeError, match=message):
            run(
                gpu, "weighted_merge_out", [[], experts, importance], [1.0, 1.0], like=experts[:1],
                names=["a"], called="fishers",
            )  # fmt: skip


ONES = [torch.ones(4), torch.ones(4)]
CLIPPING = torch.tensor([[0.0, 1.0, 1.0]] * 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "importance must be one tensor for every expert and merged tensor (2), got 1",
            lambda op, out: op.weighted_merge_out([], ONES, ONES[:1], [1.0, 1.0], out=out),
        ),
        (
            "importance must have the shape of the experts, got another",
            lambda op, out: op.weighted_merge_out([], ONES, [ONES[0], torch.ones(5)], [1.0, 1.0], out=out),
        ),
        (
            "importance must have the dtype of the experts or the one that is computed in, got another",
            lambda op, out: op.weighted_merge_out([], ONES, [x.half() for x in ONES], [1.0, 1.0], out=out),
        ),
        (
            "limits must be float64 [num_tasks, 3] on the CPU, got another dtype, shape or device",
            lambda op, out: op.weighted_merge_scored_out([], ONES, CLIPPING, CLIPPING.float(), out=out),
        ),
        (
            "limits must be of as many experts as clipping (2), got 1",
            lambda op, out: op.weighted_merge_scored_out([], ONES, CLIPPING, CLIPPING[:1], out=out),
        ),
        (
            "ranks must be one for every expert (2), got 1",
            lambda op, out: op.weighted_merge_limits([], ONES, CLIPPING, [1]),
        ),
        (
            "ranks must be in [1, 4], the number of entries, got 0",
            lambda op, out: op.weighted_merge_limits([], ONES, CLIPPING, [1, 0]),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(message: str, call: Callable[..., Any]) -> None:
    from surgery_kernels.triton import weighted_merge

    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        call(weighted_merge, [torch.ones(4)])
