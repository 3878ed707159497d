"""combine, forward and backward, against the oracle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, combine, reference
from tests.cases import DTYPES, KINDS, NUM_TASKS, assert_same, bits, gaussian, generator, inputs, option_id

SIZES = [0, 1, 63, 64, 65, 257, 20_001]


def offsets_of(num_params: int, *cuts: int) -> Tensor:
    """Blocks that end at the cuts within [0, num_params] and at the end."""
    return torch.tensor([0, *sorted(cut for cut in cuts if cut <= num_params), num_params])


def uneven_blocks(num_params: int) -> Tensor:
    """Empty ones at both ends and within, single parameters, a LayerNorm, and some that span the chunks of 16384."""
    return offsets_of(num_params, 0, 1, 1, 2, 35, 50, 818, 818, 16_383, 16_384, 32_769, num_params)


def problem(num_params: int, num_tasks: int, dtype: torch.dtype, kind: Any = gaussian) -> tuple[Tensor, Tensor]:
    base, experts = inputs(kind, num_params, num_tasks, dtype)
    return base, torch.stack(experts)


def coefficients_of(num_tasks: int, block_offsets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (num_tasks, block_offsets.numel() - 1)
    g = generator("coefficients", shape)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def exact_gradient(grad: Tensor, task_vectors: Tensor, block_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """<grad, task_vector> of every block in float64, and the sum of magnitudes that an error is measured by."""
    products = grad.double() * task_vectors.double()
    blocks = products.tensor_split(block_offsets[1:-1].tolist(), dim=1) if block_offsets.numel() > 1 else ()
    sums = [torch.stack([x.sum(dim=1), x.abs().sum(dim=1)]) for x in blocks]
    return tuple(torch.stack(sums, dim=-1)) if sums else tuple(grad.new_zeros(2, len(task_vectors), 0))


def check(base: Tensor, task_vectors: Tensor | Sequence[Tensor], coefficients: Tensor, block_offsets: Tensor) -> None:
    stack = task_vectors if isinstance(task_vectors, Tensor) else torch.stack(list(task_vectors))
    merged = combine(base, task_vectors, coefficients, block_offsets)
    assert_same(merged, reference.combine(base, stack, coefficients, block_offsets))
    grad = inputs(gaussian, base.numel(), 1, base.dtype)[1][0]
    (gradient,) = torch.autograd.grad(merged, coefficients, grad)
    assert gradient.dtype == coefficients.dtype
    exact, scale = exact_gradient(grad, stack, block_offsets)
    # each product and each of up to 128 sums of a lane is rounded, errors have random signs; then the result itself is
    compute = torch.finfo(compute_type(base.dtype))
    allowed = 8 * compute.eps * scale + torch.finfo(coefficients.dtype).eps * exact.abs()
    underflow = compute.smallest_normal * compute.eps * base.numel()
    error = (gradient.double() - exact).abs()
    assert (error <= allowed + underflow).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("num_params", SIZES)
def test_every_size(num_params: int, dtype: torch.dtype) -> None:
    base, task_vectors = problem(num_params, 3, dtype)
    for block_offsets in (offsets_of(num_params), uneven_blocks(num_params), torch.arange(min(num_params, 300) + 1)):
        block_offsets[-1] = num_params
        check(base, task_vectors, coefficients_of(3, block_offsets), block_offsets)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_task_vectors(num_tasks: int) -> None:
    for dtype in DTYPES:
        base, task_vectors = problem(1_300, num_tasks, dtype)
        block_offsets = uneven_blocks(1_300)
        check(base, task_vectors, coefficients_of(num_tasks, block_offsets), block_offsets)
        check(base, list(task_vectors), coefficients_of(num_tasks, block_offsets), block_offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.__name__ != "large"], ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, task_vectors = problem(2_000, 4, dtype, kind)
    block_offsets = uneven_blocks(2_000)
    check(base, task_vectors, coefficients_of(4, block_offsets), block_offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_every_dtype_of_coefficients(dtype: torch.dtype) -> None:
    base, task_vectors = problem(1_000, 3, dtype)
    block_offsets = uneven_blocks(1_000)
    for of_coefficients in {torch.float32, torch.float64, dtype}:
        check(base, task_vectors, coefficients_of(3, block_offsets, of_coefficients), block_offsets)


def test_no_blocks() -> None:
    check(torch.zeros(0), torch.zeros(2, 0), torch.zeros(2, 0, requires_grad=True), torch.tensor([0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_layouts(dtype: torch.dtype) -> None:
    base, task_vectors = problem(40_001, 3, dtype)
    block_offsets = uneven_blocks(40_001)
    coefficients = coefficients_of(3, block_offsets)
    expected = combine(base, task_vectors, coefficients, block_offsets)
    interleaved = torch.stack([base, *task_vectors], dim=1)
    for offset in (1, 2, 3):
        shifted = torch.cat([task_vectors.new_zeros(3, offset), task_vectors], dim=1)[:, offset:]
        check(torch.cat([base.new_zeros(offset), base])[offset:], shifted, coefficients, block_offsets)
    assert_same(combine(interleaved[:, 0], interleaved[:, 1:].t(), coefficients, block_offsets), expected)
    transposed = coefficients.detach().t().contiguous().t()
    every_second = torch.stack([block_offsets, block_offsets], dim=1)[:, 0]
    assert_same(combine(base, task_vectors, transposed, every_second), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_written_past_the_caches(dtype: torch.dtype) -> None:
    num_params = (9 << 20) // dtype.itemsize
    base, task_vectors = problem(num_params, 2, dtype)
    block_offsets = offsets_of(num_params, 1, 8, 1_000_000, 1_000_768, 1_000_769, 1_000_801)
    check(base, task_vectors, coefficients_of(2, block_offsets), block_offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(dtype: torch.dtype) -> None:
    base, task_vectors = problem(500, 3, dtype)
    base[3], task_vectors[1, 70], task_vectors[2, 170] = math.nan, math.inf, math.nan
    block_offsets = offsets_of(500, 50, 100, 150, 200, 300)
    coefficients = coefficients_of(3, block_offsets)
    # a payload of ones must not carry into the sign when it is rounded
    payload = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        coefficients[0, 4], coefficients[1, 5] = payload, math.inf
    merged = combine(base, task_vectors, coefficients, block_offsets)
    assert_same(merged, reference.combine(base, task_vectors, coefficients, block_offsets))
    assert merged[200:300].isnan().all()
    (gradient,) = torch.autograd.grad(merged.float().sum(), coefficients)
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1, 1] = expected[2, 3] = True
    assert torch.equal(~gradient.isfinite(), expected)


def test_gradient_of_a_large_block() -> None:
    """Everything in one block, all products positive: nothing cancels the rounding of a long sum."""
    num_params = 3_000_000
    grad, task_vector = torch.rand(2, num_params, generator=generator("large")).bfloat16().float().unbind()
    coefficients = torch.ones(1, 1, requires_grad=True)
    merged = combine(torch.zeros(num_params), [task_vector], coefficients, offsets_of(num_params))
    (gradient,) = torch.autograd.grad(merged, coefficients, grad)
    torch.testing.assert_close(gradient.double().squeeze(), grad.double() @ task_vector.double(), rtol=2e-7, atol=0)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_determinism(dtype: torch.dtype) -> None:
    """Instruction sets and threads change no bit, neither of the result nor of the gradient."""
    num_params = 150_001
    base, task_vectors = problem(num_params, 7, dtype)
    grad = inputs(gaussian, num_params, 1, dtype)[1][0]
    for block_offsets in (offsets_of(num_params), offsets_of(num_params, 5, 773, 773, 99_999, 100_017)):
        coefficients = coefficients_of(7, block_offsets)
        results = []
        for isa in _C.isas():
            _C.set_isa(isa)
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                merged = combine(base, task_vectors, coefficients, block_offsets)
                (gradient,) = torch.autograd.grad(merged, coefficients, grad)
                results.append((bits(merged.detach()), bits(gradient)))
        for of_merged, of_gradient in results:
            assert torch.equal(of_merged, results[0][0])
            assert torch.equal(of_gradient, results[0][1])


def double_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    base, task_vectors = problem(60, 3, torch.float64)
    block_offsets = offsets_of(60, 1, 1, 20)
    return base, task_vectors, coefficients_of(3, block_offsets, torch.float64), block_offsets


def test_gradcheck() -> None:
    base, task_vectors, coefficients, block_offsets = double_problem()

    def merge(coefficients: Tensor) -> Tensor:
        return combine(base, task_vectors, coefficients, block_offsets)

    assert torch.autograd.gradcheck(merge, coefficients)
    assert torch.autograd.gradgradcheck(lambda coefficients: merge(coefficients).sin(), coefficients)


@pytest.mark.any_isa
def test_opcheck() -> None:
    base, task_vectors, coefficients, block_offsets = double_problem()
    ops = torch.ops.surgery_kernels
    torch.library.opcheck(ops.combine, (base, list(task_vectors), coefficients, block_offsets))
    torch.library.opcheck(ops.combine_backward, (base.clone().requires_grad_(), list(task_vectors), block_offsets))


@pytest.mark.any_isa
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_compiled(dtype: torch.dtype, dynamic: bool) -> None:
    def loss(base: Tensor, task_vectors: Tensor, coefficients: Tensor, block_offsets: Tensor) -> Tensor:
        return combine(base, task_vectors, coefficients.clamp(0, 1), block_offsets).float().square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_params in (1_000, 333):
        base, task_vectors = problem(num_params, 3, dtype)
        block_offsets = offsets_of(num_params, 10, 200)
        coefficients = coefficients_of(3, block_offsets)
        results = []
        for call in (compiled, loss):
            value = call(base, task_vectors, coefficients, block_offsets)
            results.append((value, *torch.autograd.grad(value, coefficients)))
        for actual, expected in zip(*results, strict=True):
            assert_same(actual, expected)


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    with torch.device("meta"):
        base, task_vectors = torch.empty(7, dtype=torch.bfloat16), torch.empty(4, 7, dtype=torch.bfloat16)
        coefficients, block_offsets = torch.empty(4, 2, requires_grad=True), torch.empty(3, dtype=torch.int64)
        merged = combine(base, task_vectors, coefficients, block_offsets)
        (gradient,) = torch.autograd.grad(merged, coefficients, merged.detach())
    assert (merged.shape, merged.dtype) == ((7,), torch.bfloat16)
    assert (gradient.shape, gradient.dtype) == ((4, 2), torch.float32)


@pytest.mark.any_isa
def test_in_place_changes_between_forward_and_backward_are_noticed() -> None:
    base, task_vectors, coefficients, block_offsets = double_problem()
    merged = combine(base, task_vectors, coefficients, block_offsets)
    task_vectors.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        merged.sum().backward()


GOOD: dict[str, Any] = {
    "base": torch.zeros(4),
    "task_vectors": [torch.ones(4), torch.ones(4)],
    "coefficients": torch.ones(2, 3),
    "block_offsets": torch.tensor([0, 1, 1, 4]),
}

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("base must be a tensor, got NoneType", {"base": None}),
    ("base must be float64, float32, float16 or bfloat16, got torch.int64", {"base": torch.arange(4)}),
    (
        "base must be flat, [num_params], got shape (2, 2)",
        {"base": torch.zeros(2, 2), "task_vectors": torch.zeros(2, 2, 2)},
    ),
    ("base must not require a gradient, got one that does: detach it", {"base": torch.zeros(4, requires_grad=True)}),
    (
        "task_vectors must not require a gradient, got one that does: detach it",
        {"task_vectors": torch.zeros(2, 4, requires_grad=True)},
    ),
    (
        "task_vectors[1] must not require a gradient, got one that does: detach it",
        {"task_vectors": [torch.zeros(4), torch.zeros(4, requires_grad=True)]},
    ),
    ("task_vectors must be at least one tensor, got none", {"task_vectors": []}),
    (
        "task_vectors must be a list of tensors or one tensor [num_tasks, ...], got a 0-d tensor",
        {"task_vectors": torch.tensor(1.0)},
    ),
    ("task_vectors[1] must be a tensor, got float", {"task_vectors": [torch.ones(4), 1.0]}),
    ("task_vectors[0] must have the shape of base, (4,), got (5,)", {"task_vectors": torch.zeros(2, 5)}),
    (
        "task_vectors[0] must have the dtype of base, torch.float32, got torch.float64",
        {"task_vectors": torch.zeros(2, 4).double()},
    ),
    ("task_vectors[0] must be on the device of base, cpu, got meta", {"task_vectors": torch.ones(2, 4, device="meta")}),
    ("coefficients must be a tensor, got list", {"coefficients": [[1.0] * 3] * 2}),
    ("coefficients must have shape (2, 3), got (3, 2)", {"coefficients": torch.ones(3, 2)}),
    (
        "coefficients must be float32, float64 or the dtype of base, torch.float32, got torch.float16",
        {"coefficients": torch.ones(2, 3).half()},
    ),
    ("coefficients must be on the device of base, cpu, got meta", {"coefficients": torch.ones(2, 3, device="meta")}),
    ("block_offsets must be a tensor, got list", {"block_offsets": [0, 1, 1, 4]}),
    ("block_offsets must be int64, got torch.int32", {"block_offsets": torch.tensor([0, 1, 1, 4]).int()}),
    ("block_offsets must have shape (num_blocks + 1,), got ()", {"block_offsets": torch.tensor(0)}),
    (
        "block_offsets must have shape (num_blocks + 1,), got (0,)",
        {"block_offsets": torch.zeros(0, dtype=torch.int64)},
    ),
    (
        "block_offsets must be on the device of base, cpu, got meta",
        {"block_offsets": torch.zeros(4, dtype=torch.int64, device="meta")},
    ),
    ("block_offsets must start at 0, got 1", {"block_offsets": torch.tensor([1, 1, 1, 4])}),
    ("block_offsets must not decrease, got 1 after 2", {"block_offsets": torch.tensor([0, 2, 1, 4])}),
    (
        "block_offsets must end at the number of parameters, 4, got 5",
        {"block_offsets": torch.tensor([0, 1, 1, 5])},
    ),
]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.any_isa
@pytest.mark.parametrize(("message", "changes"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=exactly(message)):
        combine(**{**GOOD, **changes})


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("coefficients must be [2, 3] on the CPU, got another shape or device", {"coefficients": torch.ones(2, 2)}),
        ("coefficients must be in the compute type, got another dtype", {"coefficients": torch.ones(2, 3).double()}),
        (
            "block_offsets must be int64 [num_blocks + 1] on the CPU, got another dtype, shape or device",
            {"block_offsets": torch.zeros(4)},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_by_the_op_itself(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=exactly(message)):
        torch.ops.surgery_kernels.combine(**{**GOOD, **changes})


@pytest.mark.any_isa
def test_parameters_are_taken_where_no_gradient_is_recorded() -> None:
    base, task_vectors = torch.zeros(4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    with torch.no_grad():
        merged = combine(base, task_vectors, torch.ones(2, 1), offsets_of(4))
    assert_same(merged, torch.full((4,), 2.0))


@pytest.mark.any_isa
def test_no_temporary_is_as_large_as_an_input(run_python: Callable[..., str]) -> None:
    assert int(run_python("-c", PEAK)) < (32 << 20) // 4


PEAK = """
import torch
from tests.peak_memory import resident
from surgery_kernels import combine

torch.set_num_threads(2)
coefficients = torch.ones(3, 4, requires_grad=True)

def step(base, grad, *task_vectors):
    size = base.numel()
    block_offsets = torch.tensor([0, 768, 1536, size // 2, size])
    return torch.autograd.grad(combine(base, task_vectors, coefficients, block_offsets), coefficients, grad)

# what is imported at the first call is no memory of the op
step(*torch.zeros(5, 4000, dtype=torch.bfloat16))
tensors = [torch.empty(16 << 20, dtype=torch.bfloat16).normal_() for _ in range(5)]
before = resident("VmRSS")
step(*tensors)
print(resident("VmHWM") - before - (32 << 20))
"""
