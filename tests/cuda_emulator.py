"""Builds the CUDA kernels for the CPU: csrc/cuda under csrc/emu, as the ops of torch.ops.surgery_kernels_emulated."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


def compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = [name for name in ("g++", "clang++") if shutil.which(name)]
    if sys.platform != "linux" or not found:
        pytest.skip("the emulator needs Linux and a C++ compiler")
    return found[:1]


def run(command: list[str], **environment: str) -> str:
    answer = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout + answer.stderr


def build(folder: Path, *flags: str) -> Path:
    """The library, compiled without a warning; it needs no CUDA."""
    hosts = [path for path in (ROOT / "csrc/cuda").glob("*.cpp") if path.name not in ("current.cpp", "register.cpp")]
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), *hosts, *(ROOT / "csrc/emu").glob("*.cpp")]
    options = [
        "-Wno-unknown-pragmas",
        "-Icsrc",
        "-isystem",
        str(TORCH / "include"),
        "-DSK_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command = [*compiler(), *FLAGS, *flags]

    def compiled(source: Path) -> str:
        target = folder / f"{source.parent.name}_{source.name}.o"
        said = run([*command, *options, "-x", "c++", "-c", str(source), "-o", str(target)])
        assert not said, said
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "emulated.so"
    torch_libraries = [str(TORCH / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")]
    run([*command, "-shared", *objects, *torch_libraries, "-o", str(library)])
    return library


def exercise(library: str) -> None:
    """Calls that go through every kernel."""
    from surgery_kernels import reference
    from tests.cases import SEMANTICS, assert_same, gaussian, inputs

    torch.ops.load_library(library)
    ops = torch.ops.surgery_kernels_emulated
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((), (0,), (257,), (5_000,)):
            for semantics in SEMANTICS:
                options: dict[str, Any] = {"semantics": semantics, "rescale": semantics == "mergekit"}
                base, experts = inputs(gaussian, shape, 3, dtype)
                expected = reference.ties_merge(base, experts, density=0.2, **options)
                assert_same(ops.ties_merge(base, experts, [0.2] * 3, **options), expected)
                ops.ties_split(None, experts, [0.2] * 3, **options)
    unaligned = [torch.randn(5_001)[1:] for _ in range(3)]
    ops.ties_merge_out([], unaligned, [0.1] * 3, out=[torch.empty(5_003)[3:]])


if __name__ == "__main__":
    exercise(sys.argv[1])
    sys.stdout.write("fine\n")
