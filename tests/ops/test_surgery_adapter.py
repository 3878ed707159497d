"""surgery_adapter and its gradients against the oracle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from surgery_kernels import _C, reference, surgery_adapter
from tests.cases import DTYPES, bits, generator, option_id

OPS = torch.ops.surgery_kernels
BLOCK = 96  # rows that the kernel takes at a time
DIMS = [1, 5, 33, 64, 768]
RANKS = [1, 3, 16, 33, 80]

Adapter = Callable[..., Any]
Problem = tuple[Tensor, Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def problem(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float32, num_tasks: int | None = None
) -> Problem:
    """Gaussian features, and adapters that move them by about as much as they are."""
    g = generator(shape, rank, num_tasks)
    num_tasks, dim = shape[0] if num_tasks is None else num_tasks, shape[-1]
    features = torch.randn(shape, generator=g, dtype=torch.float64)
    down = torch.randn(num_tasks, rank, dim, generator=g, dtype=torch.float64) / max(dim, 1) ** 0.5
    up = torch.randn(num_tasks, dim, rank, generator=g, dtype=torch.float64) / max(rank, 1) ** 0.5
    return features.to(dtype), down.to(wide(dtype)), up.to(wide(dtype))


def token_major(features: Tensor) -> Tensor:
    """[num_tasks, batch, tokens, dim] as a view of [tokens, num_tasks * batch, dim]."""
    activations = features.permute(2, 0, 1, 3).contiguous()
    return activations.permute(1, 2, 0, 3)


def in_wider_memory(features: Tensor) -> Tensor:
    """Rows apart from each other, at places that are not aligned."""
    return torch.cat([features, features[..., :1]], dim=-1)[..., :-1]


def weights_like(x: Tensor) -> Tensor:
    """The incoming gradient of x: uneven, exact in every dtype."""
    return ((torch.arange(x.numel()) * 7 % 33 - 16) / 16).reshape(x.shape).to(x.dtype)


def results_of(adapter: Adapter, features: Tensor, down: Tensor, up: Tensor, **options: Any) -> list[Tensor]:
    """Corrected features, means where asked for, and the gradients of features, down and up."""
    leaves = [x.detach().requires_grad_() for x in (features, down, up)]
    results = adapter(*leaves, **options)
    results = list(results) if options.get("token_mean") else [results]
    gradients = torch.autograd.grad(results, leaves, [weights_like(x) for x in results])
    return [*(x.detach() for x in results), *gradients]


def assert_close_to_reference(features: Tensor, down: Tensor, up: Tensor, **options: Any) -> None:
    """Twice the error of the reference in the same dtype, both taken from float64.

    The reference sums by blocks, the kernels one product after another, whose rounding errors grow like the square root
    of the number of products: that much is added, at the largest value there is.
    """
    exact = results_of(reference.surgery_adapter, features.double(), down.double(), up.double(), **options)
    expected = results_of(reference.surgery_adapter, features, down, up, **options)
    actual = results_of(surgery_adapter, features, down, up, **options)
    products = max(features.shape[-1], down.shape[1], features.shape[:-1].numel(), 1)
    for name, x, y, z in zip(["corrected", "...", "...", "...", "up"], actual, expected, exact, strict=False):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        if x.numel() == 0:
            continue
        rounding = torch.finfo(wide(x.dtype)).eps * products**0.5 * float(z.abs().max())
        error, allowed = (float((a.double() - z).abs().max()) for a in (x, y))
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, the reference's {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("dim", DIMS)
def test_every_dim_and_rank(dim: int, dtype: torch.dtype) -> None:
    for rank in RANKS:
        assert_close_to_reference(*problem((3, 7, dim), rank, dtype))
        assert_close_to_reference(*problem((2, 3, 5, dim), rank, dtype), token_mean=True)


@pytest.mark.parametrize("rank", [2, 4, 5, 6, 7, 8, 15, 17, 31, 32, 47, 48, 49, 63, 64, 65, 79])
def test_every_tile(rank: int) -> None:
    """Tiles of products are as wide as 1, 2 or 4 vectors and as high as 1, 4, 6 or 12 rows."""
    for rows in (1, 2, 3, 5, 6, 11, 13):
        assert_close_to_reference(*problem((2, rows, 20 + rank), rank))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5, 1_700])
def test_many_rows(rows: int, dtype: torch.dtype) -> None:
    assert_close_to_reference(*problem((2, rows, 24), 6, dtype))
    assert_close_to_reference(*problem((1, 3, rows, 24), 6, dtype), token_mean=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_layouts(dtype: torch.dtype) -> None:
    features, down, up = problem((3, 4, 50, 33), 5, dtype)
    expected = results_of(surgery_adapter, features, down, up, token_mean=True)
    for layout in (token_major, in_wider_memory, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        moved = layout(features)
        assert moved.stride() != features.stride()
        for x, y in zip(results_of(surgery_adapter, moved, down, up, token_mean=True), expected, strict=True):
            assert torch.equal(bits(x), bits(y))
    assert token_major(features).stride() == (4 * 33, 33, 3 * 4 * 33, 1)


@pytest.mark.any_isa
def test_strides_of_the_results() -> None:
    features, down, up = problem((3, 4, 50, 33), 5)
    activations = torch.randn(50, 3 * 4, 33)
    view = activations.view(50, 3, 4, 33).permute(1, 2, 0, 3)
    for x in (features, view):
        corrected, d_features, *_ = results_of(surgery_adapter, x, down, up)
        assert corrected.stride() == d_features.stride() == x.stride()
    corrected = surgery_adapter(view, down, up)
    assert corrected.permute(2, 0, 1, 3).view(50, 3 * 4, 33).is_contiguous()
    by_sample = view.flatten(0, 1)
    index = torch.arange(3).repeat_interleave(4)
    assert surgery_adapter(by_sample, down, up, task_index=index).stride() == by_sample.stride()


@pytest.mark.any_isa
def test_no_copy_of_a_view() -> None:
    features, down, up = problem((3, 4, 50, 33), 5)
    view = token_major(features)
    with calls_of("surgery_adapter") as calls:
        surgery_adapter(view, down, up)
    assert calls[0][0][0].data_ptr() == view.data_ptr()


def test_memory_that_overlaps() -> None:
    """Expanded features, features whose rows overlap, and last dimensions of any stride."""
    _, down, up = problem((3, 4, 33), 5)
    signal = torch.randn(400, generator=generator(0))
    for features in (
        signal[:33].expand(3, 4, 33),
        signal[:99].view(3, 1, 33).expand(3, 4, 33),
        signal.unfold(0, 33, 1)[:12].unflatten(0, (3, 4)),
        signal[:396].view(3, 33, 4).transpose(1, 2),
        signal[:1].expand(3, 4, 33),
    ):
        actual = results_of(surgery_adapter, features, down, up)
        expected = results_of(surgery_adapter, features.contiguous(), down, up)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)


def test_layouts_of_incoming_gradients() -> None:
    features, down, up = (x.requires_grad_() for x in problem((3, 4, 50, 33), 5))
    corrected, means = surgery_adapter(features, down, up, token_mean=True)
    grad, grad_means = weights_like(corrected), weights_like(means)

    def gradients(of_corrected: Tensor | None, of_means: Tensor | None) -> tuple[Tensor, ...]:
        given = [(x, g) for x, g in ((corrected, of_corrected), (means, of_means)) if g is not None]
        results, grads = zip(*given, strict=True)
        return torch.autograd.grad(results, (features, down, up), grads, retain_graph=True)

    def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    expected = gradients(grad, grad_means)
    turned = grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    for other in (token_major(grad), in_wider_memory(grad), turned):
        for of_means in (grad_means.transpose(0, 1).contiguous().transpose(0, 1), in_wider_memory(grad_means)):
            assert equal(gradients(other, of_means), expected)
    one = torch.ones(())
    assert equal(gradients(one.expand_as(grad), None), gradients(torch.ones_like(grad), None))
    assert equal(gradients(None, one.expand_as(means)), gradients(None, torch.ones_like(means)))
    assert equal(gradients(grad, None), gradients(grad, torch.zeros_like(means)))
    assert equal(gradients(None, grad_means), gradients(torch.zeros_like(grad), grad_means))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("tokens", [None, 1, 50])
def test_task_index(tokens: int | None, dtype: torch.dtype) -> None:
    """Unsorted, and there is a task that no sample asks for."""
    rows, num_tasks, dim = 23, 5, 33
    features, down, up = problem((rows, tokens, dim) if tokens else (rows, dim), 6, dtype, num_tasks)
    index = torch.tensor([4, 0, 0, 2, 1, 4, 2, 0])[torch.arange(rows) % 8]
    for options in ({}, {"token_mean": True}) if tokens else ({},):
        assert_close_to_reference(features, down, up, task_index=index, **options)
    *_, d_down, d_up = results_of(surgery_adapter, features, down, up, task_index=index)
    assert d_down[3].count_nonzero() == d_up[3].count_nonzero() == 0
    assert d_down[2].count_nonzero() > 0
    strided = torch.stack([index, index], dim=1)[:, 0]
    assert torch.equal(
        surgery_adapter(features, down, up, task_index=strided), surgery_adapter(features, down, up, task_index=index)
    )


def test_task_index_equals_groups() -> None:
    features, down, up = problem((3, 7, 50, 33), 6)
    order = torch.randperm(21, generator=generator(1))
    index = torch.arange(3).repeat_interleave(7)[order]
    grouped = results_of(surgery_adapter, features, down, up, token_mean=True)[:2]
    samples = features.flatten(0, 1)[order]
    indexed = results_of(surgery_adapter, samples, down, up, task_index=index, token_mean=True)[:2]
    for x, y in zip(indexed, grouped, strict=True):
        assert torch.equal(x, y.flatten(0, 1)[order])


@pytest.mark.parametrize(
    ("shape", "rank", "num_tasks"),
    [
        ((3, 4, 33), 0, 3), ((3, 4, 0), 5, 3), ((3, 0, 33), 5, 3), ((0, 4, 33), 5, 0), ((3, 0, 5, 33), 5, 3),
        ((3, 4, 5, 0), 0, 3), ((0, 4, 0, 33), 0, 0),
    ],
    ids=str,
)  # fmt: skip
def test_empty(shape: tuple[int, ...], rank: int, num_tasks: int) -> None:
    features, down, up = problem(shape, rank, num_tasks=num_tasks)
    actual = results_of(surgery_adapter, features, down, up)
    for x, y in zip(actual, results_of(reference.surgery_adapter, features, down, up), strict=True):
        assert torch.equal(x, y)
    assert_close_to_reference(features, down, up)
    if num_tasks:
        by_sample = features.flatten(0, 1)
        index = torch.zeros(len(by_sample), dtype=torch.int64)
        assert surgery_adapter(by_sample, down, up, task_index=index).shape == by_sample.shape


def test_the_mean_over_no_tokens_is_nan() -> None:
    """Everywhere, whatever the memory held."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    features, down, up = problem((3, 4, 0, 33), 5)
    for _ in range(3):
        torch.zeros(3, 4, 33).sum()  # its memory comes next
        corrected, means, d_features, d_down, d_up = results_of(surgery_adapter, features, down, up, token_mean=True)
        assert means.isnan().all()
        assert corrected.numel() == d_features.numel() == 0
        assert d_down.count_nonzero() == d_up.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_row_stays_alone(value: float, dtype: torch.dtype) -> None:
    features, down, up = problem((2, 3, 30, 37), 5, dtype)
    expected = results_of(surgery_adapter, features, down, up, token_mean=True)
    features[1, 1, 7, 36] = value
    spoilt = results_of(surgery_adapter, features, down, up, token_mean=True)
    oracle = results_of(reference.surgery_adapter, features, down, up, token_mean=True)
    for x, y in zip(spoilt, oracle, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(x), kind(y))
    others = torch.ones(2, 3, 30, dtype=torch.bool)
    others[1, 1, 7] = False
    for i in (0, 2):  # corrected, the gradient of features
        assert torch.equal(spoilt[i][others], expected[i][others])
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(spoilt[1][others], expected[1][others])
    for x, y in zip(spoilt[3:], expected[3:], strict=True):
        assert torch.equal(x[0], y[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=option_id)
def test_an_infinite_hidden_stays_in_its_columns(dtype: torch.dtype) -> None:
    """Infinity times a padded zero is NaN, which must reach nothing."""
    features, down, up = problem((2, 4, 5), 3, dtype)
    down[1, 2], up[1, :, 2] = torch.finfo(dtype).max, 1
    features[1] = 2
    actual = results_of(surgery_adapter, features, down, up)
    for x, y in zip(actual, results_of(reference.surgery_adapter, features, down, up), strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(x), kind(y))
    assert actual[0].isneginf().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nan_of_any_bits(dtype: torch.dtype) -> None:
    features, down, up = problem((2, 4, 37), 5, dtype)
    if dtype != torch.float64:
        up.view(torch.int32)[1] = -1  # what memset leaves: rounding it to bfloat16 carries into the sign
        down.view(torch.int32)[1] = 0x7FFFFFFF
    else:
        up[1] = down[1] = math.nan
    corrected = surgery_adapter(features, down, up)
    assert corrected[0].isfinite().all()
    assert corrected[1].isnan().all()


def test_relu_has_no_gradient_at_zero() -> None:
    features, down, up = problem((1, 4, 5), 3)
    down.zero_()
    _, d_features, d_down, d_up = results_of(surgery_adapter, features, down, up)
    assert torch.equal(d_features, weights_like(features))
    assert d_down.count_nonzero() == d_up.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=option_id)
def test_dtypes_of_the_adapter(dtype: torch.dtype) -> None:
    """In that of the features or in float32; gradients come in each one's own."""
    features, down, up = problem((3, 7, 33), 5, dtype)
    for of_adapter in (dtype, torch.float32):
        stored = [x.to(of_adapter) for x in (down, up)]
        corrected, d_features, d_down, d_up = results_of(surgery_adapter, features, *stored)
        assert corrected.dtype == d_features.dtype == dtype
        assert d_down.dtype == d_up.dtype == of_adapter
        expected = results_of(surgery_adapter, features, *(x.to(wide(dtype)) for x in stored))
        for x, y in zip((corrected, d_features, d_down, d_up), expected, strict=True):
            assert torch.equal(x, y.to(x.dtype))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_threads(dtype: torch.dtype) -> None:
    """The same bits, and those of one task alone."""
    features, down, up = problem((3, 8, 50, 70), 17, dtype)
    index = torch.randint(0, 3, (8,), generator=generator(2))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        grouped = results_of(surgery_adapter, features, down, up, token_mean=True)
        indexed = results_of(surgery_adapter, features[0], down, up, task_index=index, token_mean=True)
        results.append([bits(x) for x in (*grouped, *indexed)])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa")
def test_instruction_sets_differ_by_rounding() -> None:
    arguments = problem((3, 10, 768), 16)
    results = []
    for isa in _C.isas():
        _C.set_isa(isa)
        results.append(results_of(surgery_adapter, *arguments))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=float(768**0.5 * 2**-23 * y.abs().max()))


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
def test_differentiable_once() -> None:
    features, down, up = (x.requires_grad_() for x in problem((2, 3, 5), 3))
    (gradient,) = torch.autograd.grad(surgery_adapter(features, down, up).square().sum(), features, create_graph=True)
    message = "surgery_adapter must be differentiated once, got a gradient of its gradient"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        gradient.sum().backward()


@contextmanager
def calls_of(op: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """The arguments and results of every call of an op."""
    calls = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket is getattr(OPS, op):
                calls.append((args, result))
            return result

    with Spy():
        yield calls


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
    ((_, (d_features, d_down, d_up)),) = calls
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
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(OPS.surgery_adapter, (*leaves, index, token_mean, True))


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


FEATURES, DOWN, UP = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), torch.zeros(2, 5, 4)
INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], DOWN, UP), {}, "features must be a tensor, got list"),
        ((FEATURES, 1.0, UP), {}, "down must be a tensor, got float"),
        ((FEATURES, DOWN, None), {}, "up must be a tensor, got NoneType"),
        ((FEATURES, DOWN.to("meta"), UP), {}, "down must be on the device of features, cpu, got meta"),
        ((FEATURES, DOWN, UP.to("meta")), {}, "up must be on the device of features, cpu, got meta"),
        (
            (FEATURES.long(), DOWN, UP),
            {},
            "features must be float64, float32, float16 or bfloat16, got torch.int64",
        ),
        ((FEATURES, DOWN[0], UP), {}, "down must be [num_tasks, rank, dim], got (4, 5)"),
        ((FEATURES, DOWN, UP.mT), {}, "up must have shape (2, 5, 4), got (2, 4, 5)"),
        (
            (FEATURES, DOWN.double(), UP.double()),
            {},
            "down must be torch.float32 like features, or float32, got torch.float64",
        ),
        (
            (FEATURES.half(), DOWN, UP.half()),
            {},
            "up must be torch.float16 like features, or float32, got torch.float16",
        ),
        (
            (FEATURES[0, 0], DOWN, UP),
            {},
            "features must be [num_tasks, rows, dim] or [num_tasks, batch, tokens, dim], got (5,)",
        ),
        ((FEATURES, DOWN, UP), {"token_mean": True}, "features must be [num_tasks, batch, tokens, dim], got (2, 3, 5)"),
        (
            (FEATURES[0, 0], DOWN, UP),
            {"task_index": INDEX},
            "features must be [rows, dim] or [rows, tokens, dim], got (5,)",
        ),
        (
            (FEATURES[0], DOWN, UP),
            {"task_index": INDEX, "token_mean": True},
            "features must be [rows, tokens, dim], got (3, 5)",
        ),
        ((FEATURES[..., :4], DOWN, UP), {}, "features must have the dim of down, 5, got 4"),
        ((FEATURES[:1], DOWN, UP), {}, "features must have the num_tasks of down, 2, got 1"),
        ((FEATURES[0], DOWN, UP), {"task_index": [0, 1, 0]}, "task_index must be a tensor, got list"),
        ((FEATURES[0], DOWN, UP), {"task_index": INDEX.int()}, "task_index must be int64 [3], got torch.int32 [3]"),
        ((FEATURES[0], DOWN, UP), {"task_index": INDEX[:2]}, "task_index must be int64 [3], got torch.int64 [2]"),
        (
            (FEATURES[0], DOWN, UP),
            {"task_index": INDEX.to("meta")},
            "task_index must be on the device of features, cpu, got meta",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        surgery_adapter(*arguments, **options)


@pytest.mark.any_isa
@pytest.mark.parametrize("number", [-1, 2, 2**62])
def test_task_index_out_of_range(number: int) -> None:
    index = torch.tensor([0, number, 1])
    with pytest.raises(RuntimeError, match=rf"^task_index must be in \[0, 2\), got {number}$"):
        surgery_adapter(FEATURES[0], DOWN, UP, task_index=index)


@pytest.mark.any_isa
def test_ops_refuse_what_would_corrupt_memory() -> None:
    corrected, _, hidden = OPS.surgery_adapter(FEATURES, DOWN, UP, None, False, True)
    means = torch.zeros(2, 5)
    implied = " must be what surgery_adapter's results imply on the CPU, got another device, dtype or shape"

    def forward(features: Tensor, down: Tensor = DOWN, up: Tensor = UP, index: Tensor | None = None) -> Any:
        return OPS.surgery_adapter(features, down, up, index)

    def backward(
        grad: Tensor | None = corrected, grad_means: Tensor | None = None, hidden: Tensor = hidden, **options: Tensor
    ) -> Any:
        features, down = options.get("features", FEATURES), options.get("down", DOWN)
        return OPS.surgery_adapter_backward(grad, grad_means, features, down, UP, None, hidden, True, True)

    refused: list[tuple[str, Callable[[], Any]]] = [
        ("features must have 3 or 4 dimensions, got 1", lambda: forward(FEATURES[0, 0])),
        ("features must have 2 or 3 dimensions, got 1", lambda: forward(FEATURES[0, 0], index=INDEX)),
        ("features must have 3 or 4 dimensions, got 0", lambda: forward(FEATURES[0, 0, 0])),
        (
            "features must be contiguous in the last dimension, got stride 3",
            lambda: forward(torch.zeros(2, 5, 3).mT),
        ),
        (
            "features must be float64, float32, float16 or bfloat16, got another dtype",
            lambda: forward(FEATURES.long()),
        ),
        (
            "down and up must be float32, or float64 for float64 features, got another dtype",
            lambda: forward(FEATURES, up=UP.double()),
        ),
        (
            "down and up must be float32, or float64 for float64 features, got another dtype",
            lambda: forward(FEATURES.half(), DOWN.half(), UP.half()),
        ),
        ("down must be [num_tasks, rank, dim], got 2 dimensions", lambda: forward(FEATURES, DOWN[0])),
        ("down must have the dim of features, 4, got 5", lambda: forward(FEATURES[..., :4])),
        ("up must have shape (2, 5, 4), got another", lambda: forward(FEATURES, up=UP.mT)),
        ("up must have shape (2, 5, 4), got another", lambda: forward(FEATURES, up=UP[0])),
        ("features must have the num_tasks of down, 2, got 1", lambda: forward(FEATURES[:1])),
        (
            "task_index must be int64 [3] on the CPU, got another tensor",
            lambda: forward(FEATURES[0], index=INDEX.int()),
        ),
        ("task_index must be int64 [3] on the CPU, got another tensor", lambda: forward(FEATURES[0], index=INDEX[:2])),
        ("task_index must be in [0, 2), got 2", lambda: forward(FEATURES[0], index=INDEX + 2)),
        ("grad" + implied, lambda: backward(corrected[:1])),
        ("grad" + implied, lambda: backward(corrected.double())),
        ("grad_means" + implied, lambda: backward(grad_means=means)),
        ("grad_means" + implied, lambda: backward(grad_means=FEATURES.double())),
        ("hidden" + implied, lambda: backward(hidden=hidden[:-1])),
        ("hidden" + implied, lambda: backward(hidden=hidden.double())),
        ("up must have shape (2, 5, 3), got another", lambda: backward(down=DOWN[:, :3])),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            call()
