"""ties_merge of one tensor, 8 experts, against the toolkits, each under its own semantics, and the bound.

Bound: base and experts are read twice (trim, then merge), or once where they are large and have 32 bits, and the result
is written once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baselines import BASELINES, ours
from comparison import differing_share
from conftest import Measure
from footprint import footprint
from inputs import NUM_TASKS, flat_inputs

from surgery_kernels import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = [1, 1 << 10, 1 << 12, 1 << 14, 1 << 16]
MAIN = 4_000_000
LARGE = 64_000_000
SIZES = [*SMALL, MAIN, pytest.param(LARGE, marks=pytest.mark.large)]

pytestmark = [
    pytest.mark.parametrize("num_params", SIZES),
    pytest.mark.parametrize("dtype", DTYPES),
]


def least_bytes(num_params: int, dtype: torch.dtype, takes_base: bool) -> int:
    nbytes = num_params * dtype.itemsize
    inputs = (NUM_TASKS + takes_base) * nbytes
    once = dtype.itemsize > 2 and inputs >= _C.one_read_from()
    return (1 if once else 2) * inputs + nbytes


def rounds_of(num_params: int, rounds: int) -> int:
    if num_params == LARGE:
        return 1
    return rounds * (40 if num_params < 1 << 14 else 8 if num_params < MAIN else 1)


def describe(num_params: int, dtype: str, contender: str, semantics: str, takes_base: bool) -> dict[str, Any]:
    return {
        "op": "ties_merge",
        "num_params": num_params,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": semantics,
        "least_bytes": least_bytes(num_params, DTYPES[dtype], takes_base),
    }


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="ties_merge")
def test_baseline(measure: Measure, rounds: int, baseline: str, dtype: str, num_params: int) -> None:
    other = BASELINES[baseline]
    pytest.importorskip(other.module)
    base, experts = flat_inputs(num_params, DTYPES[dtype], other.takes_base)
    theirs, mine = other.make(), ours(other.semantics)
    small = num_params in SMALL
    extra = describe(num_params, dtype, baseline, other.semantics, other.takes_base)
    if num_params == MAIN:
        extra |= footprint(baseline, dtype, num_params)
    measure(
        lambda: theirs(base, experts),
        ours=lambda: mine(base, experts),
        check=lambda result: differing_share(result, mine(base, experts), base, experts, other),
        rounds=rounds_of(num_params, rounds),
        warm_up=num_params < LARGE or baseline == "compiled",
        small=small,
        extra=extra,
    )


@pytest.mark.parametrize("semantics", ["paper", "peft", "mergekit"])
@pytest.mark.benchmark(group="ties_merge")
def test_ours(measure: Measure, rounds: int, semantics: str, dtype: str, num_params: int) -> None:
    takes_base = semantics != "peft"
    base, experts = flat_inputs(num_params, DTYPES[dtype], takes_base)
    mine = ours(semantics)
    small = num_params in SMALL
    extra = describe(num_params, dtype, "ours", semantics, takes_base)
    if num_params == MAIN:
        extra |= footprint(f"ours-{semantics}", dtype, num_params)
    expected = mine(base, experts)
    measure(
        lambda: mine(base, experts),
        check=lambda result: 1 - float(torch.equal(result, expected)),
        rounds=4 * (rounds if num_params == LARGE else rounds_of(num_params, rounds)),
        small=small,
        extra=extra,
    )
