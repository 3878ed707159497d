"""representation_loss's Triton kernels against the oracle: on a GPU, or in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference, representation_loss
from tests.borders import guarded_results, in_poisoned_memory
from tests.cases import DTYPES, Kind, assert_same, cancelling, denormal, gaussian, grid, inputs, large, option_id

kernels = pytest.importorskip(
    "surgery_kernels.triton.representation_loss", reason="there is no Triton for this platform"
)
pytestmark = pytest.mark.any_isa
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPS = torch.ops.surgery_kernels
SHAPES = [
    (1, 1), (3, 21), (8, 8), (5, 13), (2, 3, 7), (8, 16, 64), (2, 3, 4, 5), (257, 1, 3),
    (2, 3, kernels.CHUNK), (20_001, 1), (2, 9, 157, 111),
]  # fmt: skip


def problem(shape: tuple[int, ...], dtype: torch.dtype, kind: Kind = grid) -> tuple[Tensor, Tensor]:
    features, (targets,) = inputs(kind, shape, 1, dtype)
    return features, targets


def weights_like(loss: Tensor) -> Tensor:
    """Each loss has an incoming gradient of its own."""
    return 1.5 - torch.arange(loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)


def expected_of(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    loss = reference.representation_loss(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf, weights_like(loss))
    return loss.detach(), gradient


def results_of(gpu: torch.device, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss, signs = kernels.representation_loss(*(in_poisoned_memory(x.to(gpu)) for x in (features, targets)), True)
    gradient = kernels.representation_loss_backward(weights_like(loss), signs, features.dtype)
    return loss.cpu(), gradient.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(gpu: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features, targets = problem(shape, dtype)
    for x, y in zip(results_of(gpu, features, targets), expected_of(features, targets), strict=True):
        assert_same(x, y)
    without, signs = kernels.representation_loss(features.to(gpu), targets.to(gpu), False)
    assert_same(without.cpu(), expected_of(features, targets)[0], "without gradient")
    assert signs.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, cancelling, denormal, large], ids=option_id)
def test_every_kind_of_data(gpu: torch.device, kind: Kind, dtype: torch.dtype) -> None:
    features, targets = problem((3, 19, 41), dtype, kind)
    loss, gradient = results_of(gpu, features, targets)
    exact = reference.representation_loss(features.double(), targets.double()).to(loss.dtype)
    if kind is not large:  # in float32 that sum overflows, the oracle's too
        torch.testing.assert_close(loss, exact, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    assert_same(gradient, expected_of(features, targets)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(gpu: torch.device, dtype: torch.dtype) -> None:
    features, targets = problem((4, 7, 13), dtype)
    features[1, 2, [3, 5]] = math.nan
    targets[1, 4, 0] = math.nan
    features[2, 0, 0], targets[2, 1, 1] = math.inf, math.inf
    features[3, 6, 12] = targets[3, 6, 12] = -math.inf  # their difference is NaN
    loss, gradient = results_of(gpu, features, targets)
    expected_loss, expected_gradient = expected_of(features, targets)
    assert_same(loss, expected_loss)
    unknown = (features - targets).isnan()
    assert_same(gradient, expected_gradient.masked_fill(unknown, math.nan))  # torch's own abs has gradient 0 there


@pytest.mark.parametrize("grad", [math.inf, -math.inf, math.nan, 0.0, 3e38, 1e-30])
def test_incoming_gradients(gpu: torch.device, grad: float) -> None:
    features, targets = problem((2, 7, 13), torch.float32)
    loss, signs = kernels.representation_loss(features.to(gpu), targets.to(gpu), True)
    gradient = kernels.representation_loss_backward(torch.full_like(loss, grad), signs, torch.float32)
    leaf = features.clone().requires_grad_()
    reference.representation_loss(leaf, targets).backward(torch.full((2,), grad))
    assert_same(gradient.cpu(), leaf.grad)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0)], ids=str)
def test_empty(gpu: torch.device, shape: tuple[int, ...]) -> None:
    features, targets = torch.zeros(shape), torch.zeros(shape)
    for x, y in zip(results_of(gpu, features, targets), expected_of(features, targets), strict=True):
        assert_same(x, y)


def test_layouts(gpu: torch.device) -> None:
    features, targets = problem((3, 20, 33), torch.bfloat16)
    expected = results_of(gpu, features, targets)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (features, targets)]
    unaligned = [torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(x.shape) for x in (features, targets)]
    for moved in (turned, unaligned):
        for x, y in zip(results_of(gpu, *moved), expected, strict=True):
            assert_same(x, y)
    loss, signs = kernels.representation_loss(features.to(gpu), targets.to(gpu), True)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in (weights_like(loss), signs)]
    assert_same(kernels.representation_loss_backward(*strided, torch.bfloat16).cpu(), expected[1])


def test_nothing_is_written_beside_the_results(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((3, 5, 7), (2, 3, kernels.CHUNK + 1)):
        features, targets = problem(shape, torch.float32)
        with guarded_results(monkeypatch):
            actual = results_of(gpu, features, targets)
        for x, y in zip(actual, expected_of(features, targets), strict=True):
            assert_same(x, y)


def test_what_would_corrupt_memory_is_refused(gpu: torch.device) -> None:
    features, signs = torch.zeros(2, 3, 5, device=gpu), torch.zeros(2, 3, 5, dtype=torch.int8, device=gpu)
    for other in (features[:1], features.half()):
        with pytest.raises(
            RuntimeError, match="^targets must have the shape, dtype and device of features, got another$"
        ):
            kernels.representation_loss(features, other, True)
    message = "^grad must be one value for each of 2 means with int8 signs, got {}$"
    with pytest.raises(RuntimeError, match=message.format("3 and torch.int8")):
        kernels.representation_loss_backward(torch.ones(3), signs, torch.float32)
    with pytest.raises(RuntimeError, match=message.format("2 and torch.float32")):
        kernels.representation_loss_backward(torch.ones(2), features, torch.float32)


@needs_gpu
def test_opcheck() -> None:
    features, targets = (x.cuda() for x in problem((2, 3, 5), torch.bfloat16))
    for with_signs in (True, False):
        torch.library.opcheck(OPS.representation_loss, (features, targets, with_signs))
    loss, signs = OPS.representation_loss(features, targets, True)
    torch.library.opcheck(OPS.representation_loss_backward, (loss, signs, torch.bfloat16))


@needs_gpu
def test_compiled_and_in_a_cuda_graph() -> None:
    def step(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = representation_loss(features, targets)
        return loss.detach(), torch.autograd.grad(loss.sum(), features)[0]

    features, targets = (x.cuda() for x in problem((2, 30, 100), torch.float32))
    features.requires_grad_()
    torch.compiler.reset()
    loss = torch.compile(representation_loss, fullgraph=True)(features, targets)
    assert_same(loss.detach(), representation_loss(features, targets).detach())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(features, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(features, targets)
    targets.neg_()
    graph.replay()
    for x, y in zip(captured, step(features, targets), strict=True):
        assert_same(x, y)
