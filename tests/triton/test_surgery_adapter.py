"""surgery_adapter's Triton kernels against the oracle: on a GPU, or in the interpreter."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.adapter_cases import LINEAR, bias_for, problem, token_major, weights_like, wide
from tests.adapter_cases import results_of as expected_of
from tests.borders import guarded_results, in_poisoned_memory
from tests.cases import DTYPES, bits, generator, option_id

pytestmark = pytest.mark.any_isa

kernels = pytest.importorskip("surgery_kernels.triton.surgery_adapter", reason="there is no Triton for this platform")
adapter_kernels = importlib.import_module("surgery_kernels.triton.adapter_kernels")
OPS = torch.ops.surgery_kernels
BLOCK = 64  # rows that a program takes
NAMES = ["corrected", "means", "features", "down", "up", "bias"]


def results_of(
    gpu: torch.device,
    features: Tensor,
    down: Tensor,
    up: Tensor,
    task_index: Tensor | None = None,
    token_mean: bool = False,
    bias: bool = False,
    activation: str = "relu",
) -> list[Tensor]:
    """What expected_of gives, of the kernels, back on the CPU."""
    of_adapter = in_poisoned_memory(bias_for(down).to(gpu)) if bias else None
    inputs = [in_poisoned_memory(x.to(gpu)) for x in (features, down, up)]
    index = None if task_index is None else task_index.to(gpu)
    corrected, means, hidden = kernels.surgery_adapter(*inputs, index, token_mean, True, of_adapter, activation)
    grad_means = weights_like(means) if token_mean else None
    gradients = kernels.surgery_adapter_backward(
        weights_like(corrected), grad_means, *inputs, index, hidden, True, True, bias, activation
    )
    gradients = gradients if bias else gradients[:3]
    return [x.cpu() for x in (corrected, *([means.to(features.dtype)] if token_mean else []), *gradients)]


def assert_close_to_reference(gpu: torch.device, features: Tensor, down: Tensor, up: Tensor, **options: Any) -> None:
    """Twice the error of the reference in the same dtype, both taken from float64, and the rounding of sums.

    TF32 operands of 16-bit features, which the interpreter does not round, lose ten times less than the features did.
    """
    exact = expected_of(reference.surgery_adapter, features.double(), down.double(), up.double(), **options)
    expected = expected_of(reference.surgery_adapter, features, down, up, **options)
    actual = results_of(gpu, features, down, up, **options)
    products = max(features.shape[-1], down.shape[1], features.shape[:-1].numel(), 1)
    names = NAMES if options.get("token_mean") else [NAMES[0], *NAMES[2:]]
    on_tensor_cores = gpu.type == "cuda" and features.dtype in (torch.float16, torch.bfloat16)
    eps = 2.0**-10 if on_tensor_cores else torch.finfo(wide(features.dtype)).eps
    for name, x, y, z in zip(names, actual, expected, exact, strict=False):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        if x.numel() == 0:
            continue
        rounding = eps * products**0.5 * float(z.abs().max())
        error, allowed = (float((a.double() - z).abs().max()) for a in (x, y))
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, the reference's {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("dim", [1, 33, 52, 64, 65, 257])
def test_every_dim_and_rank(gpu: torch.device, dim: int, dtype: torch.dtype) -> None:
    for rank in {33: (1, 3, 16, 17, 65), 64: (130,)}.get(dim, (5,)):
        assert_close_to_reference(gpu, *problem((2, 7, dim), rank, dtype))
    assert_close_to_reference(gpu, *problem((2, 2, 5, dim), 4, dtype), token_mean=True)


@pytest.mark.parametrize("options", LINEAR, ids=str)
def test_bias_and_activation(gpu: torch.device, options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_close_to_reference(gpu, *problem((2, 7, 33), 3, dtype), **options)
        assert_close_to_reference(gpu, *problem((1, 2, 70, 33), 17, dtype), token_mean=True, **options)
    assert_close_to_reference(gpu, *problem((2, 7, 33), 0), **options)
    assert_close_to_reference(gpu, *problem((1, 35, 40), 130), **options)
    index = torch.tensor([4, 0, 0, 2, 1, 4, 2])
    assert_close_to_reference(gpu, *problem((7, 20), 6, num_tasks=5), task_index=index, **options)
    assert_close_to_reference(gpu, *problem((7, 5, 20), 6, num_tasks=5), task_index=index, token_mean=True, **options)


def test_more_ranks_than_registers_hold(gpu: torch.device) -> None:
    for rank in (129, 300):
        assert_close_to_reference(gpu, *problem((2, 35, 40), rank))
    assert_close_to_reference(gpu, *problem((1, 2, 35, 40), 200), token_mean=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("rows", [1, BLOCK - 1, BLOCK, BLOCK + 1, 257])
def test_many_rows(gpu: torch.device, rows: int, dtype: torch.dtype) -> None:
    """One task's sums are cut into parts, and means into blocks."""
    assert_close_to_reference(gpu, *problem((1, rows, 24), 6, dtype))
    assert_close_to_reference(gpu, *problem((1, 2, rows, 24), 6, dtype), token_mean=True)


def test_the_width_of_a_vision_transformer(gpu: torch.device) -> None:
    assert_close_to_reference(gpu, *problem((1, 1, 50, 768), 16), token_mean=True)


@pytest.mark.parametrize("features_dtype", [torch.bfloat16, torch.float32], ids=option_id)
def test_bfloat16_adapters(gpu: torch.device, features_dtype: torch.dtype) -> None:
    """As autocast's nn.Linear, whose error is the measure: its hidden values and its correction are bfloat16 too."""
    features, down, up = problem((2, 3, 17, 40), 9)
    leaves = features.to(features_dtype), down.bfloat16(), up.bfloat16()

    def pair(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
        hidden = torch.einsum("tbsd,trd->tbsr", features.to(down.dtype), down).relu()
        return features - torch.einsum("tbsr,tdr->tbsd", hidden, up)

    exact = expected_of(pair, *(x.double() for x in leaves))
    expected = expected_of(pair, *leaves)
    for name, x, y, z in zip(["corrected", *NAMES[2:5]], results_of(gpu, *leaves), expected, exact, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        error, allowed = (float((a.double() - z).norm()) for a in (x, y))
        assert error <= 2 * allowed, f"{name}: error {error:.2e}, that of the pair {allowed:.2e}"


def test_products() -> None:
    double, single, half, bfloat = (torch.zeros(1, dtype=dtype) for dtype in DTYPES)
    assert kernels.products_of(double, double) == adapter_kernels.FLOAT64
    assert kernels.products_of(single, single) == adapter_kernels.EXACT
    assert kernels.products_of(half, single) == kernels.products_of(bfloat, single) == adapter_kernels.TF32
    assert kernels.products_of(half, half) == adapter_kernels.TF32
    assert kernels.products_of(bfloat, bfloat) == kernels.products_of(single, bfloat) == adapter_kernels.BFLOAT16


@pytest.mark.parametrize(
    "ask",
    [
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
    ],
    ids=["of products", "of everything", "the older name", "the oldest name"],
)
def test_tf32_by_every_name_torch_has(ask: Callable[[], None]) -> None:
    single = torch.zeros(1)
    try:
        ask()
        assert kernels.products_of(single, single) == adapter_kernels.TF32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = torch.backends.fp32_precision = "none"
    assert kernels.products_of(single, single) == adapter_kernels.EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_layouts(gpu: torch.device, dtype: torch.dtype) -> None:
    features, down, up = problem((3, 2, 20, 33), 5, dtype)
    expected = results_of(gpu, features, down, up, token_mean=True)
    in_wider_memory = torch.cat([features, features[..., :1]], dim=-1)[..., :-1]
    for moved in (token_major(features), in_wider_memory, features.transpose(0, 1).contiguous().transpose(0, 1)):
        assert moved.stride() != features.stride()
        for x, y in zip(results_of(gpu, moved, down, up, token_mean=True), expected, strict=True):
            assert torch.equal(bits(x), bits(y))
    view = token_major(features)
    corrected, _, hidden = kernels.surgery_adapter(*(x.to(gpu) for x in (view, down, up)), keep_hidden=True)
    assert corrected.stride() == view.stride()
    expanded = torch.ones((), dtype=dtype, device=gpu).expand(features.shape)
    given = [x.to(gpu) for x in (view, down, up)]
    d_features, *_ = kernels.surgery_adapter_backward(expanded, None, *given, None, hidden, True, True)
    assert d_features.stride() == view.stride()
    overlapping = torch.randn(3, 1, 20, 33, generator=generator(0)).to(dtype).expand(3, 2, 20, 33)
    actual, expected = (results_of(gpu, x, down, up)[0] for x in (overlapping, overlapping.contiguous()))
    assert torch.equal(actual, expected)


def test_nothing_is_written_beside_the_results(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, rank, token_mean in (((2, 3, 33), 5, False), ((2, 2, 70, 33), 17, True), ((1, 30, 20), 140, False)):
        inputs = [x.to(gpu) for x in problem(shape, rank)]
        expected = [x.to(gpu) for x in results_of(gpu, *inputs, token_mean=token_mean)]
        with guarded_results(monkeypatch):
            actual = results_of(gpu, *inputs, token_mean=token_mean)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x.to(gpu), y)


@pytest.mark.parametrize("tokens", [None, 1, 7, 66])
def test_task_of_every_sample(gpu: torch.device, tokens: int | None) -> None:
    """In any order, some tasks with many samples, one with none."""
    samples, num_tasks = 11, 5
    index = torch.randint(0, num_tasks, (samples,), generator=generator(tokens or 0))
    index[index == 3] = 1
    shape = (samples, 20) if tokens is None else (samples, tokens, 20)
    features, down, up = problem(shape, 6, num_tasks=num_tasks)
    for token_mean in [False] if tokens is None else [False, True]:
        assert_close_to_reference(gpu, features, down, up, task_index=index, token_mean=token_mean)


def test_a_task_without_samples(gpu: torch.device) -> None:
    index = torch.tensor([[2, 0], [0, 0], [2, 0], [0, 0]])[:, 0]  # strided
    features, down, up = problem((4, 33), 5, num_tasks=3)
    results = results_of(gpu, features, down, up, task_index=index)
    for x, y in zip(results, results_of(gpu, features, down, up, task_index=index.contiguous()), strict=True):
        assert torch.equal(x, y)
    assert all(x[1].count_nonzero() == 0 and x[0].count_nonzero() > 0 for x in results[2:])


def test_many_samples_and_tasks(gpu: torch.device) -> None:
    """More samples than are sorted at once."""
    index = torch.randint(0, 33, (2_100,), generator=generator(1))
    assert_close_to_reference(gpu, *problem((2_100, 4), 3, num_tasks=33), task_index=index)


def test_sorting_keeps_the_order_within_a_task(gpu: torch.device) -> None:
    index = torch.tensor([2, 0, 7, 0, -1, 2, 1, 2**40], device=gpu)
    features = torch.zeros(8, 4, device=gpu)
    order = kernels.SampleOrder.of(kernels.RowLayout.of(features, 4, index))
    assert order.order.tolist() == [1, 3, 6, 0, 5, 2, 4, 7]
    assert order.bounds.tolist() == [0, 2, 3, 5, 5, 8]


@pytest.mark.parametrize("tokens", [None, 5])
def test_samples_of_no_task_become_nan(gpu: torch.device, tokens: int | None) -> None:
    index = torch.tensor([1, -1, 0, 2, 1, 2**40, 0])
    known = (index >= 0) & (index < 2)
    shape = (7, 33) if tokens is None else (7, tokens, 33)
    features, down, up = problem(shape, 5, num_tasks=2)
    actual = results_of(gpu, features, down, up, task_index=index)
    assert actual[0][~known].isnan().all()
    assert actual[1][~known].isnan().all()
    weights = weights_like(features)
    leaves = [x.clone().requires_grad_() for x in (features[known], down, up)]
    corrected = reference.surgery_adapter(*leaves, task_index=index[known])
    gradients = torch.autograd.grad(corrected, leaves, weights[known])
    for x, y in zip([actual[0][known], actual[1][known], *actual[2:]], [corrected, *gradients], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_grad", [True, False])
def test_means_alone_or_features_alone(gpu: torch.device, with_grad: bool) -> None:
    """A gradient that is not there counts as zeros; what is not needed stays empty."""
    inputs = [x.to(gpu) for x in problem((2, 3, 5, 33), 6)]
    corrected, means, hidden = kernels.surgery_adapter(*inputs, None, True, True)
    grad, grad_means = weights_like(corrected), weights_like(means)
    given = (grad, None) if with_grad else (None, grad_means)
    zeros = (grad, torch.zeros_like(means)) if with_grad else (torch.zeros_like(grad), grad_means)
    expected = kernels.surgery_adapter_backward(*zeros, *inputs, None, hidden, True, True, True)
    for need in ((True, True, False), (True, False, False), (False, True, True), (False, False, True)):
        actual = kernels.surgery_adapter_backward(*given, *inputs, None, hidden, *need)
        for x, y, needed in zip(actual, expected, (need[0], need[1], *need[1:]), strict=True):
            torch.testing.assert_close(x, y if needed else x.new_empty(0), rtol=1e-5, atol=1e-5)
    alone, *others = kernels.surgery_adapter(*inputs)
    torch.testing.assert_close(alone, corrected, rtol=1e-5, atol=1e-5)
    assert all(x.numel() == 0 for x in others)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(gpu: torch.device, shape: tuple[int, ...]) -> None:
    for rank in (0, 4):
        given = problem(shape, rank)
        for token_mean in (False, True)[: len(shape) - 2]:
            actual = results_of(gpu, *given, token_mean=token_mean)
            expected = expected_of(reference.surgery_adapter, *given, token_mean=token_mean)
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x, y, equal_nan=True)
    assert_close_to_reference(gpu, *problem((2, 3, 5), 0))
    no_samples = torch.zeros(0, dtype=torch.int64)
    corrected, *gradients = results_of(gpu, *problem((0, 5), 4, num_tasks=2), task_index=no_samples)
    assert corrected.shape == (0, 5)
    assert all(x.count_nonzero() == 0 for x in gradients)


def test_nan_reaches_its_row_and_its_adapter(gpu: torch.device) -> None:
    features, down, up = problem((3, 2, 40, 20), 5)
    healthy = results_of(gpu, features, down, up, token_mean=True)
    spoilt = features.clone()
    spoilt[1, 0, 7, 3] = math.nan
    corrected, means, _, d_down, d_up = results_of(gpu, spoilt, down, up, token_mean=True)
    assert corrected[1, 0, 7].isnan().all()
    assert means[1, 0].isnan().all()
    corrected[1, 0, 7], means[1, 0] = healthy[0][1, 0, 7], healthy[1][1, 0]
    assert torch.equal(corrected, healthy[0])
    assert torch.equal(means, healthy[1])
    for x, y in zip((d_down, d_up), healthy[3:], strict=True):
        assert x[1].isnan().any()
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def test_relu_has_gradient_0_at_0(gpu: torch.device) -> None:
    features, down, up = problem((1, 3, 8), 4)
    *_, d_features, d_down, d_up = results_of(gpu, torch.zeros_like(features), down, up)
    assert torch.equal(d_features, weights_like(features))
    assert d_down.count_nonzero() == d_up.count_nonzero() == 0


def test_the_same_bits_again(gpu: torch.device) -> None:
    given = problem((1, 300, 40), 17)
    for x, y in zip(results_of(gpu, *given), results_of(gpu, *given), strict=True):
        assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("narrow", [False, True], ids=["wide-adapters", "alike"])
def test_fakes_are_like_the_results(gpu: torch.device, dtype: torch.dtype, narrow: bool) -> None:
    features, down, up = problem((2, 2, 5, 16), 4, dtype)
    given = [token_major(features), *(x.to(dtype if narrow else x.dtype) for x in (down, up))]
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in given]
    real = [x.to(gpu) for x in given]
    results, fakes = kernels.surgery_adapter(*real, None, True, True), OPS.surgery_adapter(*meta, None, True, True)
    gradients = kernels.surgery_adapter_backward(*results[:2], *real, None, results[2], True, True)
    of_fakes = OPS.surgery_adapter_backward(*fakes[:2], *meta, None, fakes[2], True, True)
    for x, y in zip((*results, *gradients), (*fakes, *of_fakes), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


FEATURES, DOWN, UP = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), torch.zeros(2, 5, 4)
INDEX = torch.zeros(3, dtype=torch.int64)


def test_what_would_corrupt_memory_is_refused(gpu: torch.device) -> None:
    features, down, up, index = (x.to(gpu) for x in (FEATURES, DOWN, UP, INDEX))
    hidden = torch.zeros(6, 4, device=gpu)

    def backward(grad: Tensor | None, grad_means: Tensor | None = None, hidden: Tensor = hidden) -> Any:
        return kernels.surgery_adapter_backward(grad, grad_means, features, down, up, None, hidden, True, True)

    refused: list[tuple[str, Callable[[], Any]]] = [
        ("features must have 3 or 4 dimensions, got 1", lambda: kernels.surgery_adapter(features[0, 0], down, up)),
        (
            "features must have 2 or 3 dimensions, got 1",
            lambda: kernels.surgery_adapter(features[0, 0], down, up, index),
        ),
        (
            "features must be contiguous in the last dimension, got stride 3",
            lambda: kernels.surgery_adapter(torch.zeros(2, 5, 3, device=gpu).mT, down, up),
        ),
        ("down must have the dim of features, 4, got 5", lambda: kernels.surgery_adapter(features[..., :4], down, up)),
        ("up must have shape (2, 5, 4), got (2, 4, 5)", lambda: kernels.surgery_adapter(features, down, up.mT)),
        ("features must have the num_tasks of down, 2, got 1", lambda: kernels.surgery_adapter(features[:1], down, up)),
        (
            "task_index must be int64 [3], got torch.int64 [2]",
            lambda: kernels.surgery_adapter(features[0], down, up, index[:2]),
        ),
        (
            "task_index must be int64 [3], got torch.int32 [3]",
            lambda: kernels.surgery_adapter(features[0], down, up, index.int()),
        ),
        (
            "grad must have shape (2, 3, 5), as surgery_adapter's results, got (1, 3, 5)",
            lambda: backward(features[:1]),
        ),
        (
            "grad_means must have shape (2, 5), as surgery_adapter's results, got (1, 5)",
            lambda: backward(None, features[0, :1]),
        ),
        (
            "hidden must have shape (6, 4), as surgery_adapter's results, got (5, 4)",
            lambda: backward(features, hidden=hidden[1:]),
        ),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            call()


class Counted:
    """A kernel that is launched and does nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda **_: None


@pytest.mark.parametrize(
    ("num_tasks", "rows", "rank", "parts"),
    [(8, 10_400, 16, 5), (8, 10_400, 64, 5), (1, 10_400, 16, 44), (8, 40, 16, 3)],
)
def test_sums_over_rows_are_cut_for_all_multiprocessors(
    num_tasks: int, rows: int, rank: int, parts: int, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By shapes alone: into as many parts as there are programs for, and blocks of rows."""
    by_tiles = Counted()
    monkeypatch.setattr(kernels, "backward_rows_kernel", Counted())
    monkeypatch.setattr(kernels, "backward_adapter_kernel", by_tiles)
    features = torch.empty(num_tasks, rows, 768, device=gpu)
    down, up = torch.empty(num_tasks, rank, 768, device=gpu), torch.empty(num_tasks, 768, rank, device=gpu)
    hidden = torch.empty(num_tasks * rows, rank, device=gpu)
    kernels.surgery_adapter_backward(features, None, features, down, up, None, hidden, False, True)
    ((tiles, found),) = by_tiles.grids
    assert (tiles, found) == (12 * num_tasks, parts)
    assert tiles * found <= kernels.PROGRAMS
