"""The oracle against the toolkits whose semantics it states."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import DTYPES, assert_same, gaussian, generator, grid, inputs, option_id, sparse, weights_of

pytestmark = pytest.mark.any_isa


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """PEFT's merging functions with a topk that takes tied elements in index order."""
    merge_utils = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed", exc_type=ImportError)

    def topk(x: Tensor, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x, descending=largest, stable=True)
        return values[:k], indices[:k]

    monkeypatch.setattr(torch, "topk", topk)
    return merge_utils


@pytest.fixture
def mergekit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """mergekit's generalized task arithmetic with an argsort that takes tied elements in index order."""
    module = pytest.importorskip(
        "mergekit.merge_methods.generalized_task_arithmetic", reason="mergekit is not installed", exc_type=ImportError
    )
    argsort = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda x, descending: argsort(x, descending=descending, stable=True))
    return module


def mergekit_ties(
    mergekit: ModuleType,
    base: Tensor,
    experts: list[Tensor],
    *,
    density: float,
    lam: float,
    weights: list[float],
    elect: str,
    normalize: bool,
    rescale: bool,
) -> Tensor:
    from mergekit.merge_methods.base import TensorGroup

    method = mergekit.GeneralizedTaskArithmeticMerge(
        consensus_method=None if elect == "none" else mergekit.ConsensusMethod(elect),
        sparsification_method=mergekit.SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties",
        method_pretty_name=None,
        method_reference_url=None,
    )
    numbers = range(1, len(experts) + 1)
    parameters: dict[str, Any] = {
        "density": dict.fromkeys(numbers, density),
        "weight": dict(zip(numbers, weights, strict=True)),
        "lambda": lam,
        "normalize": normalize,
        "rescale": rescale,
        "int8_mask": False,
    }
    return method.merge_group(TensorGroup.from_tensors([base, *experts], base_index=0), **parameters)


def official_ties(base: Tensor, experts: list[Tensor], density: float, lam: float, reduce: str) -> Tensor:
    """TIES as the paper's code computes it, in the stored dtype."""
    task_vectors = torch.stack([expert - base for expert in experts])
    num_params = base.numel()
    threshold = task_vectors.abs().kthvalue(num_params - int(num_params * density), dim=1, keepdim=True).values
    trimmed = task_vectors * (task_vectors.abs() >= threshold)
    signs = trimmed.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    selected = trimmed * torch.where(signs > 0, trimmed > 0, trimmed < 0)
    merged = selected.abs().max(dim=0).values * signs if reduce == "max" else selected.sum(dim=0)
    if reduce == "mean":
        merged = merged / (selected != 0).sum(dim=0).float().clamp(min=1)
    return (base + lam * merged).to(base.dtype)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("kind", [gaussian, grid, sparse], ids=option_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
def test_official_formula(dtype: torch.dtype, kind: Any, reduce: str) -> None:
    for num_tasks in (1, 2, 4):
        base, experts = inputs(kind, 20_001, num_tasks, dtype)
        expected = official_ties(base, experts, 0.2, 0.3, reduce)
        actual = reference.ties_merge(base, experts, density=0.2, lam=0.3, reduce=reduce)
        assert_same(actual, expected, f"{num_tasks} experts")


@pytest.mark.parametrize("num_tasks", [5, 8, 20, 33])
def test_official_formula_with_many_experts(num_tasks: int) -> None:
    # torch.sum takes its own order from five experts on: equal where sums are exact
    base, experts = inputs(grid, 5_000, num_tasks, torch.float32)
    for reduce in ("mean", "sum", "max"):
        expected = official_ties(base, experts, 0.2, 0.3, reduce)
        assert_same(reference.ties_merge(base, experts, density=0.2, lam=0.3, reduce=reduce), expected, reduce)


@pytest.mark.parametrize("num_tasks", [5, 8, 20, 33])
def test_official_formula_rounds_its_sums_in_another_order(num_tasks: int) -> None:
    base, experts = inputs(gaussian, 20_001, num_tasks, torch.float32)
    zero, task_vectors = torch.zeros_like(base), [expert - base for expert in experts]
    expected = official_ties(zero, task_vectors, 0.2, 1.0, "sum")
    actual = reference.ties_merge(None, task_vectors, density=0.2, reduce="sum")
    ulp = torch.nextafter(expected.abs(), torch.tensor(math.inf)) - expected.abs()
    assert ((actual - expected).abs() > ulp * max(1, num_tasks // 8)).sum() == 0
    assert (actual != expected).float().mean() < 0.1


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("kind", [gaussian, grid, sparse], ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_peft(peft: ModuleType, dtype: torch.dtype, kind: Any, elect: str) -> None:
    for num_tasks in (1, 3, 4):
        base, experts = inputs(kind, (67, 103), num_tasks, dtype)
        task_vectors = [expert - base for expert in experts]
        weights = [0.7, -0.3, 0.0, 1.1][:num_tasks]
        for density in (0.2, 0.57):
            method = {"sum": "total", "count": "frequency"}[elect]
            expected = peft.ties(task_vectors, torch.tensor(weights), density, method)
            actual = reference.ties_merge(
                None, task_vectors, density=density, weights=weights, semantics="peft", elect=elect
            )
            # PEFT leaves 16-bit results in float32; ours come back in the stored dtype
            assert_same(actual, expected.to(dtype), f"{num_tasks} experts, density {density}")


@pytest.mark.filterwarnings("ignore:The density:UserWarning")
def test_peft_without_a_trim(peft: ModuleType) -> None:
    _, experts = inputs(gaussian, 999, 3, torch.float32)
    expected = peft.ties(experts, torch.ones(3), 1.0)
    assert_same(reference.ties_merge(None, experts, density=1.0, semantics="peft"), expected)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("elect", ["sum", "count", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
def test_mergekit(mergekit: ModuleType, dtype: torch.dtype, elect: str, normalize: bool, rescale: bool) -> None:
    for kind in (grid, sparse) if rescale else (gaussian, grid, sparse):
        for num_tasks, density, lam in ((1, 0.2, 1.0), (3, 0.29, 0.3), (4, 0.5, -1.7)):
            base, experts = inputs(kind, (67, 103), num_tasks, dtype)
            options: dict[str, Any] = {
                "density": density, "lam": lam, "weights": weights_of(num_tasks),
                "elect": elect, "normalize": normalize, "rescale": rescale,
            }  # fmt: skip
            expected = mergekit_ties(mergekit, base, experts, **options)
            actual = reference.ties_merge(base, experts, semantics="mergekit", **options)
            assert_same(actual, expected, f"{kind.__name__}, {num_tasks} experts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
def test_mergekit_rescale_of_inexact_sums(mergekit: ModuleType, dtype: torch.dtype) -> None:
    # mergekit's L1 norms are float32 sums in torch's order, ours are exact: the ratio may be a rounding apart
    base, experts = inputs(gaussian, (67, 103), 3, dtype)
    options: dict[str, Any] = {
        "density": 0.3, "lam": 1.0, "weights": [1.0, 0.5, 0.7], "elect": "sum", "normalize": True, "rescale": True,
    }  # fmt: skip
    zero, task_vectors = torch.zeros_like(base), [expert - base for expert in experts]
    expected = mergekit_ties(mergekit, zero, task_vectors, **options)
    actual = reference.ties_merge(None, task_vectors, semantics="mergekit", **options)
    torch.testing.assert_close(actual, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_rescale_of_norms_beyond_float16() -> None:
    expert = torch.full((4_000,), 100.0, dtype=torch.float16)
    expert[::2] *= 2
    merged = reference.ties_merge(None, [expert], density=0.5, semantics="mergekit", rescale=True)
    assert_same(merged[::2], torch.full((2_000,), 300.0, dtype=torch.float16))
    assert not merged[1::2].any()


def test_keep_is_a_float64_floor() -> None:
    assert reference.keep_count(100, 0.29, "peft") == 28
    assert reference.keep_count(100, 0.57, "mergekit") == 56
    assert reference.keep_count(100, 0.57, "paper") == 57
    assert [reference.keep_count(3, 0.1, s) for s in ("paper", "mergekit", "peft")] == [1, 1, 0]
    assert [reference.keep_count(3, 1.0, s) for s in ("paper", "mergekit", "peft")] == [3, 3, 3]


def test_scope_is_its_tensors_in_a_row() -> None:
    base, experts = inputs(grid, 1_000, 3, torch.float32)
    for semantics in ("paper", "mergekit", "peft"):
        whole = reference.ties_merge(base, experts, semantics=semantics)
        cuts = [100, 0, 650, 250]
        parts = reference.scope_merge(base.split(cuts), [expert.split(cuts) for expert in experts], semantics=semantics)
        assert_same(torch.cat(parts), whole, semantics)


def test_high_precision() -> None:
    base, experts = inputs(gaussian, 2_000, 3, torch.bfloat16)
    rounded = reference.ties_merge(base, experts, reduce="sum", thresholds=[0.1] * 3)
    exact = reference.ties_merge(base, experts, reduce="sum", thresholds=[0.1] * 3, compute_dtype=torch.float64)
    wide = reference.ties_merge(base.double(), [e.double() for e in experts], reduce="sum", thresholds=[0.1] * 3)
    assert_same(exact, wide)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-6, atol=2**-6)


def test_nan_ranks_first() -> None:
    x = torch.randn(100, generator=generator("nan"))
    x[7] = math.nan
    assert reference.trim_thresholds(None, [x], density=0.01, semantics="peft", nonfinite="propagate").isnan()
    assert reference.ties_merge(None, [x], nonfinite="propagate").isnan().sum() == 1
    assert reference.ties_merge(None, [x], nonfinite="drop").isfinite().all()
    with pytest.raises(RuntimeError, match=r"^experts\[0\] must be finite, got 1 NaN or infinite values$"):
        reference.ties_merge(None, [x])
