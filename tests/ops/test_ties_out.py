"""Where ties_merge reads and writes: given outputs, mapped files, parameters."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from surgery_kernels import reference, ties_merge
from tests.cases import DTYPES, SEMANTICS, assert_same, gaussian, grid, inputs, laid_out, option_id


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_out(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, (12, 21), 3, dtype)
    for semantics in SEMANTICS:
        expected = reference.ties_merge(base, experts, semantics=semantics)
        for layout in ("plain", "transposed", "strided", "unaligned"):
            out = torch.full_like(base, math.nan) if layout == "plain" else laid_out(torch.full_like(base, 9), layout)
            address = out.data_ptr()
            assert ties_merge(base, experts, semantics=semantics, out=out) is out
            assert out.data_ptr() == address
            assert_same(out, expected, layout)


def test_out_writes_nothing_around_it() -> None:
    base, experts = inputs(grid, 1_001, 3, torch.bfloat16)
    for offset in (0, 1, 5, 32):
        around = torch.full((1_100,), 7.0, dtype=torch.bfloat16)
        ties_merge(base, experts, out=around[offset : offset + 1_001])
        assert (around[:offset] == 7).all()
        assert (around[offset + 1_001 :] == 7).all()
        assert_same(around[offset : offset + 1_001], reference.ties_merge(base, experts))


def test_out_beside_an_input() -> None:
    base, experts = inputs(grid, 500, 2, torch.float32)
    together = torch.cat([base, *experts, torch.full((500,), math.nan)])
    parts = together.split(500)
    assert_same(ties_merge(parts[0], list(parts[1:3]), out=parts[3]), reference.ties_merge(base, experts))
    assert_same(parts[0], base)


def test_out_in_a_mapped_file(tmp_path: Path) -> None:
    base, experts = inputs(gaussian, 70_001, 3, torch.float32)
    expected = reference.ties_merge(base, experts)
    mapped = np.memmap(tmp_path / "numpy", dtype=np.float32, mode="w+", shape=(70_001,))
    ties_merge(base, experts, out=torch.from_numpy(mapped))
    mapped.flush()
    assert_same(torch.from_numpy(np.fromfile(tmp_path / "numpy", dtype=np.float32)), expected)
    ties_merge(base, experts, out=torch.from_file(str(tmp_path / "torch"), shared=True, size=70_001))
    assert_same(torch.from_numpy(np.fromfile(tmp_path / "torch", dtype=np.float32)), expected)


def test_inputs_in_a_read_only_mapped_file(tmp_path: Path) -> None:
    base, experts = inputs(gaussian, 70_001, 2, torch.float32)
    experts[0].numpy().tofile(tmp_path / "expert")
    mapped = torch.from_file(str(tmp_path / "expert"), shared=False, size=70_001)
    assert_same(ties_merge(base, [mapped, experts[1]]), reference.ties_merge(base, experts))


def test_gradients_stop_here() -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    merged = ties_merge(base.requires_grad_(), [expert.requires_grad_() for expert in experts])
    assert not merged.requires_grad
    with torch.inference_mode():
        assert_same(ties_merge(base, experts), merged)


def test_parameters_are_tensors() -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    merged = ties_merge(torch.nn.Parameter(base), [torch.nn.Parameter(expert) for expert in experts])
    assert_same(merged, reference.ties_merge(base, experts))
    assert type(merged) is Tensor
