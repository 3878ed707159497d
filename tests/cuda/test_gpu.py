"""The CUDA kernels on a GPU against the CPU, and what only a GPU has: streams, graphs, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C
from tests.cases import (
    DTYPES,
    SEMANTICS,
    assert_same,
    gaussian,
    grid,
    inputs,
    leaning_down,
    merge_options,
    option_id,
    with_weights,
)

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="the library was built without CUDA"),
]

ops = torch.ops.surgery_kernels_cuda
cpu = torch.ops.surgery_kernels


def on_gpu(base: Tensor | None, experts: list[Tensor], device: str = "cuda") -> tuple[Tensor | None, list[Tensor]]:
    return None if base is None else base.to(device), [expert.to(device) for expert in experts]


def check(base: Tensor | None, experts: list[Tensor], what: str = "", **options: Any) -> None:
    density = [0.2] * len(experts)
    expected = cpu.ties_merge(base, experts, density, **options)
    moved, others = on_gpu(base, experts)
    assert_same(ops.ties_merge(moved, others, density, **options).cpu(), expected, f"{what} {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("count", [1, 257, 9_001])
def test_small(count: int, dtype: torch.dtype) -> None:
    for kind in (gaussian, leaning_down):
        for semantics in SEMANTICS:
            check(*inputs(kind, count, 3, dtype), kind.__name__, semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_every_option(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, 70_001, 4, dtype)
    for options in merge_options():
        check(base, experts, **with_weights(options, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_millions(semantics: str, dtype: torch.dtype) -> None:
    for kind in (gaussian, grid):
        check(*inputs(kind, 4_000_003, 8, dtype), kind.__name__, semantics=semantics)


def test_small_scope_of_several_tensors() -> None:
    pairs = [inputs(grid, count, 3, torch.bfloat16) for count in (5_000, 0, 768, 33)]
    results = []
    for namespace, device in ((cpu, "cpu"), (ops, "cuda")):
        moved = [on_gpu(*pair, device) for pair in pairs]
        out = [torch.empty_like(base) for base, _ in moved]
        bases, flat = [base for base, _ in moved], [expert for _, experts in moved for expert in experts]
        namespace.ties_merge_out(bases, flat, [0.3] * 3, semantics="mergekit", out=out)
        results.append([tensor.cpu() for tensor in out])
    for expected, merged in zip(*results, strict=True):
        assert_same(merged, expected)


def test_small_split() -> None:
    base, experts = inputs(grid, 1_003, 3, torch.bfloat16)
    expected = cpu.ties_split(base, experts, [0.3] * 3)
    assert_same(ops.ties_split(*on_gpu(base, experts), [0.3] * 3).cpu(), expected)


def test_nonfinite_is_told_and_nothing_is_written() -> None:
    base, experts = inputs(grid, 5_000, 3, torch.float32)
    experts[1][7] = torch.nan
    moved, others = on_gpu(base, experts)
    out = torch.full_like(others[0], 7.0)
    with pytest.raises(RuntimeError, match=r"^experts\[1\] must be finite, got 1 NaN or infinite values in tensor 'x'"):
        ops.ties_merge_out([moved], others, [0.2] * 3, names=["x"], out=[out])
    assert (out == 7).all()


def test_side_stream() -> None:
    """Work behind a long kernel of the same stream sees what that kernel wrote."""
    base, experts = inputs(gaussian, 100_003, 3, torch.float32)
    expected = cpu.ties_merge(base, experts, [0.2] * 3)
    moved, others = on_gpu(base, experts)
    late = [torch.zeros_like(expert) for expert in others]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for to, expert in zip(late, others, strict=True):
            to.copy_(expert)
        merged = ops.ties_merge(moved, late, [0.2] * 3, nonfinite="propagate")
    stream.synchronize()
    assert_same(merged.cpu(), expected)


def test_captured_graph() -> None:
    base, experts = inputs(gaussian, 20_001, 3, torch.bfloat16)
    moved, others = on_gpu(base, experts)
    out = torch.empty_like(others[0])
    arguments = [moved], others, [0.2] * 3
    ops.ties_merge_out(*arguments, nonfinite="drop", out=[out])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.ties_merge_out(*arguments, nonfinite="drop", out=[out])
    for expert in others:
        expert.copy_(expert.flip(0))
    graph.replay()
    flipped = [expert.flip(0) for expert in experts]
    assert_same(out.cpu(), cpu.ties_merge(base, flipped, [0.2] * 3))
    with (
        pytest.raises(RuntimeError, match="^nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.ties_merge_out(*arguments, out=[out])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device() -> None:
    base, experts = inputs(gaussian, 5_000, 3, torch.float32)
    merged = ops.ties_merge(*on_gpu(base, experts, "cuda:1"), [0.2] * 3)
    assert merged.device.index == 1
    assert_same(merged.cpu(), cpu.ties_merge(base, experts, [0.2] * 3))
