"""surgery_adapter on a GPU: the public op, compiled, captured, on other streams and devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import reference, surgery_adapter
from tests.adapter_cases import Problem, problem, token_major
from tests.adapter_cases import results_of as expected_of
from tests.cases import DTYPES, generator, option_id

pytestmark = pytest.mark.any_isa

pytest.importorskip("surgery_kernels.triton.surgery_adapter", reason="there is no Triton for this platform")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPS = torch.ops.surgery_kernels


def on_gpu(given: Problem) -> list[Tensor]:
    return [x.cuda() for x in given]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_the_public_op_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    given = problem((3, 4, 50, 33), 5, dtype)
    for token_mean in (False, True):
        expected = expected_of(surgery_adapter, *given, token_mean=token_mean)
        actual = expected_of(surgery_adapter, *on_gpu(given), token_mean=token_mean)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
        for x, y in zip(actual, expected, strict=True):
            assert x.device.type == "cuda"
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert (x.cpu().double() - y.double()).norm() <= tolerance * y.double().norm()


@needs_gpu
@pytest.mark.parametrize("indexed", [False, True], ids=["grouped", "indexed"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_opcheck(adapter_dtype: torch.dtype, indexed: bool) -> None:
    features, down, up = on_gpu(problem((3, 4, 5, 8), 6))
    features, down, up = features.to(adapter_dtype), down.to(adapter_dtype), up.to(adapter_dtype)
    index = torch.arange(12, device="cuda") % 3 if indexed else None
    features = features.flatten(0, 1) if indexed else token_major(features)
    inputs = (features, down, up)
    torch.library.opcheck(OPS.surgery_adapter, (*inputs, index, True, False))
    corrected, means, hidden = OPS.surgery_adapter(*inputs, index, True, True)
    for need in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(OPS.surgery_adapter_backward, (corrected, means, *inputs, index, hidden, *need))
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(OPS.surgery_adapter, (*leaves, index, True, True))


@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiled(autocast: bool, dynamic: bool) -> None:
    def step(features: Tensor, down: Tensor, up: Tensor, token_mean: bool = True) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return surgery_adapter(features * 2, down, up, token_mean=token_mean)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 5, 32), (2, 4, 7, 32)):
        given = on_gpu(problem(shape, 6))
        for x, y in zip(
            expected_of(compiled, *given, token_mean=True), expected_of(step, *given, token_mean=True), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("indexed", [False, True], ids=["grouped", "indexed"])
def test_cuda_graph(indexed: bool) -> None:
    """Forward and backward are captured, and replayed with other features: nothing looks at the device."""
    features, down, up = on_gpu(problem((12, 50, 64), 16, num_tasks=3))
    index = torch.arange(12, device="cuda") % 3 if indexed else None
    shaped = features if indexed else features.unflatten(0, (3, 4))

    def step() -> list[Tensor]:
        return expected_of(surgery_adapter, shaped, down, up, task_index=index, token_mean=True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    features.copy_(torch.randn(features.shape, generator=generator(5)))
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


@needs_gpu
def test_side_stream() -> None:
    given = on_gpu(problem((2, 3, 50, 64), 16))
    expected = expected_of(surgery_adapter, *given)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # what runs on another stream reads the features before they are doubled
        doubled = [given[0] * 2, *given[1:]]
        actual = expected_of(surgery_adapter, doubled[0] / 2, *doubled[1:])
    side.synchronize()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    given = problem((2, 3, 50, 64), 16)
    expected = expected_of(surgery_adapter, *on_gpu(given))
    for x, y in zip(expected_of(surgery_adapter, *(x.to("cuda:1") for x in given)), expected, strict=True):
        assert x.device.index == 1
        assert torch.equal(x.cpu(), y.cpu())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=option_id)
@pytest.mark.parametrize("wide_features", [False, True], ids=["narrow", "wide"])
def test_autocast_is_like_a_pair_of_linear_layers(dtype: torch.dtype, wide_features: bool) -> None:
    """Dtype of the result, dtype of the gradients, and at most twice the error; adapters stay in float32."""
    features, down, up = on_gpu(problem((1, 64, 128), 16))
    if not wide_features:
        features = features.to(dtype)

    def pair(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return features - nn.functional.linear(nn.functional.linear(features, down[0]).relu(), up[0])

    exact = expected_of(reference.surgery_adapter, features.double(), down.double(), up.double())
    with torch.autocast("cuda", dtype):
        expected, actual = (expected_of(x, features, down, up) for x in (pair, surgery_adapter))
    for x, y, z in zip(actual, expected, exact, strict=True):
        assert x.dtype == y.dtype
        assert (x.double() - z).norm() <= 2 * (y.double() - z).norm() + 1e-6 * z.norm()
