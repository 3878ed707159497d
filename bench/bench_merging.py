"""merge_state_dicts on the shapes of ViT-B/32, 8 experts, against the paper's function on the flattened model.

The state dicts are views of the flattened model: flattening is not part of the eager time.
"""

from __future__ import annotations

import psutil
import pytest
import torch
from baselines import BASELINES, DENSITY, paper_merge
from comparison import differing_share
from conftest import Measure
from footprint import Peak, footprint
from inputs import NUM_TASKS, flat_inputs, num_params_of, state_dict, vit_b32_shapes
from torch import Tensor

from surgery_kernels import merge_state_dicts

SHAPES = vit_b32_shapes()
NUM_PARAMS = num_params_of(SHAPES)
EAGER_BYTES = (4 + 25) * NUM_TASKS * NUM_PARAMS  # inputs, and 25 bytes for every entry of every task vector

StateDicts = tuple[dict[str, Tensor], list[dict[str, Tensor]]]


def describe(contender: str) -> dict[str, object]:
    return {
        "op": "merge_state_dicts",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": "fp32",
        "contender": contender,
        "semantics": "paper",
        "least_bytes": (NUM_TASKS + 2) * NUM_PARAMS * 4,  # so large a model is read once
    }


def as_state_dicts(base: Tensor, experts: list[Tensor]) -> StateDicts:
    return state_dict(base, SHAPES), [state_dict(expert, SHAPES) for expert in experts]


def merged_flat(model: StateDicts) -> Tensor:
    return torch.cat([x.flatten() for x in merge_state_dicts(*model, density=DENSITY).values()])


@pytest.mark.benchmark(group="merge_state_dicts")
def test_eager(measure: Measure) -> None:
    """Memory is taken from the timed call: a second one in a process of its own would take as long again."""
    if psutil.virtual_memory().available < EAGER_BYTES:
        pytest.skip(f"the eager formula needs {EAGER_BYTES / 2**30:.0f} GiB of free memory")
    base, experts = flat_inputs(NUM_PARAMS, torch.float32)
    model = as_state_dicts(base, experts)
    extra = describe("eager")
    peak = Peak()

    def check(result: Tensor) -> float:
        extra["peak_extra_bytes"] = peak.beyond([result])
        return differing_share(result, merged_flat(model), base, experts, BASELINES["eager"])

    measure(
        lambda: paper_merge(base, experts),
        ours=lambda: merge_state_dicts(*model, density=DENSITY),
        check=check,
        rounds=1,
        warm_up=False,
        extra=extra,
    )


@pytest.mark.benchmark(group="merge_state_dicts")
def test_ours(measure: Measure, rounds: int) -> None:
    extra = describe("ours") | footprint("ours-paper", "fp32", "model")
    model = as_state_dicts(*flat_inputs(NUM_PARAMS, torch.float32))
    expected = merge_state_dicts(*model, density=DENSITY)
    measure(
        lambda: merge_state_dicts(*model, density=DENSITY),
        check=lambda result: 1 - float(all(torch.equal(result[name], expected[name]) for name in expected)),
        rounds=2 * rounds,
        extra=extra,
    )
