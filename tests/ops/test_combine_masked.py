"""combine under a mask, forward and backward, against the oracle and autograd."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, combine, reference
from surgery_kernels.reference.combine import mask_of, means_of
from tests.cases import DTYPES, NUM_TASKS, assert_same, bits, gaussian, generator, inputs, option_id
from tests.ops.test_combine import coefficients_of, compute_type, offsets_of, problem, uneven_blocks

pytestmark = pytest.mark.any_isa  # test_determinism compares them all

# both kinds of noise at the temperatures that need no logarithm, and at others; none; 0 is a step
DRAWS: list[tuple[float, int | None]] = [(0.5, 7), (1.0, -3), (0.7, 2**63), (0.0, 1), (1.0, None), (0.0, None)]


def logits_of(num_params: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    drawn = torch.randn(num_params, generator=generator("logits", num_params), dtype=torch.float64)
    return (scale * drawn).to(dtype).requires_grad_()


def as_written(
    base: Tensor, task_vectors: Tensor, coefficients: Tensor, block_offsets: Tensor, logits: Tensor, mask: Tensor
) -> Tensor:
    """The paper's formula in float64, differentiable: the mask has the values of `mask`."""
    sizes = block_offsets.diff()
    x = logits.double()
    drawn = mask.double()
    values = drawn + (x - x.detach()) * (drawn * (1 - drawn) * 2)  # the derivative of the sigmoid at temperature 1/2
    means = torch.stack([m.mean() if len(m) else m.sum() + 1 for m in values.split(sizes.tolist())])
    of_param = coefficients.double().repeat_interleave(sizes, dim=1)
    return base.double() + values / means.repeat_interleave(sizes) * (of_param * task_vectors.double()).sum(dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("num_params", [0, 1, 63, 65, 257, 40_001])
def test_every_size(num_params: int, dtype: torch.dtype) -> None:
    base, task_vectors = problem(num_params, 3, dtype)
    for block_offsets in (offsets_of(num_params), uneven_blocks(num_params)):
        coefficients, logits = coefficients_of(3, block_offsets), logits_of(num_params)
        for temperature, seed in DRAWS:
            options: dict[str, Any] = {"mask_logits": logits, "temperature": temperature, "seed": seed}
            merged = combine(base, task_vectors, coefficients, block_offsets, **options)
            assert_same(merged, reference.combine(base, task_vectors, coefficients, block_offsets, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_gradients(dtype: torch.dtype) -> None:
    for num_params, num_tasks in ((257, 1), (40_001, 3), (900, 33)):
        base, task_vectors = problem(num_params, num_tasks, dtype)
        grad = inputs(gaussian, num_params, 1, dtype)[1][0]
        block_offsets = uneven_blocks(num_params)
        leaves = coefficients_of(num_tasks, block_offsets), logits_of(num_params)
        compute = compute_type(dtype)
        mask = mask_of(leaves[1].detach().to(compute), block_offsets, 0.5, 5)
        merged = combine(base, task_vectors, leaves[0], block_offsets, mask_logits=leaves[1], seed=5)
        expected = torch.autograd.grad(
            as_written(base, task_vectors, leaves[0], block_offsets, leaves[1], mask), leaves, grad.double()
        )
        for found, exact in zip(torch.autograd.grad(merged, leaves, grad), expected, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-4 * exact.abs().max().item())


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_task_vectors(num_tasks: int) -> None:
    base, task_vectors = problem(1_300, num_tasks, torch.bfloat16)
    block_offsets = uneven_blocks(1_300)
    coefficients, logits = coefficients_of(num_tasks, block_offsets), logits_of(1_300)
    merged = combine(base, list(task_vectors), coefficients, block_offsets, mask_logits=logits)
    expected = reference.combine(base, task_vectors, coefficients, block_offsets, mask_logits=logits)
    assert_same(merged, expected)


def test_by_hand() -> None:
    """Without noise at temperature 1/2 the mask of logits (0, ln 3) is (.5, .9), over its mean (5/7, 9/7)."""
    logits = torch.tensor([0.0, math.log(3)])
    base, ones = torch.zeros(2), torch.ones(1, 2)
    merged = combine(base, ones, torch.ones(1, 1), offsets_of(2), mask_logits=logits, seed=None)
    torch.testing.assert_close(merged, torch.tensor([5 / 7, 9 / 7]))
    logits[0] = -1
    hard = combine(base, ones, torch.ones(1, 1), offsets_of(2), mask_logits=logits, temperature=0, seed=None)
    assert_same(hard, torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.3, 2.0])
def test_masks_are_relaxed_bernoulli(temperature: float) -> None:
    """As torch draws them, by quantiles; at temperature 0 ones with probability sigmoid(logit)."""
    num_params = 200_000
    block_offsets = offsets_of(num_params)
    logits = torch.full((num_params,), 0.7)
    mask = mask_of(logits, block_offsets, temperature, 3).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.distributions.RelaxedBernoulli(torch.tensor(temperature), logits=logits.double()).sample()
    shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(mask.quantile(shares), theirs.quantile(shares), rtol=0, atol=0.01)
    ones = mask_of(logits, block_offsets, 0.0, 3)
    assert set(ones.tolist()) == {0.0, 1.0}
    assert abs(ones.mean() - 1 / (1 + math.exp(-0.7))) < 0.005
    assert torch.equal(ones == 1, mask > 0.5)  # the same noise


def test_a_block_of_one_element_is_scaled_by_one() -> None:
    """Whatever its logit, unless the mask is as good as nothing."""
    base, task_vectors = torch.ones(3), torch.tensor([[2.0, 3.0, 4.0]])
    logits = torch.tensor([-5.0, 8.0, -200.0])
    merged = combine(base, task_vectors, torch.ones(1, 3), torch.arange(4), mask_logits=logits)
    assert_same(merged, torch.tensor([3.0, 4.0, 1.0]))
    logits.requires_grad_()
    merged = combine(base, task_vectors, torch.ones(1, 3), torch.arange(4), mask_logits=logits)
    assert not torch.autograd.grad(merged, logits, torch.tensor([0.3, -0.7, 0.1]))[0].any()


def test_what_a_mask_depends_on() -> None:
    """The seed, the block and the place in it: not where the block lies."""

    def mask(sizes: list[int], seed: int) -> list[Tensor]:
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        n, blocks = int(offsets[-1]), len(sizes)
        merged = combine(
            torch.zeros(n), torch.ones(1, n), torch.ones(1, blocks), offsets, mask_logits=torch.zeros(n), seed=seed
        )
        return list(merged.split(sizes))

    first, second = mask([9, 20], 4), mask([9, 20], 4)
    assert all(map(torch.equal, first, second))
    assert torch.equal(mask([5, 20], 4)[1], first[1])
    assert not torch.equal(mask([9, 20], 5)[1], first[1])
    assert not torch.equal(mask([20, 20], 4)[0], mask([20, 20], 4)[1])


@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_determinism(dtype: torch.dtype) -> None:
    """Instruction sets and threads change no bit, neither of the result nor of the gradients."""
    num_params = 70_001
    base, task_vectors = problem(num_params, 5, dtype)
    grad = inputs(gaussian, num_params, 1, dtype)[1][0]
    block_offsets = offsets_of(num_params, 5, 773, 773, 60_017)
    leaves = coefficients_of(5, block_offsets), logits_of(num_params)
    for temperature, seed in ((0.5, 9), (0.7, 9)):
        results = []
        for isa in _C.isas():
            _C.set_isa(isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                merged = combine(
                    base, task_vectors, leaves[0], block_offsets, mask_logits=leaves[1], temperature=temperature,
                    seed=seed,
                )  # fmt: skip
                results.append([bits(x.detach()) for x in (merged, *torch.autograd.grad(merged, leaves, grad))])
        for result in results:
            assert all(map(torch.equal, result, results[0]))


def double_problem() -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    base, task_vectors = problem(60, 3, torch.float64)
    block_offsets = offsets_of(60, 1, 1, 20)
    return (
        base,
        list(task_vectors),
        coefficients_of(3, block_offsets, torch.float64),
        block_offsets,
        logits_of(60, torch.float64),
    )


@pytest.mark.parametrize(("temperature", "seed"), [(0.5, 4), (1.0, 4), (0.8, 4), (0.8, None)])
def test_gradcheck(temperature: float, seed: int | None) -> None:
    base, task_vectors, coefficients, block_offsets, logits = double_problem()

    def merge(coefficients: Tensor, logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"mask_logits": logits, "temperature": temperature, "seed": seed}
        return combine(base, task_vectors, coefficients, block_offsets, **options)

    assert torch.autograd.gradcheck(merge, (coefficients, logits))


def test_a_step_is_flat_and_a_collapsed_mask_has_no_mean() -> None:
    base, task_vectors, coefficients, block_offsets, logits = double_problem()
    merged = combine(base, task_vectors, coefficients, block_offsets, mask_logits=logits, temperature=0)
    assert not torch.autograd.grad(merged.sum(), logits)[0].any()
    collapsed = torch.full((60,), -30.0, dtype=torch.float64, requires_grad=True)
    mean = means_of(mask_of(collapsed.detach(), block_offsets, 0.5, 0), block_offsets)
    assert (mean == 1e-12).all()

    def merge(logits: Tensor) -> Tensor:
        return combine(base, task_vectors, coefficients.detach(), block_offsets, mask_logits=logits)

    assert torch.autograd.gradcheck(merge, collapsed, atol=1e-9)


def test_it_is_differentiated_once() -> None:
    base, task_vectors, coefficients, block_offsets, logits = double_problem()
    merged = combine(base, task_vectors, coefficients, block_offsets, mask_logits=logits)
    (gradient,) = torch.autograd.grad(merged.sin().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^combine with mask_logits must be differentiated once, got a second time"):
        gradient.sum().backward()


def test_opcheck() -> None:
    base, task_vectors, coefficients, block_offsets, logits = double_problem()
    ops = torch.ops.surgery_kernels
    arguments = (base, task_vectors, coefficients, block_offsets, logits)
    torch.library.opcheck(ops.combine_masked, (*arguments, 0.5, 3))
    means = ops.combine_masked(*arguments, 0.5, 3)[1]
    without = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(ops.combine_masked_backward, (*arguments, means, 0.5, 3), test_utils=without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_compiled(dtype: torch.dtype) -> None:
    def loss(base: Tensor, task_vectors: Tensor, coefficients: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        merged = combine(base, task_vectors, coefficients.clamp(0, 1), offsets, mask_logits=logits, seed=6)
        return merged.float().square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    base, task_vectors = problem(1_000, 3, dtype)
    block_offsets = offsets_of(1_000, 10, 200)
    leaves = coefficients_of(3, block_offsets), logits_of(1_000)
    results = []
    for call in (compiled, loss):
        value = call(base, task_vectors, leaves[0], block_offsets, leaves[1])
        results.append((value, *torch.autograd.grad(value, leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_what_is_not_finite_stays_in_its_block(dtype: torch.dtype) -> None:
    base, task_vectors = problem(300, 2, dtype)
    block_offsets = offsets_of(300, 100, 200)
    logits = logits_of(300).detach()
    # a payload of ones must not carry into the sign when it is rounded
    logits[150] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    logits[7], logits[8] = math.inf, -math.inf
    merged = combine(base, task_vectors, torch.ones(2, 3), block_offsets, mask_logits=logits)
    assert_same(merged, reference.combine(base, task_vectors, torch.ones(2, 3), block_offsets, mask_logits=logits))
    assert merged[100:200].isnan().all() and merged[:100].isfinite().all() and merged[200:].isfinite().all()


GOOD: dict[str, Any] = {
    "base": torch.zeros(4),
    "task_vectors": [torch.ones(4), torch.ones(4)],
    "coefficients": torch.ones(2, 3),
    "block_offsets": torch.tensor([0, 1, 1, 4]),
    "mask_logits": torch.zeros(4),
}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("mask_logits must be a tensor, got list", {"mask_logits": [0.0] * 4}),
        ("mask_logits must have shape (4,), got (5,)", {"mask_logits": torch.zeros(5)}),
        ("mask_logits must be on the device of base, cpu, got meta", {"mask_logits": torch.zeros(4, device="meta")}),
        (
            "mask_logits must be float32, float64 or the dtype of base, torch.float32, got torch.float16",
            {"mask_logits": torch.zeros(4).half()},
        ),
        ("temperature must be finite and 0 or greater, got -1.0", {"temperature": -1}),
        ("temperature must be finite and 0 or greater, got inf", {"temperature": math.inf}),
        ("temperature must be a number, got '1'", {"temperature": "1"}),
        ("seed must be an integer, got 1.5", {"seed": 1.5}),
        (f"seed must have 64 bits, got {2**64}", {"seed": 2**64}),
        ("seed must be an integer, got None", {"seed": None, "mask_logits": None, "coefficients": torch.ones(2, 3, 2)}),
        ("coefficients must have no groups with mask_logits, got both", {"coefficients": torch.ones(2, 3, 2)}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        combine(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("coefficients must be [2, 3] on the CPU, got another shape or device", {"coefficients": torch.ones(2, 2)}),
        ("coefficients must be in the compute type, got another dtype", {"coefficients": torch.ones(2, 3).double()}),
        ("mask_logits must be [4] on the CPU, got another shape or device", {"mask_logits": torch.zeros(3)}),
        ("mask_logits must be in the compute type, got another dtype", {"mask_logits": torch.zeros(4).double()}),
        ("temperature must be finite and 0 or greater, got -1", {"temperature": -1.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_by_the_op_itself(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.ops.surgery_kernels.combine_masked(**{**GOOD, "temperature": 0.5, "seed": 0, **changes})
    if set(changes) == {"temperature"}:
        arguments = [torch.zeros(4), *list(GOOD.values())[1:]]
        with pytest.raises(RuntimeError, match=r"^means must be float64 \[3\] on the CPU, got another dtype, shape or"):
            torch.ops.surgery_kernels.combine_masked_backward(*arguments, torch.ones(3), 0.5, 0)


def test_what_is_drawn_is_not_stored(run_python: Callable[..., str]) -> None:
    """Beside result and gradients less than a hundredth of what one-hot masks of 10 groups take in half precision."""
    masked, grouped = map(int, run_python("-c", PEAK).split())
    masks = 20 * (4 << 20)
    assert masked < 2 * (16 << 20) + masks // 100  # of float32, the result and the gradient of the logits
    assert grouped < (16 << 20) + masks // 100


PEAK = """
import torch
from tests.peak_memory import resident
from surgery_kernels import combine

torch.set_num_threads(2)

def step(drawn, base, grad, *task_vectors):
    offsets = torch.tensor([0, 768, base.numel()])
    coefficients = torch.ones(2, 2) if "mask_logits" in drawn else torch.ones(2, 2, 10)
    leaves = [coefficients.requires_grad_(), *drawn.values()]
    torch.autograd.grad(combine(base, task_vectors, coefficients, offsets, **drawn), leaves, grad)

def peak(drawn, tensors):
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is of now
    step(drawn, *tensors)
    return resident("VmHWM") - before

logits = torch.zeros(4 << 20, requires_grad=True)
tensors = [torch.randn(4 << 20) for _ in range(4)]
small = [x[:4000] for x in tensors]
for drawn in ({}, {"mask_logits": logits[:4000].detach().requires_grad_()}):
    step(drawn, *small)  # what is imported at the first call is no memory of the op
print(peak({"mask_logits": logits}, tensors), peak({}, tensors))
"""
