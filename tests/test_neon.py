"""The NEON kernels give the bits of the baseline ones, products aside: cross-compiled and run by an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.any_isa


def first_installed(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is not installed")


def printed(program: str, compiler: str, isa: str, folder: Path, *flags: str, runner: tuple[str, ...] = ()) -> str:
    """What tests/<program>.cpp prints with the kernels of an instruction set."""
    options = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *flags]
    sources = [ROOT / f"tests/{program}.cpp", *sorted(ROOT.glob("csrc/cpu/*_kernel.cpp"))]
    binary = folder / f"{program}-{isa}"
    subprocess.run([compiler, *options, f"-DSK_ISA={isa}", f"-I{ROOT / 'csrc'}", *sources, "-o", binary], check=True)
    return subprocess.run([*runner, binary], check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=["kernel_hashes", "kernel_values"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, str]:
    """A program and what it prints: of the baseline kernels, and of the NEON ones."""
    cross = first_installed("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")
    emulator = first_installed("qemu-aarch64", "qemu-aarch64-static")
    native = first_installed("c++", "g++", "clang++")
    neon = printed(request.param, cross, "neon", tmp_path, runner=(emulator,))
    return request.param, printed(request.param, native, "base", tmp_path), neon


def assert_values_agree(values: str, expected: str) -> None:
    """To 1e-4 of the largest number of a line, and to the last bit of a 16-bit dtype."""
    for line, other in zip(values.splitlines(), expected.splitlines(), strict=True):
        dtype, name, *numbers = line.split()
        assert other.split()[:2] == [dtype, name]
        x, y = (torch.tensor([float(n) for n in text.split()[2:]]) for text in (line, other))
        stored = name in ("corrected", "d_features")
        tolerance = {"bfloat16": 2**-7, "float16": 2**-10}.get(dtype, 1e-4) if stored else 1e-4
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(y.abs().max()), msg=f"{dtype} {name}")


def test_neon_equals_base(pair: tuple[str, str, str]) -> None:
    program, base, neon = pair
    if program == "kernel_values":
        assert "bfloat16 trained_up" in base
        assert_values_agree(neon, base)
    else:
        assert "bfloat16 trim" in base
        assert neon == base
