"""ties_merge against the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import reference, ties_merge
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SEMANTICS,
    SHAPES,
    Inputs,
    assert_same,
    bits,
    cancelling,
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
    rising,
    rows,
    sparse,
    weights_of,
    with_weights,
)

LARGE = 100_003  # past the size from which thresholds start with a sample
LAYOUTS = ["transposed", "strided", "expanded", "unaligned", "stacked"]


def check(base: Tensor | None, experts: list[Tensor] | Tensor, what: str = "", **options: Any) -> None:
    expected = reference.ties_merge(base, experts, **options)
    assert_same(ties_merge(base, experts, **options), expected, f"{what} {options}")


def exact_l1_norms(kind: Any, dtype: torch.dtype) -> bool:
    """The oracle's L1 norms are exact; a float64 sum of float64 numbers is not."""
    return dtype != torch.float64 or kind in (grid, sparse, equal, cancelling, leaning_up, leaning_down)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("options", merge_options(), ids=option_id)
def test_every_option_on_every_kind_of_data(options: dict[str, Any], dtype: torch.dtype) -> None:
    for kind in KINDS:
        if options.get("rescale") and not exact_l1_norms(kind, dtype):
            continue
        for num_tasks, density, lam in ((3, 0.2, 1.0), (4, 0.5, -0.3)):
            base, experts = inputs(kind, 257, num_tasks, dtype)
            check(base, experts, kind.__name__, density=density, lam=lam, **with_weights(options, num_tasks))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in (gaussian, grid):
        base, experts = inputs(kind, shape, 3, dtype)
        for semantics in SEMANTICS:
            check(base, experts, lam=0.3, semantics=semantics)
            check(None, experts, lam=0.3, semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int, dtype: torch.dtype) -> None:
    for kind in (gaussian, leaning_down):
        base, experts = inputs(kind, 333, num_tasks, dtype)
        check(base, experts, density=densities_of(num_tasks), lam=0.3)
        check(base, experts, reduce="max")
        for semantics in ("mergekit", "peft"):
            check(base, experts, density=densities_of(num_tasks), weights=weights_of(num_tasks), semantics=semantics)
            check(base, experts, semantics=semantics, elect="count")
        check(base, experts, weights=weights_of(num_tasks), semantics="mergekit", elect="none")


@pytest.mark.parametrize("density", [1.0, 1e-9, 0.2, 0.999])
@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3, -2.5, 1e-30])
def test_every_number(lam: float, density: float) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 1_000, 3, dtype)
        for semantics in SEMANTICS:
            for reduce in ("mean", "sum"):
                check(base, experts, lam=lam, density=density, semantics=semantics, reduce=reduce)


@pytest.mark.parametrize(
    "weights", [0.0, -1.0, 0.1, [0.5, -0.4999999, 0.0], [1e-8, 3.0, -1e4], [0.0, 0.0, 0.0]], ids=str
)
def test_every_weight(weights: float | list[float]) -> None:
    for dtype in DTYPES:
        for kind in (gaussian, grid):
            base, experts = inputs(kind, 1_000, 3, dtype)
            for options in (
                {"semantics": "peft"},
                {"semantics": "mergekit"},
                {"semantics": "mergekit", "normalize": False},
                {"semantics": "mergekit", "elect": "none"},
            ):
                check(base, experts, weights=weights, **options)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values [12, 21] at other strides or addresses."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        wide = torch.full((24, 63), math.nan, dtype=x.dtype)
        wide[::2, ::3] = x
        return wide[::2, ::3]
    shifted = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
    shifted[1:] = x.reshape(-1)
    return shifted[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    base, experts = inputs(grid, (12, 21), 3, dtype)
    for semantics in SEMANTICS:
        expected = reference.ties_merge(base, experts, semantics=semantics)
        if layout == "stacked":
            assert_same(ties_merge(base, torch.stack(experts), semantics=semantics), expected)
            assert_same(ties_merge(base, torch.stack(experts, dim=1).transpose(0, 1), semantics=semantics), expected)
        elif layout == "expanded":
            row = base[:1].expand(12, 21)
            check(row, experts, semantics=semantics)
            check(row, [experts[0], row, experts[1][:, :1].expand(12, 21)], semantics=semantics)
        else:
            moved = [laid_out(x, layout) for x in (base, *experts)]
            assert_same(ties_merge(moved[0], moved[1:], semantics=semantics), expected)
            assert_same(ties_merge(base, [experts[0], *moved[2:]], semantics=semantics), expected)


def test_one_storage_may_hold_several_inputs() -> None:
    base, experts = inputs(grid, 500, 2, torch.float32)
    check(base, [experts[0], experts[0], base])
    together = torch.cat([base, *experts])
    check(together[:500], list(together[500:].split(500)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, equal, rows, rising, leaning_up, leaning_down], ids=option_id)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_large(semantics: str, kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, LARGE, 3, dtype)
    check(base, experts, lam=0.3, semantics=semantics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=option_id)
def test_a_million_elements(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 1_000_003, 2, dtype)
    check(base, experts, density=[0.2, 0.9], semantics="mergekit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
def test_large_rescale(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, LARGE, 3, dtype)
    check(base, experts, semantics="mergekit", rescale=True, weights=weights_of(3))
    check(None, experts, semantics="mergekit", rescale=True, density=0.01, reduce="sum")


def test_rescale_in_float64() -> None:
    for kind in (gaussian, rows):
        base, experts = inputs(kind, 20_001, 3, torch.float64)
        options: dict[str, Any] = {"semantics": "mergekit", "rescale": True}
        expected = reference.ties_merge(base, experts, **options)
        torch.testing.assert_close(ties_merge(base, experts, **options), expected, rtol=1e-14, atol=1e-14)


def test_task_vectors_that_vanish_are_not_rescaled() -> None:
    experts = [torch.zeros(100), torch.full((100,), 1e-10), torch.full((100,), 2e-9)]
    check(None, experts, semantics="mergekit", rescale=True, density=0.3)


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("kind", [cancelling, leaning_up, leaning_down], ids=option_id)
def test_draws_take_the_sign_of_the_scope(kind: Any, num_tasks: int) -> None:
    for dtype in DTYPES:
        for count in (100, 9_001):
            base, experts = inputs(kind, count, num_tasks, dtype)
            for elect in ("sum", "count"):
                for reduce in ("mean", "max"):
                    check(base, experts, f"{count} elements", density=1.0, elect=elect, reduce=reduce)


def test_one_late_element_decides_every_draw() -> None:
    experts = [torch.full((200_000,), 0.5), torch.full((200_000,), -0.25), torch.full((200_000,), -0.25)]
    for late in (0.75, -0.75):
        experts[0][-1] = late
        check(None, experts, density=1.0)
        assert ties_merge(None, experts, density=1.0)[0] == (0.5 if late > 0 else -0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_given_thresholds_keep_every_tie(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, 5_000, 3, dtype)
    thresholds = torch.tensor([3 / 64, 0.0, 5 / 64])
    for semantics in SEMANTICS:
        check(base, experts, semantics=semantics, thresholds=thresholds)
        check(base, experts, semantics=semantics, thresholds=thresholds.double(), density=0.01)
        check(base, experts, semantics=semantics, thresholds=[0.1, math.inf, 1e-50])


@pytest.mark.parametrize("elect", ["sum", "count", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(dtype: torch.dtype, elect: str) -> None:
    base, experts = inputs(grid, 1_000, 3, dtype)
    experts[0][[1, 10, 20]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    experts[2][[10, 30]] = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for nonfinite in ("drop", "propagate"):
        for semantics in SEMANTICS if elect != "none" else ["mergekit"]:
            for density in (0.2, 1.0, 1e-9):
                check(base, experts, semantics=semantics, elect=elect, nonfinite=nonfinite, density=density)
            check(base, experts, semantics=semantics, nonfinite=nonfinite, thresholds=[0.05, 0.05, 0.05])
    base[5] = math.nan
    for nonfinite in ("drop", "propagate"):
        assert ties_merge(base, experts, nonfinite=nonfinite)[5].isnan()


@pytest.mark.parametrize("elect", ["sum", "count"])
def test_nan_has_no_vote(elect: str) -> None:
    up, down = torch.ones(5), -torch.ones(5)
    for number in (math.nan, -math.nan):
        up[:2] = number
        down[:2] = 0.0
        options: dict[str, Any] = {"elect": elect, "density": 1.0, "reduce": "sum", "nonfinite": "propagate"}
        check(None, [up, down], **options)
        for decided in (1.0, -1.0):
            check(None, [up, down, torch.tensor([0.0, 0.0, 0.0, 0.0, decided])], **options)


def test_sums_past_the_range_become_infinite() -> None:
    for dtype in (torch.float32, torch.float16):
        _, experts = inputs(large, 1_000, 20, dtype)
        assert ties_merge(None, experts, density=1.0, reduce="sum").isinf().any()
        check(None, experts, density=1.0, reduce="sum")


PARTS = [(40, 50), (), (0, 3), (4_099,), (3, 7, 11), (1,), (30_000,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, equal, cancelling, leaning_up, leaning_down], ids=option_id)
def test_several_tensors_are_one_scope(kind: Any, dtype: torch.dtype) -> None:
    sizes = [torch.Size(shape).numel() for shape in PARTS]
    base, experts = inputs(kind, sum(sizes), 4, dtype)

    def parts(flat: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(flat.split(sizes), PARTS, strict=True)]

    bases, by_tensor = parts(base), list(zip(*(parts(expert) for expert in experts), strict=True))
    density = [0.2, 0.9, 0.05, 0.5]
    for semantics in SEMANTICS:
        out = [torch.full_like(part, math.nan) for part in bases]
        torch.ops.surgery_kernels.ties_merge_out(
            bases, [expert for tensor in by_tensor for expert in tensor], density, 0.3, semantics=semantics, out=out
        )
        merged = torch.cat([part.reshape(-1) for part in out])
        assert_same(
            merged, reference.ties_merge(base, experts, density=density, lam=0.3, semantics=semantics), semantics
        )


@pytest.mark.parametrize("rescale", [False, True])
def test_several_dtypes_are_one_scope(rescale: bool) -> None:
    bases, experts = [], []
    for dtype, count in ((torch.float32, 1_000), (torch.bfloat16, 20_000), (torch.float16, 3_333)):
        base, of_tensor = inputs(gaussian, count, 3, dtype)
        bases.append(base)
        experts.append(of_tensor)
    out = [torch.full_like(base, math.nan) for base in bases]
    options: dict[str, Any] = {"semantics": "mergekit", "rescale": rescale, "weights": weights_of(3)}
    torch.ops.surgery_kernels.ties_merge_out(
        bases, [expert for of_tensor in experts for expert in of_tensor], [0.3] * 3, out=out, **options
    )
    expected = reference.scope_merge(bases, list(zip(*experts, strict=True)), density=0.3, **options)
    for part, expected_part in zip(out, expected, strict=True):
        assert_same(part, expected_part)


def merge_scope(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], density: Sequence[float], **options: Any
) -> list[Tensor]:
    """One call of the op for several tensors; experts: [num_tensors][num_tasks]."""
    flat, out = [expert for of_tensor in experts for expert in of_tensor], [torch.full_like(b, math.nan) for b in bases]
    torch.ops.surgery_kernels.ties_merge_out(bases, flat, density, **options, out=out)
    return out


def merge_in_calls(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    density: Sequence[float],
    tensors_per_call: Sequence[int],
    **options: Any,
) -> list[Tensor]:
    """The same in several calls, by the limits of the whole scope."""
    asked = {name: options[name] for name in ("semantics", "nonfinite") if name in options}
    flat = [expert for of_tensor in experts for expert in of_tensor]
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits(bases, flat, density, **asked)
    out: list[Tensor] = []
    for count in tensors_per_call:
        call = slice(len(out), len(out) + count)
        before = sum(base.numel() for base in bases[: len(out)])
        limits = {"thresholds": thresholds, "cuts": (cuts - before).tolist()}
        out += merge_scope(bases[call], experts[call], density, **limits, **options)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"semantics": "mergekit"},
        {"semantics": "mergekit", "weights": True, "rescale": True},
        {"semantics": "mergekit", "weights": True, "elect": "none"},
        {"semantics": "peft"},
        {"semantics": "peft", "weights": True, "elect": "count"},
    ],
    ids=option_id,
)
def test_calls_that_share_their_limits_are_one_scope(options: dict[str, Any]) -> None:
    tensors = [(torch.float32, 1_000), (torch.bfloat16, 20_000), (torch.float16, 0), (torch.float16, 333)]
    for kind in (gaussian, grid, equal):
        for dtypes in ([dtype for dtype, _ in tensors], [torch.bfloat16] * 4, [torch.float64] * 4):
            problems = [inputs(kind, n, 3, dtype) for dtype, (_, n) in zip(dtypes, tensors, strict=True)]
            bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
            for density in ([0.2, 1.0, 0.57], [1e-6, 0.9, 0.03]):
                every = {**with_weights(options, 3), "lam": 0.3}
                whole = merge_scope(bases, experts, density, **every)
                for nonfinite in ("error", "propagate"):
                    calls = merge_in_calls(bases, experts, density, [1, 2, 1], nonfinite=nonfinite, **every)
                    for part, expected in zip(calls, whole, strict=True):
                        assert torch.equal(bits(part), bits(expected)), f"{kind.__name__} {dtypes} {density}"


def test_calls_under_the_paper_are_one_scope_without_draws() -> None:
    # the sign of a draw is that of the sum of all elected signs, which no call knows alone
    problems = [inputs(gaussian, n, 3, torch.float32) for n in (1_000, 20_000, 333)]
    bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
    whole = merge_scope(bases, experts, [0.2, 1.0, 0.57])
    for part, expected in zip(merge_in_calls(bases, experts, [0.2, 1.0, 0.57], [2, 1]), whole, strict=True):
        assert_same(part, expected)


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
@pytest.mark.parametrize("semantics", ["mergekit", "peft"])
def test_nonfinite_values_in_calls_that_share_their_limits(semantics: str, nonfinite: str) -> None:
    for dtype in DTYPES:
        problems = [inputs(grid, n, 2, dtype) for n in (100, 900)]
        bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
        for of_tensor in experts:
            of_tensor[0][[1, 10, 20, 30]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=dtype)
        # 1e-9: of expert 0 one NaN is the threshold under mergekit, nothing is kept under peft
        for density in ([1e-9, 0.2], [0.006, 1.0], [0.5, 1e-9]):
            options = {"semantics": semantics, "nonfinite": nonfinite}
            whole = merge_scope(bases, experts, density, **options)
            for part, expected in zip(merge_in_calls(bases, experts, density, [1, 1], **options), whole, strict=True):
                assert_same(part, expected, f"{dtype} {density}")


@st.composite
def scopes(draw: st.DrawFn) -> tuple[list[Tensor], list[list[Tensor]], list[int]]:
    """Tensors full of ties, and how many of them each call takes."""
    num_tasks, wide = draw(st.integers(1, 4)), draw(st.booleans())
    bases, experts = [], []
    for _ in range(draw(st.integers(1, 6))):
        dtype = torch.float64 if wide else draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        count = draw(st.integers(0, 12))
        whole = st.lists(st.integers(-2, 2), min_size=count, max_size=count)
        base, *of_tensor = [torch.tensor(draw(whole)).mul(0.1).to(dtype) for _ in range(num_tasks + 1)]
        bases.append(base)
        experts.append(of_tensor)
    ends = draw(st.lists(st.booleans(), min_size=len(bases) - 1, max_size=len(bases) - 1))
    calls = [1]
    for ends_here in ends:
        calls = [*calls, 1] if ends_here else [*calls[:-1], calls[-1] + 1]
    return bases, experts, calls


@given(scope=scopes(), data=st.data())
def test_any_calls_that_share_their_limits(
    scope: tuple[list[Tensor], list[list[Tensor]], list[int]], data: st.DataObject
) -> None:
    bases, experts, calls = scope
    num_tasks = len(experts[0])
    density = data.draw(st.lists(st.sampled_from([0.01, 0.2, 0.5, 1.0]), min_size=num_tasks, max_size=num_tasks))
    for semantics in ("mergekit", "peft"):
        whole = merge_scope(bases, experts, density, semantics=semantics)
        expected = reference.scope_merge(bases, list(zip(*experts, strict=True)), density=density, semantics=semantics)
        in_calls = merge_in_calls(bases, experts, density, calls, semantics=semantics)
        for part, of_whole, of_oracle in zip(in_calls, whole, expected, strict=True):
            assert torch.equal(bits(part), bits(of_whole))
            assert_same(part, of_oracle)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Inputs, dict[str, Any]]:
    dtype = draw(st.sampled_from(DTYPES))
    num_tasks = draw(st.integers(1, 6))
    count = draw(st.integers(0, 40))
    step = draw(st.sampled_from([1 / 64, 0.1, 3.0, 1e-7]))
    whole = st.lists(st.integers(-6, 6), min_size=count, max_size=count)
    base, *experts = [torch.tensor(draw(whole)).mul(step).to(dtype) for _ in range(num_tasks + 1)]
    options = dict(draw(st.sampled_from(merge_options())))
    if options.get("weights"):
        options["weights"] = draw(st.lists(st.floats(-2, 2), min_size=num_tasks, max_size=num_tasks))
    if dtype == torch.float64:
        options.pop("rescale", None)
    options["density"] = draw(st.lists(st.sampled_from([0.01, 0.2, 0.5, 1.0]), min_size=num_tasks, max_size=num_tasks))
    options["lam"] = draw(st.sampled_from([1.0, 0.3, -1.5]))
    return (base, experts), options


@given(problem=problems(), with_base=st.booleans())
def test_any_problem(problem: tuple[Inputs, dict[str, Any]], with_base: bool) -> None:
    (base, experts), options = problem
    check(base if with_base else None, experts, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=option_id)
def test_error_of_low_precision(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 20_001, 8, dtype)
    thresholds = [0.1] * 8
    for semantics in SEMANTICS:
        exact = reference.ties_merge(
            base, experts, thresholds=thresholds, semantics=semantics, compute_dtype=torch.float64
        )
        merged = ties_merge(base, experts, thresholds=thresholds, semantics=semantics).double()
        # elections that the storage's rounding of a task vector tips are boundary cases: few
        assert ((merged - exact).abs() > 2 * torch.finfo(dtype).eps * exact.abs().clamp(min=1)).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_out(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, (12, 21), 3, dtype)
    for semantics in SEMANTICS:
        expected = reference.ties_merge(base, experts, semantics=semantics)
        for layout in ("plain", "transposed", "strided", "unaligned"):
            out = torch.full_like(base, math.nan) if layout == "plain" else laid_out(torch.full_like(base, 9), layout)
            address = out.data_ptr()
            assert ties_merge(base, experts, semantics=semantics, out=out) is out
            assert out.data_ptr() == address
            assert_same(out, expected, layout)


def test_out_writes_nothing_around_it() -> None:
    base, experts = inputs(grid, 1_001, 3, torch.bfloat16)
    for offset in (0, 1, 5, 32):
        around = torch.full((1_100,), 7.0, dtype=torch.bfloat16)
        ties_merge(base, experts, out=around[offset : offset + 1_001])
        assert (around[:offset] == 7).all()
        assert (around[offset + 1_001 :] == 7).all()
        assert_same(around[offset : offset + 1_001], reference.ties_merge(base, experts))


def test_out_beside_an_input() -> None:
    base, experts = inputs(grid, 500, 2, torch.float32)
    together = torch.cat([base, *experts, torch.full((500,), math.nan)])
    parts = together.split(500)
    assert_same(ties_merge(parts[0], list(parts[1:3]), out=parts[3]), reference.ties_merge(base, experts))
    assert_same(parts[0], base)


def test_out_in_a_mapped_file(tmp_path: Path) -> None:
    base, experts = inputs(gaussian, 70_001, 3, torch.float32)
    expected = reference.ties_merge(base, experts)
    mapped = np.memmap(tmp_path / "numpy", dtype=np.float32, mode="w+", shape=(70_001,))
    ties_merge(base, experts, out=torch.from_numpy(mapped))
    mapped.flush()
    assert_same(torch.from_numpy(np.fromfile(tmp_path / "numpy", dtype=np.float32)), expected)
    ties_merge(base, experts, out=torch.from_file(str(tmp_path / "torch"), shared=True, size=70_001))
    assert_same(torch.from_numpy(np.fromfile(tmp_path / "torch", dtype=np.float32)), expected)


def test_inputs_in_a_read_only_mapped_file(tmp_path: Path) -> None:
    base, experts = inputs(gaussian, 70_001, 2, torch.float32)
    experts[0].numpy().tofile(tmp_path / "expert")
    mapped = torch.from_file(str(tmp_path / "expert"), shared=False, size=70_001)
    assert_same(ties_merge(base, [mapped, experts[1]]), reference.ties_merge(base, experts))


def test_gradients_stop_here() -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    merged = ties_merge(base.requires_grad_(), [expert.requires_grad_() for expert in experts])
    assert not merged.requires_grad
    with torch.inference_mode():
        assert_same(ties_merge(base, experts), merged)


def test_parameters_are_tensors() -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    merged = ties_merge(torch.nn.Parameter(base), [torch.nn.Parameter(expert) for expert in experts])
    assert_same(merged, reference.ties_merge(base, experts))
    assert type(merged) is Tensor


@pytest.mark.parametrize("size", [10, 1_000, 5_000])
def test_differences_that_overflow_tie_at_infinity(size: int) -> None:
    base = torch.full((size,), -60_000.0, dtype=torch.float16)
    expert = base.clone()
    expert[torch.arange(size) % 5 < 3] = 60_000.0
    for semantics in ("paper", "mergekit", "peft"):
        options = {"density": 0.2, "semantics": semantics, "nonfinite": "propagate"}
        merged = ties_merge(base, [expert], **options)
        assert_same(merged, reference.ties_merge(base, [expert], **options), semantics)
