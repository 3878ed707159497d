"""SURGERY_KERNELS_CUDA chooses between the Triton and the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from surgery_kernels import _C, ties_merge
from surgery_kernels.triton import _where_it_can, host_function
from tests.cases import assert_same, grid, inputs

pytestmark = pytest.mark.any_isa


@pytest.fixture
def cuda_is_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SURGERY_KERNELS_CUDA", "1")
    host_function.cache_clear()
    yield
    host_function.cache_clear()


@pytest.mark.usefixtures("cuda_is_chosen")
@pytest.mark.skipif(bool(_C.build_info()["cuda"]), reason="the library was built with CUDA")
def test_without_the_cuda_kernels() -> None:
    sentence = "^SURGERY_KERNELS_CUDA must be 0 where the library was built without CUDA, got 1$"
    with pytest.raises(RuntimeError, match=sentence):
        host_function("ties_merge")


@pytest.mark.usefixtures("cuda_is_chosen")
@pytest.mark.skipif(not torch.cuda.is_available() or not _C.build_info()["cuda"], reason="needs a GPU and its kernels")
def test_with_the_cuda_kernels() -> None:
    assert host_function("ties_merge").__module__ == "surgery_kernels.triton"
    base, experts = inputs(grid, 5_000, 3, torch.bfloat16)
    merged = ties_merge(base.cuda(), [expert.cuda() for expert in experts])
    assert_same(merged.cpu(), ties_merge(base, experts))
    with (
        pytest.raises(ValueError, match="^nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ties_merge(merged, [merged])


@pytest.mark.usefixtures("gpu")
def test_options_that_the_cuda_kernels_lack_go_to_triton() -> None:
    """With a CUDA op that keeps the arguments it gets."""
    arguments = "Tensor[] base, Tensor[] experts, float[] density, str semantics='paper', str nonfinite='error'"
    with torch.library._scoped_library("lacking", "DEF") as library:
        library.define(f"trim_limits({arguments}) -> Tensor")
        library.impl("trim_limits", lambda *given: torch.full((), float(len(given))), "CPU")
        chosen = _where_it_can(torch.ops.lacking.trim_limits, "trim_limits")
        experts = [torch.tensor([3.0, 1.0, 2.0])]
        assert chosen([], experts, [0.5], "peft", "drop", None).item() == 5  # names are not given
        thresholds, _ = chosen([], experts, [0.5], nonfinite="drop", ranks=[2])
        assert thresholds.tolist() == [2.0]
        thresholds, _ = chosen([], experts, [0.5], semantics="exact")
        assert thresholds.tolist() == [3.0]


@pytest.mark.usefixtures("gpu")
def test_triton_otherwise() -> None:
    host_function.cache_clear()
    assert host_function("ties_merge").__module__ == "surgery_kernels.triton.ties_merge"
