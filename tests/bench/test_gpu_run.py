"""What a GPU machine runs, with what may go wrong there: each failure costs its own step or case and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton for this platform"),
]


def run_script(tmp_path: Path, failures: str, limit: int) -> tuple[int, str]:
    """bench/gpu.sh with a Python that says what it is asked for, but for `failures`."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\ncase "$*" in\n{failures}\n*) echo "asked for $*";;\nesac\n')
    python.chmod(0o755)
    answer = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), "--dry-run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "LIMIT": str(limit)},
    )
    assert len(list((tmp_path / "out").iterdir())) <= 8
    return answer.returncode, answer.stdout


STEPS = ("bench/gpu_smoke.py", "bench/gpu.py --budget", "-m pytest", "bench/gpu.py --table")


def test_every_step_runs(tmp_path: Path) -> None:
    status, said = run_script(tmp_path, "", limit=60)
    assert status == 0 and "FAILED" not in said and "setup.py" not in said
    places = [said.index(f"asked for {step}") for step in STEPS]
    assert places == sorted(places)
    assert "test_compile.py" not in said and "test_interpreter.py" not in said


def test_a_build_that_fails(tmp_path: Path) -> None:
    status, said = run_script(tmp_path, '"-c import surgery_kernels"*) exit 1;;\n*setup.py*) exit 3;;', limit=60)
    assert status == 1 and "build.log: FAILED with status 3" in said
    assert all(f"asked for {step}" in said for step in STEPS)


def test_a_test_that_hangs(tmp_path: Path) -> None:
    status, said = run_script(tmp_path, '"-m pytest"*) exec sleep 60;;', limit=2)
    assert status == 1 and "tests.log: FAILED with status 124" in said
    assert f"asked for {STEPS[-1]}" in said


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu")


def case(gpu: Any, name: str, **contenders: Any) -> Any:
    return gpu.Case(name, "fp32", 1, contenders, lambda _, result, expected: float(result != expected), 8)


def test_a_case_that_raises(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising() -> Any:
        raise RuntimeError("no kernel image")

    def broken() -> Any:
        raise MemoryError("of the case")

    def cases(_: Any) -> list[Any]:
        fine = case(gpu, "fine", ours=lambda: lambda: 1, eager=lambda: lambda: 1)
        partly = case(gpu, "partly", ours=lambda: raising, cuda=lambda: lambda: 1, eager=lambda: lambda: 1)
        return [broken, lambda: partly, lambda: fine]

    monkeypatch.setattr(gpu, "cases", cases)
    monkeypatch.setattr(gpu, "DTYPES", {})
    device = gpu.Gpu(dry=True)
    gpu.run_cases(device, 0, tmp_path / "gpu.json")
    rows = json.loads((tmp_path / "gpu.json").read_text())["benchmarks"]
    found = [(row["name"], row["extra_info"]["contender"]) for row in rows]
    assert found == [("partly fp32", "cuda"), ("fine fp32", "ours"), ("partly fp32", "eager"), ("fine fp32", "eager")]
    assert "speedup" in rows[-1]["extra_info"]
    said = capsys.readouterr().out
    assert device.failures == said.count("failed: ") == 4  # each once in either phase
    assert "failed: partly fp32 ours: RuntimeError: no kernel image" in said
    assert "failed: case 0: MemoryError: of the case" in said


CHILD = """
import json, os, sys, time
path, first = sys.argv[1], int(sys.argv[-1])
for unit in range(first, 5):
    rows = json.load(open(path))["benchmarks"] if os.path.exists(path) else []
    json.dump({"begun": unit, "units": 5, "benchmarks": rows}, open(path + ".part", "w"))
    os.replace(path + ".part", path)
    if unit == 1:
        os.abort()
    if unit == 2:
        time.sleep(60)
    if unit == 3:
        sys.exit(3)
    json.dump({"begun": unit, "units": 5, "benchmarks": rows + [unit]}, open(path + ".part", "w"))
    os.replace(path + ".part", path)
"""


def test_cases_that_crash_hang_and_break_the_device(
    gpu: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    fine = gpu.supervise([sys.executable, "-c", CHILD, str(path)], path, budget=60, case_seconds=0.5)
    assert not fine
    assert json.loads(path.read_text())["benchmarks"] == [0, 4]
    said = capfd.readouterr().out
    assert "killed: case 2 hangs" in said
    assert [line.split()[1] for line in said.splitlines() if "was lost" in line] == ["1", "2", "3"]
