"""Experts packed into one file, and any of them put together again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery_kernels import _C, merge_state_dicts
from surgery_kernels.checkpoint import PackedExperts, pack_experts
from tests.cases import DTYPES, assert_same, gaussian, inputs, option_id
from tests.checkpoints import files_in

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
TASKS = ("maths", "code", "law")
METHODS: dict[str, dict[str, Any]] = {
    "emr": {},
    "tall_masks": {"selectivity": [0.2, 0.4, 0.6]},
}


def models(dtype: torch.dtype = torch.float32) -> tuple[StateDict, dict[str, StateDict]]:
    """With tied weights, an empty tensor, a scalar and an integer buffer."""
    states: list[StateDict] = [{"ids": torch.arange(5)} for _ in range(4)]
    for name, shape in {"z": (33, 40), "a": (65,), "empty": (0, 3), "scale": ()}.items():
        base, experts = inputs(gaussian, shape, 3, dtype)
        for state, tensor in zip(states, (base, *experts), strict=True):
            state[name] = tensor
    for state in states:
        state["tied"] = state["z"]
    return states[0], dict(zip(TASKS, states[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("method", METHODS)
def test_every_expert_is_as_the_method_has_it(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, experts = models(dtype)
    packed = pack_experts(base, experts, tmp_path / "experts.safetensors", method=method, **METHODS[method])
    assert (packed.method, packed.tasks) == (method, TASKS)
    for t, task in enumerate(TASKS):
        options = {**METHODS[method], "task": t}
        expected = merge_state_dicts(base, list(experts.values()), method=method, **options)
        actual = packed.expert(task, base)
        assert list(actual) == list(base)
        assert actual["tied"].data_ptr() == actual["z"].data_ptr()
        for name in base:
            if method == "emr" or name == "ids":
                assert_same(actual[name], expected[name], name)
            else:  # the shared model is stored, not its change
                torch.testing.assert_close(actual[name], expected[name], rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_from_files(tmp_path: Path) -> None:
    base, experts = models(torch.bfloat16)
    for name, state in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file({key: x.clone() for key, x in state.items()}, tmp_path / name / "model.safetensors")
    paths = {task: tmp_path / task for task in TASKS}
    in_memory = pack_experts(
        {key: x.clone() for key, x in base.items()},
        {task: {key: x.clone() for key, x in state.items()} for task, state in experts.items()},
        tmp_path / "memory.safetensors",
    )
    pack_experts(tmp_path / "base", paths, tmp_path / "files.safetensors")
    files = files_in(tmp_path)
    assert files["files.safetensors"] == files["memory.safetensors"]
    opened = PackedExperts.open(tmp_path / "files.safetensors")
    for name, tensor in opened.expert("code", tmp_path / "base").items():
        assert_same(tensor, in_memory.expert("code", base)[name], name)


def test_size_and_reads(tmp_path: Path) -> None:
    """A bit for every entry and expert, base and shared model read once."""
    base, (expert,) = inputs(gaussian, 80_000, 1, torch.float32)
    before = _C.bytes_read()
    packed = pack_experts({"w": base}, {str(t): {"w": expert + t / 8} for t in range(8)}, tmp_path / "packed")
    assert _C.bytes_read() - before == 9 * base.nbytes
    assert base.nbytes * 5 // 4 <= (tmp_path / "packed").stat().st_size < base.nbytes * 5 // 4 + 4096
    before = _C.bytes_read()
    packed.expert("3", {"w": base})
    assert _C.bytes_read() - before == 2 * base.nbytes


def test_complete_or_not_there(tmp_path: Path) -> None:
    base, experts = models()
    experts["law"]["a"] = experts["law"]["a"].clone()
    experts["law"]["a"][7] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"^experts\[2\] must be finite, got 1 NaN or infinite values in tensor 'a'$"
    ):
        pack_experts(base, experts, tmp_path / "experts.safetensors")
    assert files_in(tmp_path) == {}
    packed = pack_experts(base, experts, tmp_path / "experts.safetensors", nonfinite="drop")
    assert all(x.isfinite().all() for x in packed.expert("law", base).values())
    with pytest.raises(FileExistsError, match=r"^out must not exist, got "):
        pack_experts(base, experts, tmp_path / "experts.safetensors")


def test_refused(tmp_path: Path) -> None:
    base, experts = models()
    packed = pack_experts(base, experts, tmp_path / "experts.safetensors")
    other = base | {"a": base["a"] + 1}
    for message, call in {
        "task must be one of 'maths', 'code', 'law', got 'art'": lambda: packed.expert("art", base),
        "base must be the model that experts were packed with, got another 'a'": lambda: packed.expert("law", other),
        "base must have the tensors that were packed, got no 'a'": lambda: packed.expert("law", {"z": base["z"]}),
        "base must have the tensors that were packed, got also 'b'": lambda: packed.expert(
            "law", base | {"b": torch.ones(2)}
        ),
        "base['a'] must be torch.float32 (65,), got torch.float16 (65,)": lambda: packed.expert(
            "law", base | {"a": base["a"].half()}
        ),
        "method must be one of 'tall_masks', 'emr', got 'ties'": lambda: pack_experts(
            base, experts, tmp_path / "new", method="ties"
        ),
        "base must have floating-point tensors, got none": lambda: pack_experts(
            {"ids": base["ids"]}, {task: {"ids": base["ids"]} for task in TASKS}, tmp_path / "new"
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"^path must be a file of packed experts, got "):
        PackedExperts.open(tmp_path / "plain.safetensors")
    with pytest.raises(TypeError, match=r"^options of method='emr' must be among .*, got 'density'$"):
        pack_experts(base, experts, tmp_path / "new", density=0.3)
    assert not (tmp_path / "new").exists()
