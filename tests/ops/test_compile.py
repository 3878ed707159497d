"""The ops as torch sees them: schemas, fakes, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference, ties_merge, ties_split, trim_thresholds
from tests.cases import assert_same, gaussian, inputs

pytestmark = pytest.mark.any_isa

OPS = torch.ops.surgery_kernels


def problem(count: int = 1_000) -> tuple[Tensor, list[Tensor]]:
    return inputs(gaussian, count, 3, torch.float32)


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trim_thresholds", {}),
        ("trim_thresholds", {"semantics": "mergekit", "nonfinite": "drop"}),
        ("ties_merge", {}),
        ("ties_merge", {"semantics": "mergekit", "weights": [1.0, 0.5, -1.0], "rescale": True, "lam": 0.3}),
        ("ties_merge", {"thresholds": torch.tensor([0.1, 0.2, 0.3])}),
        ("ties_split", {}),
        ("ties_split", {"semantics": "peft", "weights": [1.0, 0.5, -1.0]}),
    ],
    ids=str,
)
def test_opcheck(name: str, options: dict[str, Any], with_base: bool) -> None:
    base, experts = problem()
    torch.library.opcheck(getattr(OPS, name), (base if with_base else None, experts, [0.2, 0.5, 1.0]), options)


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_opcheck_of_several_tensors(with_base: bool) -> None:
    bases, experts = [], []
    for count in (100, 33):
        base, of_tensor = problem(count)
        bases.append(base)
        experts += of_tensor
    out = [torch.zeros_like(base) for base in bases]
    arguments = (bases if with_base else [], experts, [0.2, 0.5, 1.0])
    torch.library.opcheck(OPS.ties_merge_out, arguments, {"names": ["a", "b"], "out": out})
    limits = {"thresholds": torch.tensor([0.1, 0.2, 0.0]), "cuts": [7, -5, 200]}
    torch.library.opcheck(OPS.ties_merge_out, arguments, {**limits, "semantics": "peft", "out": out})
    torch.library.opcheck(OPS.trim_limits, arguments, {"names": ["a", "b"], "semantics": "peft"})
    torch.library.opcheck(OPS.trim_limits, arguments, {"ranks": [3, -7] * 3})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_functions(dynamic: bool) -> None:
    def everything(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        thresholds = trim_thresholds(base, experts, density=0.5)
        merged = ties_merge(base, experts, lam=0.3, semantics="mergekit", weights=[1.0, 0.5, 0.25])
        return ties_merge(base, experts, thresholds=thresholds) + 1, merged, ties_split(None, experts).sum(dim=0)

    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (1_000, 333):
        base, experts = problem(count)
        for actual, expected in zip(compiled(base, experts), everything(base, experts), strict=True):
            assert_same(actual, expected)


def test_compiled_out() -> None:
    def merge(base: Tensor, experts: list[Tensor], out: Tensor) -> Tensor:
        return ties_merge(base, experts, out=out) * 2

    torch.compiler.reset()
    base, experts = problem()
    out = torch.empty_like(base)
    doubled = torch.compile(merge, fullgraph=True, backend="aot_eager")(base, experts, out)
    assert_same(out, reference.ties_merge(base, experts))
    assert_same(doubled, 2 * out)


def test_compiled_numbers() -> None:
    def merge(base: Tensor, experts: list[Tensor], lam: float, density: float) -> Tensor:
        return ties_merge(base, experts, lam=lam, density=density)

    torch.compiler.reset()
    base, experts = problem()
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    for lam, density in ((0.3, 0.2), (0.7, 0.5), (-1.0, 1.0)):
        expected = reference.ties_merge(base, experts, lam=lam, density=density)
        assert_same(compiled(base, experts, lam, density), expected)


def test_inductor() -> None:
    torch.compiler.reset()
    base, experts = problem()
    compiled = torch.compile(lambda base, experts: ties_merge(base, experts), fullgraph=True)
    assert_same(compiled(base, experts), reference.ties_merge(base, experts))


def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    with torch.device("meta"):
        base, stacked = torch.empty(7, 5, dtype=torch.bfloat16), torch.empty(4, 7, 5, dtype=torch.bfloat16)
        assert_like(ties_merge(base, stacked), (7, 5), torch.bfloat16)
        assert_like(ties_split(base, stacked), (4, 7, 5), torch.bfloat16)
        assert_like(trim_thresholds(base, stacked, density=0.2), (4,), torch.float32)
        assert_like(trim_thresholds(None, stacked.double(), density=0.2), (4,), torch.float64)
        thresholds, cuts = OPS.trim_limits([base], list(stacked), [0.2] * 4)
        assert_like(thresholds, (4,), torch.float32)
        assert_like(cuts, (4,), torch.int64)
        thresholds, cuts = OPS.trim_limits([base], list(stacked), [0.2] * 4, ranks=[1, 2, 3] * 4)
        assert_like(thresholds, (12,), torch.float32)
        assert_like(cuts, (12,), torch.int64)


def assert_like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(x.shape), x.dtype, x.device.type) == (shape, dtype, "meta")
