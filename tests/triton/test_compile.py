"""Every Triton kernel compiles for every GPU, without spilling registers and with wide loads; no GPU takes part."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surgery_kernels.triton import MODULES

SCRIPT = Path(__file__).parents[2] / "bench/compile_kernels.py"
STEMS = sorted(path.stem for path in (SCRIPT.parent / "launches").glob("[a-z]*.py"))

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton for this platform"),
]


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def compiled() -> dict[str, subprocess.CompletedProcess[str]]:
    """Two at a time: a process compiles on one core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_for(target: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--targets", target]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    with ThreadPoolExecutor(2) as processes:
        return dict(zip(TARGETS, processes.map(compile_for, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels(compiled: dict[str, subprocess.CompletedProcess[str]], target: str) -> None:
    result = compiled[target]
    assert result.returncode == 0, result.stdout[-2_000:] + result.stderr[-2_000:]
    assert result.stdout.count("| launch | kernel |") == len(STEMS)


def test_every_stem_is_compiled() -> None:
    assert {*MODULES.values()} - {"gram_cross"} <= {*STEMS}  # that is made of torch's products alone
