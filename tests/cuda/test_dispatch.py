"""SURGERY_KERNELS_CUDA chooses between the Triton and the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from surgery_kernels import _C, ties_merge
from surgery_kernels.triton import host_function
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
def test_triton_otherwise() -> None:
    host_function.cache_clear()
    assert host_function("ties_merge").__module__ == "surgery_kernels.triton.ties_merge"
