"""TIES on CUDA tensors: the Triton kernels against the oracle and against the bits of the CPU."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import (
    DTYPES,
    SHAPES,
    assert_same,
    bits,
    cancelling,
    denormal,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    large,
    leaning_down,
    leaning_up,
    merge_options,
    option_id,
    sparse,
    split_options,
    weights_of,
    with_weights,
)
from tests.guards import Counted, assert_border_kept, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

FEW = [gaussian, sparse, leaning_up, leaning_down, cancelling, large, denormal]


def merge(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> Tensor:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    out = guarded(torch.full_like(experts[0], math.nan), gpu, shift)
    bases = [] if base is None else [guarded(base, gpu, shift)]
    options.setdefault("density", [0.2] * len(experts))
    ties_merge_out(bases, [guarded(expert, gpu, shift) for expert in experts], **options, out=[out])
    assert_border_kept(out)
    return out.cpu()


def check(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> None:
    expected = reference.ties_merge(base, experts, **options)
    assert_same(merge(gpu, base, experts, shift, **options), expected, str(options))


def split(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> Tensor:
    from surgery_kernels.triton.ties_merge import ties_split

    base = None if base is None else guarded(base, gpu, shift)
    return ties_split(base, [guarded(expert, gpu, shift) for expert in experts], **options).cpu()


@pytest.mark.parametrize("half", [0, 2])
@pytest.mark.parametrize("options", merge_options(), ids=option_id)
def test_every_option(options: dict[str, Any], half: int, gpu: torch.device) -> None:
    place = merge_options().index(options) + half
    dtype = DTYPES[place % 4]
    # the oracle's L1 norms are exact; a float64 sum of float64 numbers is not
    kind = sparse if options.get("rescale") and dtype == torch.float64 else FEW[place % len(FEW)]
    base, experts = inputs(kind, 257, 4, dtype)
    options = {"density": densities_of(4), "lam": -0.3, **with_weights(options, 4)}
    check(gpu, base if place % 3 else None, experts, **options)


@pytest.mark.parametrize("half", [0, 2])
@pytest.mark.parametrize("options", split_options(), ids=option_id)
def test_every_option_of_the_split(options: dict[str, Any], half: int, gpu: torch.device) -> None:
    place = split_options().index(options) + half
    dtype = DTYPES[place % 4]
    kind = sparse if options.get("rescale") and dtype == torch.float64 else FEW[place % len(FEW)]
    base, experts = inputs(kind, (64, 257)[place % 2], 4, dtype)
    options = {"density": densities_of(4), **with_weights(options, 4)}
    base = base if place % 3 else None
    assert_same(split(gpu, base, experts, **options), reference.ties_split(base, experts, **options), str(options))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], gpu: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(gaussian, shape, 2, dtype)
        check(gpu, base, experts, density=[0.2] * 2, lam=0.3)
        check(gpu, None, experts, shift=1, density=[0.5] * 2, semantics="mergekit")


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 20, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    for dtype, semantics in ((torch.float32, "paper"), (torch.bfloat16, "peft")):
        base, experts = inputs(gaussian, 65, num_tasks, dtype)
        check(gpu, base, experts, density=densities_of(num_tasks), semantics=semantics)


def test_the_bits_of_the_cpu(gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 4_200, 5, dtype)
        for options in (
            {"reduce": "mean", "lam": 0.3},
            {"semantics": "mergekit", "weights": weights_of(5), "lam": 0.3},
            {"semantics": "peft", "weights": weights_of(5), "elect": "count"},
        ):
            expected = torch.ops.surgery_kernels.ties_merge(base, experts, densities_of(5), **options)
            merged = merge(gpu, base, experts, density=densities_of(5), **options)
            assert torch.equal(bits(merged), bits(expected))


@pytest.mark.parametrize("weights", [[0.5, -0.4999999, 0.0], [1e-8, 3.0, -1e4], [0.1, 0.1, 0.1], [0.3, -0.3, 0.0]])
def test_weights_that_round_or_cancel(weights: list[float], gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 100, 3, dtype)
        for elect in ("sum", "none"):
            check(gpu, base, experts, density=[0.9] * 3, semantics="mergekit", weights=weights, elect=elect)


@pytest.mark.parametrize("kind", [cancelling, leaning_up, leaning_down], ids=option_id)
def test_draws_take_the_sign_of_the_whole_scope(kind: Any, gpu: torch.device) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    for reduce in ("mean", "max"):
        bases, experts, rows = [], [], []
        for size in (4_200, 0, 30, 300):
            base, of_tensor = inputs(kind, size, 4, torch.float32)
            bases.append(base)
            rows.append(of_tensor)
            experts += [expert.to(gpu) for expert in of_tensor]
        out = [torch.full_like(base, math.nan, device=gpu) for base in bases]
        ties_merge_out([base.to(gpu) for base in bases], experts, [0.6] * 4, reduce=reduce, out=out)
        expected = reference.scope_merge(bases, list(zip(*rows, strict=True)), density=0.6, reduce=reduce)
        for merged, wanted in zip(out, expected, strict=True):
            assert_same(merged.cpu(), wanted)


@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft"])
def test_several_dtypes_are_one_scope(semantics: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import ties_merge

    merging, draws = Counted(ties_merge._merge), Counted(ties_merge._merge_draws)
    monkeypatch.setattr(ties_merge, "_merge", merging)
    monkeypatch.setattr(ties_merge, "_merge_draws", draws)
    bases, experts, rows = [], [], []
    for i, size in enumerate((300, 4_100, 20, 65)):
        base, of_tensor = inputs(grid, size, 3, (torch.bfloat16, torch.float32, torch.float16)[i % 3])
        bases.append(base)
        rows.append(of_tensor)
        experts += [expert.to(gpu) for expert in of_tensor]
    options = {"semantics": semantics, "lam": 0.3, "rescale": semantics == "mergekit"}
    out = [torch.full_like(base, math.nan, device=gpu) for base in bases]
    ties_merge.ties_merge_out([base.to(gpu) for base in bases], experts, [0.3] * 3, **options, out=out)
    expected = reference.scope_merge(bases, list(zip(*rows, strict=True)), density=0.3, **options)
    for merged, wanted in zip(out, expected, strict=True):
        assert_same(merged.cpu(), wanted)
    assert (merging.launches, draws.launches) == (3, 3 if semantics == "paper" else 0)


@pytest.mark.parametrize("semantics", ["mergekit", "peft"])
def test_limits_of_a_scope_merge_its_tensors_one_call_at_a_time(semantics: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out
    from surgery_kernels.triton.trim import trim_limits

    bases, experts, rows = [], [], []
    for size in (30, 4_200, 65):
        base, of_tensor = inputs(equal, size, 3, torch.bfloat16)
        bases.append(base)
        rows.append(of_tensor)
    experts = [expert.to(gpu) for of_tensor in rows for expert in of_tensor]
    expected = reference.scope_merge(bases, list(zip(*rows, strict=True)), density=0.4, semantics=semantics)
    thresholds, cuts = trim_limits([base.to(gpu) for base in bases], experts, [0.4] * 3, semantics)
    before = 0
    for i, (base, wanted) in enumerate(zip(bases, expected, strict=True)):
        out = torch.full_like(base, math.nan, device=gpu)
        options = {"thresholds": thresholds, "cuts": [cut - before for cut in cuts.tolist()]}
        of_tensor = experts[3 * i : 3 * i + 3]
        ties_merge_out([base.to(gpu)], of_tensor, [1.0] * 3, semantics=semantics, **options, out=[out])
        assert_same(out.cpu(), wanted)
        before += base.numel()


def test_thresholds_replace_the_density(gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 300, 3, dtype)
        given = torch.tensor([0.02, -0.0, math.inf], dtype=torch.float64)
        for thresholds in (given, given.float().to(gpu)):
            merged = merge(gpu, base, experts, thresholds=thresholds, nonfinite="propagate")
            assert_same(merged, reference.ties_merge(base, experts, thresholds=given))


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft"])
def test_nonfinite_values(semantics: str, nonfinite: str, gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 300, 3, dtype)
        experts[0][::50] = math.nan
        experts[1][7::60] = math.inf
        experts[2][7::30] = -math.inf
        check(gpu, base, experts, density=[0.5] * 3, semantics=semantics, nonfinite=nonfinite)
        check(gpu, None, experts, density=[0.02] * 3, semantics=semantics, nonfinite=nonfinite)


def test_what_is_not_finite_is_named_and_nothing_is_written(gpu: torch.device) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    base, experts = inputs(grid, (30, 3), 2, torch.bfloat16)
    experts[1][3] = math.nan
    moved = [expert.to(gpu) for expert in experts]
    for out in (torch.full((30, 3), 7.0).bfloat16().to(gpu), torch.full((3, 30), 7.0).bfloat16().to(gpu).t()):
        for options in ({}, {"thresholds": torch.zeros(2)}, {"semantics": "mergekit"}):
            message = "experts[1] must be finite, got 3 NaN or infinite values in tensor 'a'"
            with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
                ties_merge_out([base.to(gpu)], moved, [0.2] * 2, **options, names=["a"], out=[out])
            assert (out == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": torch.tensor([0.1, -0.5])}, "thresholds must be 0 or greater, got -0.5"),
        ({"thresholds": torch.tensor([0.1, math.nan])}, "thresholds must be 0 or greater, got nan"),
        ({"thresholds": torch.tensor([0.1])}, "thresholds must be one value per expert, got 1"),
        ({"thresholds": torch.tensor([1, 2])}, "thresholds must be float32 or float64, got torch.int64"),
        ({"cuts": [1, 2]}, "thresholds must be given where cuts are, got none"),
        ({"cuts": [1], "thresholds": torch.zeros(2)}, "cuts must be one per expert, got 1"),
        ({"lam": 1e39}, "lam must be finite in the compute type, got 1e+39"),
        ({"weights": [1.0], "semantics": "peft"}, "weights must be one per expert, got 1"),
        ({"weights": [1.0] * 2}, "weights must be None with semantics='paper', got weights"),
        ({"reduce": "max", "semantics": "peft"}, "reduce must be 'mean' or 'sum' with semantics='peft', got 'max'"),
        ({"elect": "none"}, "elect must be 'sum' or 'count' with semantics='paper', got 'none'"),
        ({"rescale": True}, "normalize and rescale must keep their defaults with semantics='paper', got others"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str, gpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        merge(gpu, None, [torch.zeros(10)] * 2, **options)


def test_task_vectors_of_zeros_change_nothing(gpu: torch.device) -> None:
    base = torch.arange(100.0)
    assert_same(merge(gpu, base, [base, base.clone()]), base)
