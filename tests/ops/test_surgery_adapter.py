"""surgery_adapter and its gradients against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, reference, surgery_adapter
from tests.adapter_cases import LINEAR, calls_of, problem, results_of, token_major, weights_like, wide
from tests.cases import DTYPES, bits, generator, option_id

BLOCK = 96  # rows that the kernel takes at a time
DIMS = [1, 5, 33, 64, 768]
RANKS = [1, 3, 16, 33, 80]


def in_wider_memory(features: Tensor) -> Tensor:
    """Rows apart from each other, at places that are not aligned."""
    return torch.cat([features, features[..., :1]], dim=-1)[..., :-1]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("options", LINEAR, ids=str)
def test_bias_and_activation(options: dict[str, Any], dtype: torch.dtype) -> None:
    for dim, rank in ((5, 3), (33, 16), (64, 0), (70, 33)):
        assert_close_to_reference(*problem((3, 7, dim), rank, dtype), **options)
        assert_close_to_reference(*problem((2, 3, 65, dim), rank, dtype), token_mean=True, **options)
    index = torch.tensor([4, 0, 0, 2, 1, 4, 2])
    assert_close_to_reference(*problem((7, 50, 33), 6, dtype, 5), task_index=index, token_mean=True, **options)
    assert_close_to_reference(*problem((7, 33), 6, dtype, 5), task_index=index, **options)


def test_a_linear_adapter_is_a_relu_adapter_of_twice_the_rank() -> None:
    features, down, up = problem((2, 30, 33), 5, torch.float64)
    pair = surgery_adapter(features, torch.cat([down, -down], dim=1), torch.cat([up, -up], dim=2))
    torch.testing.assert_close(surgery_adapter(features, down, up, activation="none"), pair)


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
        grouped = results_of(surgery_adapter, features, down, up, token_mean=True, bias=True)
        indexed = results_of(surgery_adapter, features[0], down, up, task_index=index, token_mean=True, bias=True)
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
