"""No temporary is as large as an input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.peak_memory import INPUT_BYTES

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc"),
]

RunPython = Callable[..., str]


@pytest.mark.parametrize("options", [{}, {"semantics": "mergekit", "rescale": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["one_tensor", "state_dict"])
def test_ties(run_python: RunPython, case: str, dtype: str, options: dict[str, Any]) -> None:
    assert int(run_python("-m", "tests.peak_memory", case, dtype, json.dumps(options))) < INPUT_BYTES // 4


def test_masked_ties(run_python: RunPython) -> None:
    options = json.dumps({"semantics": "mergekit", "rescale": True, "keep_density": 0.5, "upper": [2.0] * 3})
    assert int(run_python("-m", "tests.peak_memory", "one_tensor", "bfloat16", options)) < INPUT_BYTES // 4


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_linear_methods(run_python: RunPython, method: str) -> None:
    options = json.dumps({"method": method})
    assert int(run_python("-m", "tests.peak_memory", "state_dict", "bfloat16", options)) < INPUT_BYTES // 4


def test_scores_lie_nowhere(run_python: RunPython) -> None:
    options = json.dumps({"method": "pcb"})
    assert int(run_python("-m", "tests.peak_memory", "state_dict", "bfloat16", options)) < INPUT_BYTES // 4


@pytest.mark.parametrize("options", [{}, {"rule": "della", "epsilon": 0.2}], ids=str)
def test_masks(run_python: RunPython, options: dict[str, Any]) -> None:
    beside_what_is_subtracted = int(run_python("-m", "tests.peak_memory", "masks", "bfloat16", json.dumps(options)))
    assert beside_what_is_subtracted < INPUT_BYTES // 4 - INPUT_BYTES  # its bits are no tensor like an input


def test_masks_of_a_row_as_long_as_the_input(run_python: RunPython) -> None:
    options = json.dumps({"rule": "della", "epsilon": 0.2})
    assert int(run_python("-m", "tests.peak_memory", "one_row", "bfloat16", options)) + INPUT_BYTES < 64 << 20


def test_the_measurement_sees_a_temporary(run_python: RunPython) -> None:
    assert int(run_python("-m", "tests.peak_memory", "eager", "float32", "{}")) > 0.9 * INPUT_BYTES
