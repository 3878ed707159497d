"""What nvcc makes of the CUDA kernels, for GPUs that need not be there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.any_isa

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def compiled() -> list[Any]:
    sys.path.insert(0, str(BENCH))
    try:
        import compile_cuda
    finally:
        sys.path.remove(str(BENCH))
    if absent := compile_cuda.missing():
        pytest.skip(f"{' and '.join(absent)} is not installed")
    return compile_cuda.kernels(compile_cuda.ARCHITECTURES)


def test_no_kernel_spills_or_loads_single_values_in_a_hot_loop(compiled: list[Any]) -> None:
    faults = [f"{kernel.name} on {kernel.architecture} {fault}" for kernel in compiled for fault in kernel.faults]
    assert faults == []


def test_every_main_kernel_is_among_them(compiled: list[Any]) -> None:
    names = {kernel.name for kernel in compiled}
    for dtype in ("float", "half", "bfloat16", "double"):
        for rule in ("paper", "paper_max", "mergekit", "peft"):
            assert f"merge<{dtype}, {rule}>" in names
    assert {"count<Narrow>", "count<Single>", "count<Double>"} <= names
    assert {kernel.architecture for kernel in compiled} == {"sm_80", "sm_90", "sm_100"}
