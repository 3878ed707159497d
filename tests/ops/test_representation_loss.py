"""representation_loss and its gradient against the oracle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, reference, representation_loss
from tests.cases import DTYPES, Kind, assert_same, bits, cancelling, denormal, gaussian, grid, inputs, large, option_id

OPS = torch.ops.surgery_kernels
FOLD, CHUNK = 512, 16384  # elements after which sums move on to double, and to another thread
SHAPES = [
    (1, 1), (3, 21), (8, 8), (5, 13), (2, 3, 7), (8, 16, 64), (2, 3, 4, 5), (3, 1, FOLD + 1),
    (2, 3, CHUNK), (CHUNK + 33, 1), (9, 157, 111),
]  # fmt: skip

Loss = Callable[[Tensor, Tensor], Tensor]


def problem(shape: tuple[int, ...], dtype: torch.dtype, kind: Kind = grid) -> tuple[Tensor, Tensor]:
    features, (targets,) = inputs(kind, shape, 1, dtype)
    return features, targets


def loss_and_gradient(loss_of: Loss, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a weighted sum of the losses: each has an incoming gradient of its own."""
    leaf = features.detach().requires_grad_()
    loss = loss_of(leaf, targets)
    weights = 1.5 - torch.arange(loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (loss * weights).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def tolerance_of(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features, targets = problem(shape, dtype)
    loss, gradient = loss_and_gradient(representation_loss, features, targets)
    expected_loss, expected_gradient = loss_and_gradient(reference.representation_loss, features, targets)
    assert_same(loss, expected_loss)
    assert_same(gradient, expected_gradient)
    assert_same(representation_loss(features, targets), loss, "without gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, cancelling, denormal, large], ids=option_id)
def test_every_kind_of_data(kind: Kind, dtype: torch.dtype) -> None:
    features, targets = problem((3, 19, 41), dtype, kind)
    loss, gradient = loss_and_gradient(representation_loss, features, targets)
    exact = reference.representation_loss(features.double(), targets.double()).to(loss.dtype)
    if kind is not large:  # in float32 that sum overflows, the oracle's too
        torch.testing.assert_close(loss, exact, **tolerance_of(dtype))
    assert_same(gradient, loss_and_gradient(reference.representation_loss, features, targets)[1])


def test_a_mean_over_many_elements() -> None:
    """0.1 is no multiple of a power of two: every addition of a running float32 sum would round the same way."""
    features = torch.full((1, 1), 0.1).expand(10_000, 1_000)
    loss = representation_loss(features, torch.zeros(()).expand(10_000, 1_000))
    torch.testing.assert_close(loss, torch.tensor(0.1), rtol=1e-6, atol=0)
    biased = torch.rand(3_000, 1_000, generator=torch.Generator().manual_seed(0))
    exact = reference.representation_loss(biased.double(), torch.zeros_like(biased).double()).float()
    torch.testing.assert_close(representation_loss(biased, torch.zeros_like(biased)), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(dtype: torch.dtype) -> None:
    features, targets = problem((4, 7, 13), dtype)
    features[1, 2, [3, 5]] = math.nan
    targets[1, 4, 0] = math.nan
    features[2, 0, 0], targets[2, 1, 1] = math.inf, math.inf
    features[3, 6, 12] = targets[3, 6, 12] = -math.inf  # their difference is NaN
    loss, gradient = loss_and_gradient(representation_loss, features, targets)
    expected_loss, expected_gradient = loss_and_gradient(reference.representation_loss, features, targets)
    unknown = (features - targets).isnan()
    assert unknown.sum() == 4
    assert_same(loss, expected_loss)
    assert_same(gradient, expected_gradient.masked_fill(unknown, math.nan))  # torch's own abs has gradient 0 there
    assert expected_gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("grad", [math.inf, -math.inf, math.nan, 0.0, 3e38, 1e-30])
def test_incoming_gradients(grad: float, dtype: torch.dtype) -> None:
    features, targets = problem((2, 7, 13), dtype)
    gradients = []
    for loss_of in (representation_loss, reference.representation_loss):
        leaf = features.clone().requires_grad_()
        loss = loss_of(leaf, targets)
        loss.backward(torch.full_like(loss, grad))
        gradients.append(leaf.grad)
    assert_same(*gradients)


def test_no_gradient_where_both_are_equal() -> None:
    features, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
    targets[0] = -0.0
    targets[1, 1, 2] = 1e-45
    gradient = loss_and_gradient(representation_loss, features, targets)[1]
    assert gradient.nonzero().tolist() == [[1, 1, 2]]
    assert gradient[1, 1, 2] == -0.5 / 15


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_layouts(dtype: torch.dtype) -> None:
    features, targets = problem((3, 2, 35, 65), dtype)
    expected = loss_and_gradient(representation_loss, features, targets)
    moved = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (features, targets)]
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (features, targets)]
    for case in (moved, shifted, [moved[0], targets], [features, shifted[1]]):
        loss, gradient = loss_and_gradient(representation_loss, *case)
        assert_same(loss, expected[0])
        assert_same(gradient, expected[1])
    for layout in (features[0, 0].expand(3, 2, 35, 65), features.transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert_same(representation_loss(features, layout), reference.representation_loss(features, layout))


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 5, 0), (0, 5), (0, 4, 5), (2, 0, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    features, targets = torch.zeros(shape), torch.zeros(shape)
    loss, gradient = loss_and_gradient(representation_loss, features, targets)
    assert_same(loss, reference.representation_loss(features, targets))
    assert_same(gradient, features)
    assert loss.isnan().all()


def test_streamed_gradient() -> None:
    """Beyond 8 MiB a gradient is written past the caches, but not at places of memory that are not aligned."""
    shape = (2, 1_500, 1_001)
    features, targets = problem(shape, torch.float32)
    gradient = loss_and_gradient(representation_loss, features, targets)[1]
    assert_same(gradient, loss_and_gradient(reference.representation_loss, features, targets)[1])


@pytest.mark.usefixtures("restored_threads", "restored_isa")
@pytest.mark.any_isa
def test_determinism() -> None:
    for dtype in DTYPES:
        features, targets = problem((3, 401, 333), dtype, gaussian)
        results = []
        for isa in _C.isas():
            for threads in (1, 2, 3, 7):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                results.append([bits(x) for x in loss_and_gradient(representation_loss, features, targets)])
        for loss, gradient in results:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])


@pytest.mark.any_isa
def test_one_loss_for_each_of_the_leading_dimensions() -> None:
    features, targets = problem((3, 4, 5, 67), torch.float32, gaussian)
    one_by_one = [representation_loss(f, t) for f, t in zip(features.flatten(0, 1), targets.flatten(0, 1), strict=True)]
    assert torch.equal(representation_loss(features, targets), torch.stack(one_by_one).view(3, 4))


@pytest.mark.any_isa
def test_targets_are_constants() -> None:
    features, targets = (x.requires_grad_() for x in problem((2, 3, 5), torch.float32))
    representation_loss(features, targets).sum().backward()
    assert features.grad is not None
    assert targets.grad is None
    assert not representation_loss(features.detach(), targets).requires_grad
    with torch.no_grad():
        assert not representation_loss(features, targets).requires_grad


@pytest.mark.any_isa
def test_gradcheck() -> None:
    features, targets = problem((2, 3, 4, 5), torch.float64, gaussian)
    assert ((features - targets).abs() > 1e-4).all()
    assert torch.autograd.gradcheck(lambda x: representation_loss(x, targets), features.requires_grad_())


@pytest.mark.any_isa
def test_differentiable_once() -> None:
    features, targets = problem((2, 3, 5), torch.float32)
    leaf = features.requires_grad_()
    loss = representation_loss(leaf, targets).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("with_signs", [True, False])
def test_opcheck(with_signs: bool, dtype: torch.dtype) -> None:
    features, targets = problem((2, 3, 5, 7), dtype)
    torch.library.opcheck(OPS.representation_loss, (features, targets, with_signs))
    _, signs = OPS.representation_loss(features, targets, True)
    grad = torch.ones(2, 3, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(OPS.representation_loss_backward, (grad, signs, dtype))


@pytest.mark.any_isa
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(representation_loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for shape in ((2, 3, 16, 24), (2, 5, 7, 24)):
        features, targets = problem(shape, torch.float32)
        expected = loss_and_gradient(representation_loss, features, targets)
        for actual, of_eager in zip(loss_and_gradient(compiled, features, targets), expected, strict=True):
            assert_same(actual, of_eager)
        assert_same(compiled(features, targets), expected[0])


@pytest.mark.any_isa
def test_autocast_takes_the_wider_dtype() -> None:
    features, targets = problem((2, 3, 5), torch.float32, gaussian)
    narrow = features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for pair in ((narrow, targets), (features, targets.bfloat16()), (narrow, targets.bfloat16())):
            loss, gradient = loss_and_gradient(representation_loss, *pair)
            expected_loss, expected_gradient = loss_and_gradient(
                reference.representation_loss, pair[0].float(), pair[1].float()
            )
            torch.testing.assert_close(loss, expected_loss)
            assert_same(gradient, expected_gradient.to(pair[0].dtype))


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    for dtype in DTYPES:
        features, targets = (torch.empty(4, 7, 5, 3, dtype=dtype, device="meta") for _ in range(2))
        loss, gradient = loss_and_gradient(representation_loss, features, targets)
        assert (tuple(loss.shape), loss.dtype) == ((4, 7), torch.promote_types(dtype, torch.float32))
        assert (gradient.shape, gradient.dtype) == (features.shape, dtype)


FEATURES = torch.zeros(2, 3, 5)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], FEATURES), "features must be a tensor, got list"),
        ((FEATURES, 1.0), "targets must be a tensor, got float"),
        (
            (FEATURES.long(), FEATURES),
            "features must be float64, float32, float16 or bfloat16, got torch.int64",
        ),
        ((FEATURES[0, 0], FEATURES), "features must be [..., rows, dim], got shape (5,)"),
        ((FEATURES, FEATURES[0]), "targets must have the shape of features, (2, 3, 5), got (3, 5)"),
        (
            (FEATURES, FEATURES.half()),
            "targets must have the dtype of features, torch.float32, got torch.float16",
        ),
        ((FEATURES, FEATURES.to("meta")), "targets must be on the device of features, cpu, got meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        representation_loss(*arguments)


@pytest.mark.any_isa
def test_ops_refuse_what_would_corrupt_memory() -> None:
    signs = torch.zeros(2, 3, 5, dtype=torch.int8)
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            "features must be [..., rows, dim], got 1 dimensions",
            lambda: OPS.representation_loss(torch.zeros(5), torch.zeros(5), True),
        ),
        (
            "targets must have the shape of features, got another",
            lambda: OPS.representation_loss(FEATURES, FEATURES[:1], True),
        ),
        (
            "targets must have the dtype of features, got another",
            lambda: OPS.representation_loss(FEATURES, FEATURES.half(), False),
        ),
        (
            "features must be float64, float32, float16 or bfloat16, got another dtype",
            lambda: OPS.representation_loss(FEATURES.long(), FEATURES.long(), True),
        ),
        (
            "signs must be int8, got another dtype",
            lambda: OPS.representation_loss_backward(torch.ones(2), FEATURES, torch.float32),
        ),
        (
            "grad must be one value for each of 2 means, got 3",
            lambda: OPS.representation_loss_backward(torch.ones(3), signs, torch.float32),
        ),
        (
            "grad must be float64 for float64 features and float32 for others, got another dtype",
            lambda: OPS.representation_loss_backward(torch.ones(2), signs, torch.float64),
        ),
        (
            "dtype must be float64, float32, float16 or bfloat16, got another dtype",
            lambda: OPS.representation_loss_backward(torch.ones(2), signs, torch.int32),
        ),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
            call()
