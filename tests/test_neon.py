"""The NEON kernels give the bits of the baseline ones: cross-compiled, run by an emulator, compared by hashes."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.any_isa


def first_installed(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is not installed")


def kernel_hashes(compiler: str, isa: str, folder: Path, runner: tuple[str, ...] = ()) -> str:
    program = folder / isa
    options = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    sources = [ROOT / "tests/kernel_hashes.cpp", *sorted(ROOT.glob("csrc/cpu/*_kernel.cpp"))]
    subprocess.run([compiler, *options, f"-DSK_ISA={isa}", f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    return subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout


def test_neon_equals_base(tmp_path: Path) -> None:
    cross = first_installed("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")
    emulator = first_installed("qemu-aarch64", "qemu-aarch64-static")
    native = first_installed("c++", "g++", "clang++")
    expected = kernel_hashes(native, "base", tmp_path)
    assert "bfloat16 trim" in expected
    assert kernel_hashes(cross, "neon", tmp_path, runner=(emulator,)) == expected
