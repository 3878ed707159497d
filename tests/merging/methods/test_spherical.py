"""Methods on the sphere, against mergekit in float64 and by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import METHODS
from tests.cases import assert_same, gaussian, inputs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# An exact result is rounded once; mergekit's own float32 is off by its rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}

# name, number of experts, whether there is a base, ours, mergekit's
CASES: list[tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = [
    ("slerp", 1, True, {"t": 0.3}, {"t": 0.3}),
    ("slerp", 1, True, {"t": 1.5}, {"t": 1.5}),
    ("nuslerp", 2, True, {"weights": [0.3, 0.9]}, {"weight": [0.3, 0.9]}),
    ("nuslerp", 2, False, {"weights": [1.0, -1.0]}, {"weight": [1.0, -1.0]}),
    ("nuslerp", 2, True, {"flatten": False}, {"weight": [1.0, 1.0], "nuslerp_flatten": False}),
    (
        "nuslerp",
        2,
        False,
        {"weights": [0.2, 0.6], "flatten": False, "row_wise": True},
        {"weight": [0.2, 0.6], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    ("multislerp", 3, True, {"weights": [0.3, 0.9, 1.0]}, {"weight": [0.3, 0.9, 1.0]}),
    ("multislerp", 4, False, {"weights": 0.3, "normalize_weights": False}, {"weight": 0.3, "normalize_weights": False}),
    ("multislerp", 1, True, {}, {"weight": 1.0}),
    ("karcher", 3, False, {}, {}),
    ("karcher", 5, False, {"max_iter": 2, "tol": 1e-9}, {"max_iter": 2, "tol": 1e-9}),
    ("karcher", 1, False, {}, {}),
    ("model_stock", 2, True, {}, {}),
    ("model_stock", 5, True, {}, {}),
    ("model_stock", 3, True, {"filter_wise": True}, {"filter_wise": True}),
]


def merged(name: str, base: Tensor | None, experts: list[Tensor], **options: Any) -> Tensor:
    state = None if base is None else {"w": base}
    return merge_state_dicts(state, [{"w": expert} for expert in experts], method=name, **options)["w"]


def mergekits(name: str, base: Tensor | None, experts: list[Tensor], **parameters: Any) -> Tensor:
    tensors = experts if base is None else [base, *experts]
    return merge_tensors(tensors, name, parameters=parameters, base_index=None if base is None else 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (63,), (65, 33), (3, 20, 11), (20_001,)], ids=str)
@pytest.mark.parametrize(("name", "num_tasks", "has_base", "ours", "theirs"), CASES)
def test_as_mergekit(
    name: str,
    num_tasks: int,
    has_base: bool,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    base, experts = inputs(gaussian, math.prod(shape), num_tasks, dtype)
    base, experts = base.view(shape), [expert.view(shape) for expert in experts]
    given_base = base if has_base else None
    expected = mergekits(name, given_base, experts, **theirs)
    actual = merged(name, given_base, experts, **ours)
    tolerance = TOLERANCE[dtype] * 4 * float(max(x.abs().max() for x in [base, *experts]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


ROUNDED_NAMES = ["nuslerp", "multislerp", "karcher", "model_stock"]
ROUNDED = [case for case in CASES if case[0] in ("nuslerp", "multislerp", "model_stock")]


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "num_tasks", "has_base", "ours", "theirs"), ROUNDED)
def test_the_roundings_of_mergekit(
    name: str, num_tasks: int, has_base: bool, ours: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype
) -> None:
    """To the bit; but for a row whose sum lies so near the middle of two numbers that torch's order decides."""
    for shape in [(63,), (65, 33), (3, 20, 11), (20_001,)]:
        base, experts = inputs(gaussian, shape, num_tasks, dtype)
        given_base = base if has_base else None
        expected = mergekits(name, given_base, experts, **theirs)
        actual = merged(name, given_base, experts, **ours, arithmetic="mergekit")
        wrong = (actual != expected).reshape(-1, shape[-1])
        assert wrong.any(dim=1).sum() <= (1 if "filter_wise" in ours else 0), shape
        exact = merged(name, given_base, experts, **ours)
        assert num_tasks == 1 or not torch.equal(actual, exact)


def rounded_once(x: Tensor) -> Tensor:
    """torch.linalg.vector_norm, which adds up float32 in an order of its own, without what that loses."""
    return torch.tensor(x.double().square().sum().sqrt().item(), dtype=x.dtype)


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tasks", "options"),
    [(1, {}), (2, {}), (3, {}), (3, {"max_iter": 0}), (5, {"max_iter": 2, "tol": 1e-9}), (3, {"tol": 0.3})],
)
def test_the_roundings_of_karcher(
    num_tasks: int, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; but in large tensors for the last bit of a float32 norm, which torch's order of additions decides:
    what is divided by it then rounds to another number here and there."""
    for shape in [(63,), (65, 33), (3, 20, 11), (20_001,)]:
        _, experts = inputs(gaussian, shape, num_tasks, dtype)
        actual = merged("karcher", None, experts, **options, arithmetic="mergekit")
        expected = mergekits("karcher", None, experts, **options)
        assert int((actual != expected).sum()) <= (200 if shape == (20_001,) else 0), shape
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "vector_norm", rounded_once)
            assert_same(actual, mergekits("karcher", None, experts, **options))
        assert num_tasks == 1 or not torch.equal(actual, merged("karcher", None, experts, **options))


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_roundings_of_karcher_at_its_edges(dtype: torch.dtype) -> None:
    """Models of no direction, opposite ones, the same ones, and many."""
    _, (x, y) = inputs(gaussian, (9, 7), 2, dtype)
    _, many = inputs(gaussian, (40,), 64, dtype)
    zero = torch.zeros_like(x)
    for experts in ([zero, x, y], [x, zero], [zero, -zero], [-zero, -zero], [x, -x], [x, x, -x], [x, x, x], many):
        actual = merged("karcher", None, experts, arithmetic="mergekit")
        assert_same(actual, mergekits("karcher", None, experts))
    unknown = merged("karcher", None, [x, x * math.nan], arithmetic="mergekit", nonfinite="propagate")
    assert unknown.isnan().all()


@pytest.mark.any_isa
def test_karcher_is_exact_unless_asked() -> None:
    _, experts = inputs(gaussian, (65, 33), 3, torch.bfloat16)
    exact = merged("karcher", None, experts, arithmetic="exact")
    assert_same(merged("karcher", None, experts), exact)
    assert METHODS["karcher"].recipe_defaults()["arithmetic"] == "exact"


@pytest.mark.any_isa
@pytest.mark.parametrize("name", ROUNDED_NAMES)
def test_rounded_models_of_several_dtypes(name: str) -> None:
    """Tensors of 16 bits round every step, each as if it were alone; what is wider never does."""
    dtypes = {"half": torch.float16, "single": torch.float32, "short": torch.bfloat16, "empty": torch.bfloat16}
    drawn = {key: inputs(gaussian, (0,) if key == "empty" else (9, 7), 2, x) for key, x in dtypes.items()}
    base = {key: x for key, (x, _) in drawn.items()}
    experts = [{key: of[t] for key, (_, of) in drawn.items()} for t in range(2)]
    together = merge_state_dicts(base, experts, method=name, arithmetic="mergekit")
    for key, (x, of_tensor) in drawn.items():
        arithmetic = "exact" if key == "single" else "mergekit"
        assert_same(together[key], merged(name, x, of_tensor, arithmetic=arithmetic), key)


@pytest.mark.any_isa
@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "model_stock"])
def test_rounded_models_that_are_not_finite(name: str) -> None:
    base, experts = inputs(gaussian, (9, 7), 2, torch.bfloat16)
    known = [x.clone() for x in (base, *experts)]
    base[1, 1], experts[0][2, 3] = math.nan, math.inf
    known[0][1, 1] = known[1][1, 1] = known[2][1, 1] = 0.0
    known[1][2, 3] = base[2, 3]
    with pytest.raises(RuntimeError, match=r"^base must be finite, got 1 NaN or infinite values in tensor 'w'$"):
        merged(name, base, experts, arithmetic="mergekit")
    dropped = merged(name, base, experts, arithmetic="mergekit", nonfinite="drop")
    expected = merged(name, known[0], known[1:], arithmetic="mergekit")
    expected[1, 1] = math.nan
    assert_same(dropped, expected)
    if name != "model_stock":
        experts[1][0, 0] = -math.inf
        without = merged(name, None, experts, arithmetic="mergekit", nonfinite="drop")
        finite = [torch.where(x.isfinite(), x, 0.0) for x in experts]
        assert_same(without, merged(name, None, finite, arithmetic="mergekit"))


@pytest.mark.any_isa
def test_rounded_models_of_karcher_that_are_not_finite() -> None:
    _, experts = inputs(gaussian, (9, 7), 3, torch.bfloat16)
    experts[0][1, 1], experts[2][2, 3] = math.nan, -math.inf
    message = r"^experts\[0\] must be finite, got 1 NaN or infinite values in tensor 'w'$"
    with pytest.raises(RuntimeError, match=message):
        merged("karcher", None, experts, arithmetic="mergekit")
    dropped = merged("karcher", None, experts, arithmetic="mergekit", nonfinite="drop")
    finite = [torch.where(x.isfinite(), x, 0.0) for x in experts]
    assert_same(dropped, merged("karcher", None, finite, arithmetic="mergekit"))


@pytest.mark.any_isa
def test_rounded_models_that_cancel() -> None:
    x = torch.tensor([1.0, 2, -3], dtype=torch.bfloat16)
    halves = merged("multislerp", None, [x, -x], arithmetic="mergekit")
    assert_same(halves, mergekits("multislerp", None, [x, -x], weight=1.0))
    message = "^weights must leave a mean direction, got models that cancel in tensor 'w'$"
    with pytest.raises(ValueError, match=message):
        merged("multislerp", None, [x, -x, 0 * x], arithmetic="mergekit")
    assert_same(merged("multislerp", x, [x, x, x], arithmetic="mergekit"), x)
    one = torch.tensor([0.5], dtype=torch.float16)  # where mergekit divides 0 by 0
    assert merged("multislerp", None, [one, 2 * one], arithmetic="mergekit").item() == 0.75


def rounded_on(device: torch.device | str, name: str) -> Tensor:
    base, experts = inputs(gaussian, (13, 21), 2, torch.bfloat16)
    return merged(name, base.to(device), [x.to(device) for x in experts], arithmetic="mergekit").cpu()


@pytest.fixture(scope="module")
def rounded_on_the_cpu() -> dict[str, Tensor]:
    return {name: rounded_on("cpu", name) for name in ROUNDED_NAMES}


@pytest.mark.any_isa
@pytest.mark.parametrize("name", ROUNDED_NAMES)
def test_rounded_models_on_cuda(name: str, rounded_on_the_cpu: dict[str, Tensor], device: torch.device) -> None:
    assert_same(rounded_on(device, name), rounded_on_the_cpu[name])


@pytest.mark.any_isa
def test_rounded_models_of_64() -> None:
    """More pairs of models than a program adds up."""
    base, experts = inputs(gaussian, (40,), 64, torch.bfloat16)
    expected = mergekits("model_stock", base, experts)
    assert_same(merged("model_stock", base, experts, arithmetic="mergekit"), expected)


@pytest.mark.parametrize(("name", "num_tasks", "has_base", "ours", "theirs"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_exact_is_rounded_once(
    name: str, num_tasks: int, has_base: bool, ours: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype
) -> None:
    base, experts = inputs(gaussian, 2_049, num_tasks, dtype)
    given_base = base if has_base else None
    wide = mergekits(name, base.double() if has_base else None, [expert.double() for expert in experts], **theirs)
    actual = merged(name, given_base, experts, **ours)
    off = actual != wide.to(dtype)
    assert int(off.sum()) < 20  # where the exact value lies half-way between two
    step = torch.finfo(dtype).eps * wide.abs().clamp(min=1e-3)
    assert ((actual.double() - wide).abs() <= step).all()


def vectors(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_by_hand() -> None:
    a, b = vectors([1, 0], [0, 2])
    half = math.sqrt(0.5)
    close(merged("slerp", a, [b], t=0.5), [half, 2 * half])
    close(merged("slerp", a, [b], t=0.25), [math.sin(math.pi * 3 / 8), 2 * math.sin(math.pi / 8)])
    close(merged("multislerp", None, [a, b]), [1.5 * half, 1.5 * half])
    close(merged("multislerp", None, [a, b], weights=[1.0, 3.0]), [0.553399, 1.660196])
    x, y, z = vectors([1, 0, 0], [0, 2, 0], [0, 0, 3])
    close(merged("multislerp", None, [x, y, z], weights=[1.0, 1.0, 2.0]), [0.918559, 0.918559, 1.837117])
    close(merged("karcher", None, [a, b]), [1.5 * half, 1.5 * half])
    close(merged("karcher", None, [x, y, z]), [1.154701] * 3)
    zero = torch.zeros(2, dtype=torch.float64)
    close(merged("model_stock", zero, vectors([1, 0], [1, 1])), [0.828427, 0.414214])
    close(merged("model_stock", zero, vectors([3, 0], [0, 4])), [0.0, 0.0])


def test_zeros() -> None:
    zero, b = vectors([0, 0], [0, 2])
    close(merged("slerp", zero, [b], t=0.5), [0.0, math.sqrt(2)])  # mergekit's: a zero vector is at a right angle
    assert_same(merged("karcher", None, [zero, zero]), zero)
    close(merged("karcher", None, [zero, b]), [0.0, 1.0])  # the zero vector still shrinks the norm
    assert_same(merged("model_stock", b, [b, b]), b)
    assert_same(merged("nuslerp", b, [b, b], weights=1.0), b)
    assert_same(merged("multislerp", zero, [zero, zero]), zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_identical_models_and_empty_tensors(name: str, dtype: torch.dtype) -> None:
    _, (x,) = inputs(gaussian, 257, 1, dtype)
    count = {"slerp": 1, "nuslerp": 2}.get(name, 3)
    options = {"t": 0.4} if name == "slerp" else {}
    actual = merged(name, x, [x] * count, **options)
    torch.testing.assert_close(actual, x, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert merged(name, x[:0], [x[:0]] * count, **options).shape == (0,)


@given(t=st.floats(0, 1), seed=st.integers(0, 9))
def test_slerp_turns(t: float, seed: int) -> None:
    """Backwards it gives the same, and unit vectors stay unit vectors."""
    torch.manual_seed(seed)
    a, b = (x / x.norm() for x in torch.randn(2, 50, dtype=torch.float64))
    forth = merged("slerp", a, [b], t=t)
    torch.testing.assert_close(forth, merged("slerp", b, [a], t=1 - t), rtol=0, atol=1e-12)
    assert abs(float(forth.norm()) - 1) < 1e-12


def test_many_models() -> None:
    base, experts = inputs(gaussian, 1_000, 64, torch.float64)
    for name in ("multislerp", "model_stock"):
        theirs = {"weight": 1.0} if name == "multislerp" else {}
        torch.testing.assert_close(merged(name, base, experts), mergekits(name, base, experts, **theirs))
    torch.testing.assert_close(merged("karcher", None, experts), mergekits("karcher", None, experts))


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("slerp", 1, {}, "t must be given, got none"),
        ("slerp", 2, {"t": 0.5}, "experts must be exactly 1 for slerp, got 2"),
        ("nuslerp", 3, {}, "experts must be exactly 2 for nuslerp, got 3"),
        ("multislerp", 2, {"weights": [1.0, -1.0]}, "weights must have a sum other than 0, got [1.0, -1.0]"),
        ("multislerp", 2, {"eps": 0}, "eps must be finite and above 0, got 0"),
        ("karcher", 2, {"max_iter": 1.5}, "max_iter must be a whole number, got 1.5"),
        ("karcher", 2, {"tol": -1.0}, "tol must be finite and 0 or greater, got -1.0"),
        ("model_stock", 1, {}, "experts must be at least 2 for model_stock, got 1"),
    ],
)
def test_refused(name: str, count: int, options: dict[str, Any], message: str) -> None:
    base, experts = inputs(gaussian, 3, count, torch.float32)
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        merged(name, base, experts, **options)


def test_models_that_cancel() -> None:
    a, b, c = vectors([1, 0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)])
    with pytest.raises(ValueError, match="^weights must leave a mean direction, got models that cancel in tensor 'w'$"):
        merged("multislerp", None, [a, b, c])
    close(merged("multislerp", None, [a, -a], weights=[0.5, 0.5]), [0.0, 0.0])


def close(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=1e-6)
