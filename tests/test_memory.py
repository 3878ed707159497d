"""No temporary is as large as an input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peak_memory import INPUT_BYTES

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc"),
]


def extra_bytes(case: str, dtype: str, options: dict[str, Any]) -> int:
    script = Path(__file__).with_name("peak_memory.py")
    finished = subprocess.run(
        [sys.executable, str(script), case, dtype, json.dumps(options)], capture_output=True, text=True, check=True
    )
    return int(finished.stdout)


@pytest.mark.parametrize("options", [{}, {"semantics": "mergekit", "rescale": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["one_tensor", "state_dict"])
def test_peak(case: str, dtype: str, options: dict[str, Any]) -> None:
    assert extra_bytes(case, dtype, options) < INPUT_BYTES // 4


def test_the_measurement_sees_a_temporary() -> None:
    assert extra_bytes("eager", "float32", {}) > 0.9 * INPUT_BYTES
