"""One result, to the bit: on every instruction set, thread count, split of the work and run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, ties_merge, ties_split, trim_thresholds
from tests.cases import (
    DTYPES,
    KINDS,
    SEMANTICS,
    bits,
    equal,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    option_id,
    rows,
    weights_of,
)

pytestmark = pytest.mark.any_isa

OPTIONS: list[dict[str, Any]] = [
    {"reduce": "mean", "lam": 0.3},
    {"reduce": "sum", "elect": "count"},
    {"reduce": "max", "density": [0.2, 1.0, 0.01]},
    {"semantics": "mergekit", "weights": weights_of(3), "rescale": True, "lam": -0.7},
    {"semantics": "mergekit", "normalize": False, "elect": "count"},
    {"semantics": "mergekit", "elect": "none", "weights": weights_of(3), "density": 1.0},
    {"semantics": "peft", "weights": weights_of(3), "density": 0.57},
]


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(bits(x).numpy().tobytes() for x in tensors)).hexdigest()


def everything(base: Tensor, experts: list[Tensor], options: dict[str, Any]) -> str:
    """One digest of all that the ops return."""
    shared = {k: v for k, v in options.items() if k not in ("reduce", "lam", "normalize")}
    thresholds = trim_thresholds(
        base, experts, density=options.get("density", 0.2), semantics=options.get("semantics", "paper")
    )
    return digest(thresholds, ties_merge(base, experts, **options), ties_split(base, experts, **shared))


@pytest.mark.usefixtures("restored_isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_instruction_sets(kind: Any, dtype: torch.dtype) -> None:
    for count in (1, 100, 9_001):
        base, experts = inputs(kind, count, 3, dtype)
        for options in OPTIONS:
            digests = {}
            for isa in _C.isas():
                _C.set_isa(isa)
                digests[isa] = everything(base, experts, options)
            assert len(set(digests.values())) == 1, f"{count} elements, {options}: {digests}"


@pytest.mark.usefixtures("restored_isa")
def test_instruction_sets_on_unaligned_memory() -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 1_001, 3, dtype)
        digests = set()
        for isa in _C.isas():
            _C.set_isa(isa)
            for offset in range(4):
                moved = [torch.cat([x.new_zeros(offset), x])[offset:] for x in (base, *experts)]
                digests.add(everything(moved[0], moved[1:], OPTIONS[0]))
        assert len(digests) == 1


def test_instruction_sets_are_listed() -> None:
    assert _C.isa() in _C.isas()
    assert set(_C.isas()) <= set(_C.build_info()["isas"])


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("kind", [gaussian, grid, equal, rows, leaning_up, leaning_down], ids=option_id)
def test_threads(kind: Any) -> None:
    for count, dtype in ((60_001, torch.float32), (100_003, torch.bfloat16), (20_001, torch.float64)):
        base, experts = inputs(kind, count, 3, dtype)
        for options in OPTIONS:
            digests = {}
            for threads in (1, 2, 3, 4, 7):
                torch.set_num_threads(threads)
                digests[threads] = everything(base, experts, options)
            assert len(set(digests.values())) == 1, f"{dtype}, {options}: {digests}"


# not "paper" in 16 bits: sums cancel exactly here and there, and a draw takes its sign from the whole of a call
SLICEABLE = [(s, d) for s in SEMANTICS for d in DTYPES if s != "paper" or d.itemsize > 2]


@pytest.mark.parametrize(("semantics", "dtype"), SLICEABLE, ids=option_id)
def test_slices(semantics: str, dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 50_001, 3, dtype)
    thresholds = trim_thresholds(base, experts, density=0.2, semantics=semantics)
    options: dict[str, Any] = {"semantics": semantics, "lam": 0.3, "thresholds": thresholds}
    whole = ties_merge(base, experts, **options)
    for size in (50_000, 4_096, 7_001, 333):
        slices = [
            ties_merge(part, list(expert_parts), **options)
            for part, *expert_parts in zip(base.split(size), *(expert.split(size) for expert in experts), strict=True)
        ]
        assert torch.equal(bits(torch.cat(slices)), bits(whole)), f"slices of {size}"


def test_runs() -> None:
    base, experts = inputs(leaning_up, 100_003, 3, torch.float32)
    assert len({everything(base, experts, OPTIONS[0]) for _ in range(10)}) == 1


KNOWN_ANSWER = """
import hashlib, torch
from surgery_kernels import ties_merge
number = torch.arange(50_000, dtype=torch.int64)
base, *experts = ((number * step % 1021 - 510).to(torch.float32) / 997 for step in (48271, 69621, 40692, 39373))
merged = ties_merge(base, experts, lam=0.3)
print(hashlib.sha256(merged.numpy().tobytes()).hexdigest())
"""


def test_known_answer(run_python: Callable[..., str]) -> None:
    answers = {run_python("-c", KNOWN_ANSWER).strip() for _ in range(2)}
    assert answers == {"426772ca1a8a282b036e0a97e38fab1b1848f2eb61e5ed661b00cd98846e66c6"}
