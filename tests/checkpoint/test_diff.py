"""How far two checkpoints are apart."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.checkpoint import diff as module
from surgery_kernels.checkpoint.diff import TensorDifference, diff
from tests.checkpoints import save_safetensors, save_torch, state_dict

pytestmark = pytest.mark.any_isa

INF, NAN = math.inf, math.nan


def of(tmp_path: Path, first: dict[str, Tensor], second: dict[str, Tensor]) -> list[TensorDifference]:
    return list(diff(save_safetensors(tmp_path / "a", first), save_safetensors(tmp_path / "b", second)))


def test_more_files_than_a_process_usually_has(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.ones(2) for i in range(40)}
    a, b = (save_safetensors(tmp_path / name, tensors, num_shards=40) for name in "ab")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = (len(os.listdir("/dev/fd")) + 30, limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, few)
    try:
        assert list(diff(a, b)) == []
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_difference(tmp_path: Path) -> None:
    a = save_safetensors(tmp_path / "a", state_dict(), num_shards=2)
    assert list(diff(a, save_torch(tmp_path / "b", state_dict()))) == []
    assert list(diff(a, a)) == []


# first, second, largest absolute and relative difference, number of elements
VALUES: list[tuple[Any, Any, float, float, int]] = [
    ([1.0, 2.0, -4.0], [1.0, 2.5, -3.0], 1.0, 0.25, 2),
    ([0.0, 1.0], [0.5, 1.0], 0.5, INF, 1),
    ([0.0, NAN], [-0.0, NAN], 0.0, 0.0, 0),
    ([NAN, 1.0], [1.0, 1.0], INF, INF, 1),
    ([INF, -INF, 1.0], [INF, INF, 1.0], INF, INF, 1),
    ([INF, 1.0], [2.0, 1.0], INF, INF, 1),
    (3.0, 1.5, 1.5, 0.5, 1),
    ([], [], 0.0, 0.0, 0),
]


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second", "max_abs", "max_rel", "count"), VALUES)
def test_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Any,
    second: Any,
    max_abs: float,
    max_rel: float,
    count: int,
    dtype: torch.dtype,
    chunk: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    found = of(tmp_path, {"x": torch.tensor(first, dtype=dtype)}, {"x": torch.tensor(second, dtype=dtype)})
    assert [(d.max_abs, d.max_rel, d.count) for d in found] == [(max_abs, max_rel, count)] * (count > 0)


OTHERS: list[tuple[Tensor, Tensor, tuple[float, float, int]]] = [
    (torch.tensor([1, 2]), torch.tensor([1, 4]), (2.0, 1.0, 1)),
    (torch.tensor([2**62 + 1]), torch.tensor([2**62]), (0.0, 0.0, 1)),
    (torch.tensor([2**63 - 1]), torch.tensor([-(2**63)]), (2.0**64, 2.0, 1)),
    (torch.tensor([True, False]), torch.tensor([False, False]), (1.0, 1.0, 1)),
    (torch.tensor([1 + 3j]), torch.tensor([1 + 0j]), (3.0, 3 / math.sqrt(10), 1)),
    (torch.tensor([1 + 3j]), torch.tensor([1.0]), (3.0, 3 / math.sqrt(10), 1)),
    (torch.tensor([1.5]), torch.tensor([2.0]).bfloat16(), (0.5, 1 / 3, 1)),
    (torch.tensor([1.5]), torch.tensor([1.5]).half(), (0.0, 0.0, 0)),
    (torch.tensor([1, 3]), torch.tensor([1.0, 3.5]), (0.5, 0.5 / 3, 1)),
    (torch.tensor([1.5]).to(torch.float8_e4m3fn), torch.tensor([2.0]).to(torch.float8_e4m3fn), (0.5, 1 / 3, 1)),
]


@pytest.mark.parametrize(("first", "second", "expected"), OTHERS)
def test_other_dtypes(tmp_path: Path, first: Tensor, second: Tensor, expected: tuple[float, float, int]) -> None:
    (found,) = of(tmp_path, {"x": first}, {"x": second})
    assert (found.max_abs, found.max_rel, found.count) == pytest.approx(expected, rel=1e-12)
    assert found.first and found.first.dtype == first.dtype and found.second and found.second.dtype == second.dtype


def test_names_and_shapes(tmp_path: Path) -> None:
    first = {"same": torch.ones(2), "shape": torch.ones(2, 3), "only a": torch.ones(1)}
    second = {"same": torch.ones(2), "shape": torch.ones(3, 2), "only b": torch.ones(1)}
    found = {d.name: d for d in of(tmp_path, first, second)}
    assert found.keys() == {"shape", "only a", "only b"}
    assert found["only a"].second is None and found["only b"].first is None
    assert found["shape"].max_abs == found["shape"].max_rel == INF and found["shape"].count == 0


def test_errors(tmp_path: Path) -> None:
    a = save_safetensors(tmp_path / "a", state_dict())
    with pytest.raises(FileNotFoundError, match="must be a path or a model of the Hub"):
        list(diff(a, tmp_path / "none"))
