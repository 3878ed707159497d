"""Methods that decide entry by entry, against mergekit's and by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from surgery_kernels import merge_state_dicts
from tests.cases import assert_same, gaussian, inputs
from tests.untied import untied

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (63,), (65, 33), (3, 20, 11)]
ROWS = torch.tensor([[4.0, -1, 0, 2], [2, 3, 0, -2], [-1, 1, 5, 2]], dtype=torch.float64)  # task vectors


def merged(name: str, base: Tensor, experts: list[Tensor], **options: Any) -> Tensor:
    return merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], method=name, **options)["w"]


def mergekits(name: str, base: Tensor, experts: list[Tensor], **parameters: Any) -> Tensor:
    return merge_tensors([base, *experts], name, parameters=parameters, base_index=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearswap_is_mergekits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, (expert,) = untied(shape, 1, dtype)
    for t in (0.0, 0.01, 0.3, 10.0):
        expected = mergekits("nearswap", base, [expert], t=t)
        assert_same(merged("nearswap", base, [expert], t=t, arithmetic="mergekit"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])
@pytest.mark.parametrize("topk", [1.0, 0.4, 0.0])
def test_sce_is_mergekits(num_tasks: int, topk: float, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        base, experts = untied(shape, num_tasks, dtype)
        expected = mergekits("sce", base, experts, select_topk=topk)
        actual = merged("sce", base, experts, select_topk=topk, arithmetic="mergekit")
        if dtype in (torch.float16, torch.bfloat16) and topk == 0.4:  # equal variances are torch.topk's choice
            far = (actual - expected).abs() > 8 * torch.finfo(dtype).eps * expected.abs()
            assert far.float().mean() < 0.1
        else:
            torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram_is_mergekits(name: str, dtype: torch.dtype) -> None:
    for num_tasks in (1, 2, 5):
        base, experts = untied((65, 33), num_tasks, dtype)
        for t, expert in enumerate(experts):
            expert[:: t + 2] = base[:: t + 2]
        expected = mergekits(name, base, experts)
        torch.testing.assert_close(merged(name, base, experts), expected, rtol=1e-6, atol=1e-6)  # its lambda is float32


@pytest.mark.parametrize("shape", [(65, 33), (3, 20, 11), (63,)], ids=str)
def test_arcee_fusion_is_mergekits(shape: tuple[int, ...]) -> None:
    base, (expert,) = untied(shape, 1, torch.float64)
    assert_same(merged("arcee_fusion", base, [expert]), mergekits("arcee_fusion", base, [expert]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arcee_fusion_decides_on_exact_importance(dtype: torch.dtype) -> None:
    base, (expert,) = untied((40, 64), 1, dtype)
    actual = merged("arcee_fusion", base, [expert])
    exact = mergekits("arcee_fusion", base.double(), [expert.double()])
    assert (actual.double() - exact).abs().gt(0.01).sum() <= 2  # importances that float32 cannot tell apart
    assert actual.dtype == dtype


def test_by_hand() -> None:
    zero, experts = torch.zeros(4, dtype=torch.float64), list(ROWS)
    close(merged("sce", zero, experts), [3.105263, 1.708333, 5, 2])
    close(merged("sce", zero, experts, select_topk=0.5), [3.6, 0, 5, 0])
    pair = [torch.tensor([1.0, 0, 2]), torch.tensor([0.0, 3, 4])]
    close(merged("ram", torch.zeros(3), pair), [1, 3, 3])
    close(merged("ramplus_tl", torch.zeros(3), pair), [1.02, 3.06, 3])
    close(merged("nearswap", torch.zeros(2), [torch.tensor([0.05, -0.2])], t=0.1), [0.05, -0.1])
    table = torch.tensor([[1.0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    close(merged("arcee_fusion", torch.zeros(2, 4, dtype=torch.float64), [table]).flatten(), [1, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion"])
def test_identical_models_empty_tensors_and_scalars(name: str, dtype: torch.dtype) -> None:
    _, (x,) = inputs(gaussian, 257, 1, dtype)
    options = {"t": 0.1} if name == "nearswap" else {}
    count = 1 if name in ("nearswap", "arcee_fusion") else 3
    assert_same(merged(name, x, [x] * count, **options), x)
    assert merged(name, x[:0], [x[:0]] * count, **options).shape == (0,)
    assert_same(merged(name, x[0], [x[0]] * count, **options), x[0])


@pytest.mark.parametrize("name", ["nearswap", "sce", "ramplus_tl", "arcee_fusion"])
def test_nonfinite_values(name: str) -> None:
    base, (x,) = inputs(gaussian, 257, 1, torch.float32)
    bad = x.clone()
    bad[200] = math.inf
    options = {"t": 0.1} if name == "nearswap" else {}
    with pytest.raises(RuntimeError, match=r"experts\[0\] must be finite, got 1 NaN or infinite values in tensor 'w'"):
        merged(name, base, [bad], **options)
    dropped = merged(name, base, [bad], nonfinite="drop", **options)
    assert dropped[200] == base[200] and dropped.isfinite().all()


@pytest.mark.parametrize("name", ["nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion"])
@pytest.mark.parametrize(
    ("of_base", "of_expert", "message"),
    [
        (math.inf, 1.0, "base must be finite, got 1 NaN or infinite values in tensor 'w'"),
        (math.nan, 1.0, "base must be finite, got 1 NaN or infinite values in tensor 'w'"),
        (3e38, -3e38, "experts[0] - base must be finite, got 1 overflows in tensor 'w'"),
    ],
)
def test_a_base_that_is_not_finite_and_an_overflow(name: str, of_base: float, of_expert: float, message: str) -> None:
    base, (x,) = inputs(gaussian, 257, 1, torch.float32)
    base[200], x[200] = of_base, of_expert
    options = {"t": 0.1} if name == "nearswap" else {}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        merged(name, base, [x], **options)
    dropped = merged(name, base, [x], nonfinite="drop", **options)
    assert_same(dropped[200], base[200])
    assert dropped[:200].isfinite().all() and dropped[201:].isfinite().all()
    assert merged(name, base, [x], nonfinite="propagate", **options).shape == base.shape


def test_sce_counts_what_it_selects_beyond_what_float32_counts() -> None:
    numel, kept = (1 << 24) + 1_001, (1 << 24) + 501
    ones = torch.ones(numel, dtype=torch.bfloat16)
    selected = merged("sce", torch.zeros_like(ones), [ones, 2 * ones], select_topk=(kept + 0.5) / numel)
    assert selected[:kept].all() and not selected[kept:].any()


ON_DEVICES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("nearswap", torch.bfloat16, {"t": 0.1, "arithmetic": "mergekit"}),
    ("nearswap", torch.float32, {"t": 0.1, "nonfinite": "drop"}),
    ("sce", torch.float32, {}),
    ("sce", torch.float32, {"select_topk": 0.4}),
    ("sce", torch.bfloat16, {"select_topk": 0.4, "arithmetic": "mergekit", "nonfinite": "drop"}),
    ("ramplus_tl", torch.bfloat16, {}),
    ("arcee_fusion", torch.bfloat16, {}),
    ("arcee_fusion", torch.float32, {"nonfinite": "drop"}),
]


def merged_on(device: torch.device | str, name: str, dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
    base, experts = untied((13, 21), 1 if name in ("nearswap", "arcee_fusion") else 3, dtype)
    if "nonfinite" in options:
        experts[0][3, 5] = math.nan
    return merged(name, base.to(device), [expert.to(device) for expert in experts], **options).cpu()


@pytest.fixture(scope="module")
def merged_on_the_cpu() -> list[Tensor]:
    return [merged_on("cpu", *case) for case in ON_DEVICES]


@pytest.mark.any_isa
@pytest.mark.parametrize("place", range(len(ON_DEVICES)))
def test_the_bits_of_the_cpu_on_cuda(place: int, merged_on_the_cpu: list[Tensor], device: torch.device) -> None:
    assert_same(merged_on(device, *ON_DEVICES[place]), merged_on_the_cpu[place])


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("nearswap", 1, {}, "t must be given, got none"),
        ("nearswap", 2, {"t": 0.1}, "experts must be exactly 1 for nearswap, got 2"),
        ("sce", 1, {"select_topk": 1.5}, "select_topk must be in [0, 1], got 1.5"),
        ("ram", 1, {"epsilon": -1.0}, "epsilon must be finite and 0 or greater, got -1.0"),
        ("arcee_fusion", 3, {}, "experts must be exactly 1 for arcee_fusion, got 3"),
        ("sce", 1, {"arithmetic": "fast"}, "arithmetic must be one of 'exact', 'mergekit', got 'fast'"),
    ],
)
def test_refused(name: str, count: int, options: dict[str, Any], message: str) -> None:
    base, experts = inputs(gaussian, 3, count, torch.float32)
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        merged(name, base, experts, **options)


def test_passthrough() -> None:
    _, (x,) = inputs(gaussian, 63, 1, torch.bfloat16)
    x[0] = -0.0
    state = [{"w": x}]
    assert_same(merge_state_dicts(None, state, method="passthrough")["w"], x)
    expected = merge_tensors([x], "passthrough", parameters={"scale": 0.3})
    assert torch.equal(merge_state_dicts(None, state, method="passthrough", scale=0.3)["w"], expected)
    with pytest.raises(ValueError, match="^experts must be exactly 1 for passthrough, got 2$"):
        merge_state_dicts(None, state * 2, method="passthrough")


def close(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=1e-6)
