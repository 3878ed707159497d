"""masks on CUDA tensors: the Triton kernels against the oracle and the CPU."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.ops.masks import pack
from tests.cases import DTYPES, KINDS, SHAPES, assert_same, equal, gaussian, grid, inputs, option_id
from tests.guards import Counted, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

RULES: list[dict[str, Any]] = [{"rule": "random"}, {"rule": "della", "epsilon": [0.1, 0.2]}]
DENSITY = [0.3, 0.6]


def drawn(
    gpu: torch.device, bases: list[Tensor], experts: list[Tensor], shift: int = 0, **options: Any
) -> tuple[list[Tensor], Tensor]:
    from surgery_kernels.triton.masks import masks

    bits, sums = masks([guarded(x, gpu, shift) for x in bases], [guarded(x, gpu, shift) for x in experts], **options)
    return [x.cpu() for x in bits], sums.cpu()


def check(gpu: torch.device, base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    (bits,), (sums,) = drawn(gpu, [] if base is None else [base], experts, **options)
    options.pop("shift", None)
    kept, expected = reference.masks(base, experts, **options)
    assert torch.equal(bits, pack(kept)), str(options)
    assert_same(sums, expected, str(options))


@pytest.mark.parametrize("options", RULES, ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, options: dict[str, Any], gpu: torch.device) -> None:
    base, experts = inputs(kind, (7, 41), 2, dtype)
    check(gpu, base, experts, density=DENSITY, seed=-3, **options)
    check(gpu, None, experts, density=[0.5, 1.0], seed=2**40, **options)


@pytest.mark.parametrize("options", RULES, ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (20_001,)], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], gpu: torch.device) -> None:
    base, experts = inputs(gaussian, shape, 2, dtype)
    check(gpu, base, experts, density=DENSITY, shift=1, **options)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (30, 7), (2, 9, 40), (5, 3, 2, 7)], ids=str)
def test_ranks_run_along_the_second_dimension(
    shape: tuple[int, ...], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import masks

    for most in (masks.MOST_RANKED, 50):
        monkeypatch.setattr(masks, "MOST_RANKED", most)
        for kind in (grid, equal):
            base, experts = inputs(kind, shape, 2, torch.float16)
            check(gpu, base, experts, density=[0.5, 0.2], rule="della", epsilon=[0.4, 0.1])


@pytest.mark.parametrize("num_tasks", [1, 3, 8, 20])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, 100, num_tasks, torch.bfloat16)
    check(gpu, base, experts, density=[0.4] * num_tasks)


@pytest.mark.parametrize("options", RULES, ids=option_id)
def test_several_tensors_are_those_of_the_cpu(
    options: dict[str, Any], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import masks

    kernels = [Counted(getattr(masks, name)) for name in ("_draw", "_sum")]
    for kernel, name in zip(kernels, ("_draw", "_sum"), strict=True):
        monkeypatch.setattr(masks, name, kernel)
    bases, experts = [], []
    for i, shape in enumerate([(5, 70), (0,), (), (33_000,), (4_200,), (0, 3), (3, 1_500)]):
        base, of_tensor = inputs(gaussian, shape, 2, (torch.float32, torch.bfloat16)[i % 2])
        bases.append(base)
        experts += of_tensor
    ids = {"tensor_ids": [9, 2**32 - 1, 0, 5, 6, 8, 2], "task_ids": [3, 2**32 - 1]}
    for given in ({}, ids):
        arguments = {"density": DENSITY, "seed": 77, **given, **options}
        bits, sums = drawn(gpu, bases, experts, **arguments)
        expected, expected_sums = torch.ops.surgery_kernels.masks(bases, experts, **arguments)
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(bits, expected, strict=True))
        assert_same(sums, expected_sums)
    assert [kernel.launches for kernel in kernels] == [4, 4]  # one for each dtype


@pytest.mark.parametrize("options", RULES, ids=option_id)
def test_nonfinite_values(options: dict[str, Any], gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, (4, 25), 2, dtype)
        experts[1][3, [5, 7, 9, 11]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan]).to(dtype)
        for nonfinite in ("propagate", "drop"):
            check(gpu, base, experts, density=DENSITY, nonfinite=nonfinite, **options)
        with pytest.raises(RuntimeError, match=r"^experts\[1\] must be finite, got 4 .* in tensor 'a'$"):
            drawn(gpu, [base], experts, density=DENSITY, nonfinite="error", names=["a"], **options)


def test_norms_that_overflow_are_no_error(gpu: torch.device) -> None:
    experts = [torch.full((100,), 1e308, dtype=torch.float64)]
    assert drawn(gpu, [], experts, density=[1.0], nonfinite="error")[1].tolist() == [[[100.0, math.inf, math.inf]]]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("rule must be one of 'random', 'della', got 'x'", {"rule": "x"}),
        ("epsilon must be given with rule='della', got none", {"rule": "della"}),
        ("epsilon must be one number per expert (2), got 1", {"rule": "della", "epsilon": [0.1]}),
        ("tensor_ids must be one number for every merged tensor (1), got 2", {"tensor_ids": [0, 1]}),
        ("tensor_ids must be in [0, 2**32), got -1", {"tensor_ids": [-1]}),
        ("task_ids must be one number for every expert (2), got 3", {"task_ids": [0, 1, 2]}),
    ],
    ids=str,
)
def test_refused(message: str, changes: dict[str, Any], gpu: torch.device) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"^{re.escape(message)}$"):
        drawn(gpu, [], [torch.zeros(10)] * 2, density=[0.5, 0.5], **changes)
