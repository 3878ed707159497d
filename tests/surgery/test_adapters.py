"""SurgeryAdapters: shapes, start, tasks, files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery_kernels import reference
from surgery_kernels.surgery import SurgeryAdapters
from tests.cases import assert_same

pytestmark = pytest.mark.any_isa

WIDTHS = {"blocks.0": 16, "blocks.1": 24, "": 12}


def adapters(**options: Any) -> SurgeryAdapters:
    return SurgeryAdapters(**{"num_tasks": 3, "widths": WIDTHS, "rank": 4, **options})


def filled(**options: Any) -> SurgeryAdapters:
    """Adapters that change what they see."""
    made = adapters(seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    for up in made.up:
        up.data.copy_(torch.randn(up.shape, generator=generator))
    return made


def test_shapes_and_counts() -> None:
    made = adapters(tasks=["a", "b", "c"])
    assert made.sites == ("blocks.0", "blocks.1", "")
    assert made.tasks == ("a", "b", "c")
    assert made.num_tasks == 3
    assert [tuple(down.shape) for down in made.down] == [(3, 4, 16), (3, 4, 24), (3, 4, 12)]
    assert [tuple(up.shape) for up in made.up] == [(3, 16, 4), (3, 24, 4), (3, 12, 4)]
    assert made.num_parameters * 3 == sum(parameter.numel() for parameter in made.parameters())
    assert adapters().tasks == ("0", "1", "2")
    assert "rank=4" in repr(made)


@pytest.mark.parametrize(
    ("widths", "rank", "num_parameters"),
    [
        ({"": 512}, 16, 16_384),
        ({**{f"blocks.{i}": 768 for i in range(12)}, "": 512}, 16, 311_296),
        ({**{f"blocks.{i}": 1024 for i in range(24)}, "": 768}, 4, 202_752),
    ],
    ids=["V1", "V2-B", "V2-L"],
)
def test_published_parameter_counts(widths: dict[str, int], rank: int, num_parameters: int) -> None:
    assert SurgeryAdapters(1, widths, rank).num_parameters == num_parameters


def test_start() -> None:
    """down as nn.Linear starts, up zero, and each task's own whatever the other tasks are."""
    made = adapters(tasks=["a", "b", "c"], rank=256, seed=7)
    for down, up, dim in zip(made.down, made.up, WIDTHS.values(), strict=True):
        assert (up == 0).all()
        assert down.abs().max() <= 1 / math.sqrt(dim)
        assert down.std().item() == pytest.approx(1 / math.sqrt(3 * dim), rel=0.05)
        assert not torch.equal(down[0], down[1])
    alone = adapters(num_tasks=1, tasks=["b"], rank=256, seed=7)
    for down, of_b in zip(made.down, alone.down, strict=True):
        assert_same(down[1].detach(), of_b[0].detach())
    assert not torch.equal(made.down[0], adapters(tasks=["a", "b", "c"], rank=256, seed=8).down[0])


def test_without_a_seed_torchs_generator_decides() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = adapters().down[0]
        torch.manual_seed(3)
        assert_same(adapters().down[0].detach(), first.detach())


def test_forward_is_each_tasks_own_adapter() -> None:
    made = filled()
    features = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([2, 0, 1, 1, 0, 2])
    for tasks, expected in [
        (slice(None), torch.tensor([0, 0, 1, 1, 2, 2])),
        (slice(1, 2), torch.ones(6, dtype=torch.int64)),
        (index, index),
    ]:
        oracle = reference.surgery_adapter(features, made.down[1], made.up[1], task_index=expected)
        torch.testing.assert_close(made(1, features, tasks), oracle)


def test_task_index() -> None:
    made = adapters(tasks=["a", "b", "c"])
    assert made.task_index("b") == 1
    assert made.task_index(2) == 2
    assert made.task_index(torch.tensor(1)) == 1
    assert_same(made.task_index(["c", 0, "b"]), torch.tensor([2, 0, 1]))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert_same(made.task_index(torch.tensor([2, 0], dtype=dtype)), torch.tensor([2, 0]))
    assert made.task_index(np.int64(1)) == 1
    assert_same(made.task_index(torch.empty(0, dtype=torch.int64)), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("d", "task must be one of 'a', 'b', 'c', got 'd'"),
        (["a", "d"], "task must be one of 'a', 'b', 'c', got 'd'"),
        (3, "task must be in [0, 3), got 3"),
        (torch.tensor([0, -1]), "task must be in [0, 3), got -1"),
        (torch.tensor([0, 3]), "task must be in [0, 3), got 3"),
        (torch.tensor([0.0]), "task must be integers [batch], got torch.float32 of shape (1,)"),
        (torch.tensor([True]), "task must be integers [batch], got torch.bool of shape (1,)"),
        (torch.zeros(1, 2, dtype=torch.int64), "task must be integers [batch], got torch.int64 of shape (1, 2)"),
    ],
    ids=str,
)
def test_wrong_task(task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapters(tasks=["a", "b", "c"]).task_index(task)


def test_task_of_no_type() -> None:
    with pytest.raises(TypeError, match=r"^task must be a name, a number or one per sample, got None$"):
        adapters().task_index(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be 1 or greater, got 0"),
        ({"rank": 0}, "rank must be 1 or greater, got 0"),
        ({"widths": {}}, "widths must be of at least one site, got none"),
        ({"widths": {"x": 0}}, "widths['x'] must be 1 or greater, got 0"),
        ({"dtype": torch.int64}, "dtype must be float64, float32, float16 or bfloat16, got torch.int64"),
        ({"tasks": ["a"]}, "tasks must be 3 different names, got ['a']"),
        ({"tasks": ["a", "b", "a"]}, "tasks must be 3 different names, got ['a', 'b', 'a']"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapters(**options)


@pytest.mark.parametrize("rank", [1.5, True, "4"], ids=str)
def test_rank_of_another_type(rank: Any) -> None:
    with pytest.raises(TypeError, match=rf"^rank must be an integer, got {rank!r}$"):
        adapters(rank=rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = filled(tasks=["a", "b", "c"], dtype=dtype)
    saved.save(tmp_path / "adapters.safetensors")
    loaded = SurgeryAdapters.load(tmp_path / "adapters.safetensors")
    assert (loaded.tasks, loaded.widths, loaded.rank) == (saved.tasks, saved.widths, saved.rank)
    assert loaded.sites == saved.sites
    for name, tensor in saved.state_dict().items():
        assert_same(loaded.state_dict()[name], tensor, name)


def test_load_of_another_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"^path must be a file written by SurgeryAdapters.save, got '.*other"):
        SurgeryAdapters.load(tmp_path / "other.safetensors")


def test_linear_adapters() -> None:
    made = adapters(kind="linear", rank=16, tasks=["a", "b", "c"])
    assert [tuple(down.shape) for down in made.down] == [(3, 16, 16), (3, 16, 24), (3, 12, 12)]
    assert [tuple(up.shape) for up in made.up] == [(3, 16, 0), (3, 24, 16), (3, 12, 0)]  # full rank, low rank, full
    assert [tuple(bias.shape) for bias in made.bias] == [(3, 16), (3, 24), (3, 12)]
    assert made.num_parameters == 16 * 16 + 16 + 2 * 16 * 24 + 24 + 12 * 12 + 12
    full = adapters(kind="linear", rank="full")
    assert full.num_parameters == sum(dim * dim + dim for dim in WIDTHS.values())
    assert "kind='linear'" in repr(made) and "rank='full'" in repr(full) and "kind" not in repr(adapters())


@pytest.mark.parametrize("rank", [4, "full"])
def test_linear_forward_is_the_map(rank: int | str) -> None:
    made = adapters(kind="linear", rank=rank, seed=0)
    features = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([2, 0, 1, 1, 0, 2])
    for tasks in (slice(None), slice(1, 2), index):
        assert torch.equal(made(1, features, tasks), features)  # new ones change nothing
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    matrices = made.down[1].mT @ (torch.eye(24) if rank == "full" else made.up[1].mT)  # [num_tasks, dim, dim]
    for tasks, expected in [(slice(None), torch.tensor([0, 0, 1, 1, 2, 2])), (index, index)]:
        oracle = features - features @ matrices[expected] - made.bias[1][expected, None]
        torch.testing.assert_close(made(1, features, tasks), oracle, rtol=1e-4, atol=1e-4)


def test_files_have_a_version(tmp_path: Path) -> None:
    """Those of before had none, and relu adapters alone."""
    made, path = filled(), tmp_path / "adapters.safetensors"
    before = {"tasks": made.tasks, "widths": made.widths, "rank": made.rank}
    save_file(made.state_dict(), path, metadata={"surgery_adapters": json.dumps(before)})
    loaded = SurgeryAdapters.load(path)
    assert loaded.kind == "relu"
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), made.parameters(), strict=True))
    newer = {**before, "kind": "relu", "version": 3}
    save_file(made.state_dict(), path, metadata={"surgery_adapters": json.dumps(newer)})
    message = "path must be a file of version 2 or before, got 3: it was written by a newer surgery_kernels"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SurgeryAdapters.load(path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "affine"}, ValueError, "kind must be one of 'relu', 'linear', got 'affine'"),
        ({"rank": "full"}, TypeError, "rank must be an integer, got 'full'"),
        ({"rank": "most", "kind": "linear"}, TypeError, "rank must be 'full' or an integer, got 'most'"),
        ({"rank": 0, "kind": "linear"}, ValueError, "rank must be 1 or greater, got 0"),
    ],
    ids=str,
)
def test_refused_kinds_and_ranks(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        adapters(**options)
