"""Every Triton kernel compiles for every GPU, without spilling registers and with wide loads; no GPU takes part."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench/compile_kernels.py"
STEMS = sorted(path.stem for path in (SCRIPT.parent / "launches").glob("[a-z]*.py"))

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton for this platform"),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--targets", target]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2_000:] + result.stderr[-2_000:]
    assert result.stdout.count("| launch | kernel |") == len(STEMS)


def test_every_stem_is_compiled() -> None:
    kernels = SCRIPT.parents[1] / "surgery_kernels/triton"
    hosts = {path.stem for path in kernels.glob("*.py") if "def " + path.stem in path.read_text()}
    assert hosts <= {*STEMS}
