"""surgery_adapter under autograd, autocast and torch.compile."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from surgery_kernels import surgery_adapter
from tests.adapter_cases import bias_for, calls_of, problem, results_of, token_major
from tests.cases import DTYPES, generator, option_id

OPS = torch.ops.surgery_kernels


@pytest.mark.any_isa
@pytest.mark.parametrize("token_mean", [False, True], ids=["", "means"])
@pytest.mark.parametrize("indexed", [False, True], ids=["groups", "indexed"])
def test_gradcheck(indexed: bool, token_mean: bool) -> None:
    features, down, up = problem((2, 3, 4, 5), 3, torch.float64)
    index = torch.tensor([1, 0, 1, 1, 0, 1]) if indexed else None
    features = features.flatten(0, 1) if indexed else features
    of_features = down if index is None else down[index]
    hidden = torch.einsum("n...d,nrd->n...r", features, of_features)
    assert (hidden.abs() > 1e-4).all()  # a difference quotient must not cross the corner of relu
    leaves = [x.requires_grad_() for x in (features, down, up)]
    assert torch.autograd.gradcheck(lambda *x: surgery_adapter(*x, task_index=index, token_mean=token_mean), leaves)


@pytest.mark.any_isa
@pytest.mark.parametrize("indexed", [False, True], ids=["groups", "indexed"])
def test_gradcheck_of_a_linear_adapter(indexed: bool) -> None:
    features, down, up = problem((2, 3, 4, 5), 3, torch.float64)
    index = torch.tensor([1, 0, 1, 1, 0, 1]) if indexed else None
    features = features.flatten(0, 1) if indexed else features
    leaves = [x.requires_grad_() for x in (features, down, up, bias_for(down))]
    assert torch.autograd.gradcheck(
        lambda features, down, up, bias: surgery_adapter(
            features, down, up, bias=bias, activation="none", task_index=index, token_mean=True
        ),
        leaves,
    )


@pytest.mark.any_isa
def test_the_gradient_of_the_bias_alone() -> None:
    features, down, up = problem((2, 3, 5), 3)
    bias = bias_for(down).requires_grad_()
    with calls_of("surgery_adapter_backward") as calls:
        surgery_adapter(features, down, up, bias=bias).sum().backward()
    ((_, (*others, d_bias)),) = calls
    assert [x.numel() for x in others] == [0, 0, 0]
    assert bias.grad is not None and torch.equal(bias.grad, d_bias) and torch.equal(d_bias, torch.full((2, 5), -3.0))


@pytest.mark.any_isa
def test_differentiable_once() -> None:
    features, down, up = (x.requires_grad_() for x in problem((2, 3, 5), 3))
    (gradient,) = torch.autograd.grad(surgery_adapter(features, down, up).square().sum(), features, create_graph=True)
    message = "surgery_adapter must be differentiated once, got a gradient of its gradient"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        gradient.sum().backward()


@pytest.mark.any_isa
@pytest.mark.parametrize(
    "needed", [(True, True, True), (False, True, True), (True, False, False), (False, False, True)], ids=str
)
def test_only_what_is_needed(needed: tuple[bool, ...]) -> None:
    arguments = problem((2, 3, 5), 3)
    leaves = [x.requires_grad_(need) for x, need in zip(arguments, needed, strict=True)]
    with calls_of("surgery_adapter_backward") as calls:
        surgery_adapter(*leaves).sum().backward()
    assert [x.grad is not None for x in leaves] == list(needed)
    ((_, (d_features, d_down, d_up, _)),) = calls
    adapter = needed[1] or needed[2]
    assert (d_features.numel() > 0, d_down.numel() > 0, d_up.numel() > 0) == (needed[0], adapter, adapter)
    everything = [x.detach().requires_grad_() for x in arguments]
    surgery_adapter(*everything).sum().backward()
    for x, y in zip(leaves, everything, strict=True):
        assert x.grad is None or torch.equal(x.grad, y.grad)


@pytest.mark.any_isa
def test_hidden_is_kept_for_a_gradient_alone() -> None:
    features, down, up = problem((2, 3, 5), 4)
    with calls_of("surgery_adapter") as calls:
        surgery_adapter(features, down, up)
        with torch.no_grad():
            surgery_adapter(features, down.requires_grad_(), up)
        surgery_adapter(features, down, up)
    assert [hidden.numel() for _, (_, _, hidden) in calls] == [0, 0, 2 * 3 * 4]


@pytest.mark.any_isa
@pytest.mark.parametrize("token_mean", [False, True], ids=["", "means"])
@pytest.mark.parametrize("indexed", [False, True], ids=["groups", "indexed"])
def test_opcheck(indexed: bool, token_mean: bool) -> None:
    dtype = torch.bfloat16 if indexed else torch.float32
    features, down, up = problem((3, 4, 5, 7), 6, dtype)
    index = torch.arange(12) % 3 if indexed else None
    features = features.flatten(0, 1) if indexed else token_major(features)
    inputs = (features, down, up)
    torch.library.opcheck(OPS.surgery_adapter, (*inputs, index, token_mean, False))
    corrected, means, hidden = OPS.surgery_adapter(*inputs, index, token_mean, True)
    grads = [(corrected, means if token_mean else None), (None, means)][: 1 + token_mean]
    for grad, grad_means in grads:
        for need in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(OPS.surgery_adapter_backward, (grad, grad_means, *inputs, index, hidden, *need))
    linear = {"bias": bias_for(down), "activation": "none"}
    torch.library.opcheck(OPS.surgery_adapter, (*inputs, index, token_mean, True), linear)
    given = (corrected, None, *inputs, index, hidden, False, False, True, "none")
    torch.library.opcheck(OPS.surgery_adapter_backward, given)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(OPS.surgery_adapter, (*leaves, index, token_mean, True))
    linear["bias"].requires_grad_()
    torch.library.opcheck(OPS.surgery_adapter, (*leaves, index, token_mean, True), linear)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), ("inductor", True)],
    ids=["eager-static", "eager-dynamic", "inductor"],
)
def test_compiled(backend: str, dynamic: bool) -> None:
    def step(features: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return surgery_adapter(features * 2, down, up, token_mean=True)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for shape in ((2, 3, 5, 33), (2, 4, 7, 33)):
        arguments = problem(shape, 6)
        with torch.no_grad():
            assert torch.equal(compiled(*arguments)[0], step(*arguments)[0])
        arguments = (token_major(arguments[0]), *arguments[1:])
        expected = results_of(lambda *x, **_: step(*x), *arguments, token_mean=True)
        actual = results_of(lambda *x, **_: compiled(*x), *arguments, token_mean=True)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=option_id)
def test_autocast(dtype: torch.dtype) -> None:
    """Activations come in the narrow dtype, adapters stay in float32, and so do their gradients."""
    features, down, up = problem((2, 3, 33), 5)
    leaves = [x.requires_grad_() for x in (features, down, up)]
    layer = torch.randn(33, 33, generator=generator(3))
    with torch.autocast("cpu", dtype=dtype):
        activations = features @ layer
        corrected = surgery_adapter(activations, down, up)
    assert activations.dtype == corrected.dtype == dtype
    assert torch.equal(corrected, surgery_adapter(activations.detach(), down, up))
    corrected.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


@pytest.mark.any_isa
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_results() -> None:
    for dtype in DTYPES:
        arguments = problem((3, 4, 5, 7), 6, dtype)
        for features in (arguments[0], token_major(arguments[0])):
            real = results_of(surgery_adapter, features, *arguments[1:], token_mean=True)
            fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in arguments[1:]]
            fake = torch.empty_strided(features.shape, features.stride(), dtype=dtype, device="meta")
            leaves = [x.requires_grad_() for x in (fake, *fakes)]
            results = surgery_adapter(*leaves, token_mean=True)
            gradients = torch.autograd.grad(results, leaves, [torch.empty_like(x) for x in results])
            for x, y in zip((*results, *gradients), real, strict=True):
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
