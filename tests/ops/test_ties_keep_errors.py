"""What ties_merge refuses of masks, random numbers, upper limits, factors and counts, and that nothing is written."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from surgery_kernels import ties_merge

pytestmark = pytest.mark.any_isa

OPS = torch.ops.surgery_kernels

REFUSED: list[tuple[str, dict[str, Any]]] = [
    (
        "semantics and elect must be 'exact' and 'none' with reduce='magmax', got 'paper' and 'sum'",
        {"reduce": "magmax"},
    ),
    (
        "semantics and elect must be 'exact' and 'none' with reduce='unique', got 'exact' and 'sum'",
        {"reduce": "unique", "semantics": "exact"},
    ),
    (
        "weights must be None with reduce='magmax', got 2.0",
        {"reduce": "magmax", "semantics": "exact", "elect": "none", "weights": 2.0},
    ),
    (
        "normalize must be True with reduce='unique', got False",
        {"reduce": "unique", "semantics": "exact", "elect": "none", "normalize": False},
    ),
    ("scales must be None with semantics='paper', got 2.0", {"scales": 2.0}),
    (
        "rescale must be False where scales are given, got True",
        {"scales": 2.0, "rescale": True, "semantics": "mergekit"},
    ),
    ("scales must be finite, got nan", {"scales": math.nan, "semantics": "exact"}),
    ("scales must be one number or one per expert (2), got 1", {"scales": [1.0], "semantics": "exact"}),
    ("unique_scales must be None with reduce='mean', got 2.0", {"unique_scales": 2.0}),
    ("min_count must be an integer between 0 and the number of experts, got 3", {"min_count": 3}),
    ("min_count must be an integer between 0 and the number of experts, got -1", {"min_count": -1}),
    ("min_count must be an integer between 0 and the number of experts, got 1.0", {"min_count": 1.0}),
    ("keep_density must be in [0, 1], got 1.5", {"keep_density": 1.5}),
    ("keep_density must be one number or one per expert (2), got 1", {"keep_density": [0.5]}),
    ("seed must have 64 bits, got 18446744073709551616", {"keep_density": 0.5, "seed": 2**64}),
    ("tensor_id must be in [0, 2**32), got -1", {"keep_density": 0.5, "tensor_id": -1}),
    ("task_ids must be one number for every expert (2), got 1", {"keep_density": 0.5, "task_ids": [1]}),
    ("keep must be a bool tensor, or packed bits in uint8, got list", {"keep": [True]}),
    ("keep must be a bool tensor, or packed bits in uint8, got torch.float32", {"keep": torch.ones(2, 4)}),
    (
        "keep must have shape (2 or 1, 4) in torch.bool, got (3, 4)",
        {"keep": torch.ones(3, 4, dtype=torch.bool)},
    ),
    (
        "keep must have shape (2 or 1, 1) in torch.uint8, got (2, 4)",
        {"keep": torch.ones(2, 4, dtype=torch.uint8)},
    ),
    (
        "keep must be on the device of experts[0], cpu, got meta",
        {"keep": torch.ones(2, 4, dtype=torch.bool, device="meta")},
    ),
    ("upper must have shape (2,), got (3,)", {"upper": [1.0] * 3}),
    ("upper must be a list of numbers, got '1'", {"upper": ["1", "2"]}),
    ("upper must be 0 or greater, got -1", {"upper": [1.0, -1.0]}),
    ("upper must be 0 or greater, got nan", {"upper": [1.0, math.nan]}),
]


@pytest.mark.parametrize(("message", "options"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(message: str, options: dict[str, Any]) -> None:
    out = torch.full((4,), 7.0)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^{re.escape(message)}$"):
        ties_merge(torch.zeros(4), [torch.ones(4), torch.full((4,), 2.0)], **options, out=out)
    assert (out == 7).all()


REFUSED_BY_THE_OP: list[tuple[str, dict[str, Any]]] = [
    ("keep must be one tensor for every merged tensor, got 2 for 1", {"keep": [torch.ones(2, 1).byte()] * 2}),
    (
        "keep must be uint8 [num_tasks or 1, 1] on the CPU, got another tensor",
        {"keep": [torch.ones(2, 2, dtype=torch.uint8)]},
    ),
    ("keep must be uint8 [num_tasks or 1, 1] on the CPU, got another tensor", {"keep": [torch.ones(2, 1)]}),
    ("upper must be given where upper_cuts are, got none", {"upper_cuts": [1, 2]}),
    ("upper_cuts must be one per expert, got 1", {"upper": torch.ones(2), "upper_cuts": [1]}),
    ("upper must be one value per expert on the CPU, got 3", {"upper": torch.ones(3)}),
    ("upper must be float32 or float64, got another dtype", {"upper": torch.ones(2).half()}),
    ("keep_density must be one number per expert (2), got 1", {"keep_density": [0.5]}),
    ("keep_density must be 0 or greater, got -1", {"keep_density": [0.5, -1.0]}),
    (
        "tensor_ids must be one number for every merged tensor (1), got 2",
        {"keep_density": [0.5] * 2, "tensor_ids": [1, 2]},
    ),
    ("task_ids must be in [0, 2**32), got -1", {"keep_density": [0.5] * 2, "task_ids": [1, -1]}),
    (
        "scales must be float64 [1, 2] on the CPU, got another tensor",
        {"scales": torch.ones(1, 2), "semantics": "exact"},
    ),
    (
        "semantics must be 'mergekit' or 'exact' where scales are given, got another",
        {"scales": torch.ones(1, 2).double()},
    ),
    (
        "rescale must be False where scales are given, got True",
        {"scales": torch.ones(1, 2).double(), "semantics": "mergekit", "rescale": True},
    ),
    (
        "reduce must be 'unique' where unique_scales are given, got 'mean'",
        {"unique_scales": torch.ones(1, 2).double()},
    ),
    (
        "unique_scales must be float64 [1, 2] on the CPU, got another tensor",
        {"unique_scales": torch.ones(2).double(), "semantics": "exact", "elect": "none", "reduce": "unique"},
    ),
    ("min_count must be between 0 and the number of experts, got 3", {"min_count": 3}),
    (
        "semantics and elect must be 'exact' and 'none' with reduce='magmax', got 'exact' and 'sum'",
        {"semantics": "exact", "reduce": "magmax"},
    ),
    (
        "weights must be None with reduce='unique', got weights",
        {"semantics": "exact", "elect": "none", "reduce": "unique", "weights": [1.0, 2.0]},
    ),
    (
        "normalize must be True with reduce='unique', got False",
        {"semantics": "exact", "elect": "none", "reduce": "unique", "normalize": False},
    ),
]


@pytest.mark.parametrize(("message", "options"), REFUSED_BY_THE_OP, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_by_the_op(message: str, options: dict[str, Any]) -> None:
    out = torch.full((4,), 7.0)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        OPS.ties_merge_out([torch.zeros(4)], [torch.ones(4)] * 2, [1.0] * 2, **options, out=[out])
    assert (out == 7).all()
