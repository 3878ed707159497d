"""Compiles the CUDA kernels for GPUs that need not be there, and reports what became of them.

    python bench/compile_cuda.py [--architectures 80,90,100] [--write]

Exit status 1 where a kernel spills registers, or where the loop of a main kernel loads one value at a time beside its
loads of 16 bytes. --write puts the table into bench/results/cuda_kernels.md. Needs nvcc, c++filt, and cuobjdump and
nvdisasm of CUDA or of the triton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["80", "90", "100"]
MAIN = ("merge<", "count<")  # read every tensor whenever something is merged
NARROW = re.compile(r"\bLDG?\S*\.[SU](8|16)\b")


def tool(name: str) -> str | None:
    """Path of a program; cuobjdump and nvdisasm come with the triton package too."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which(name) or (shutil.which(name, path=str(beside)) if beside else None)


def missing() -> list[str]:
    return [name for name in ("nvcc", "cuobjdump", "nvdisasm", "c++filt") if not tool(name)]


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str  # with its template arguments
    architecture: str
    registers: int
    shared: int  # bytes
    stack: int  # bytes
    wide_loads: int  # of 16 bytes
    narrow_loads: int  # of 1 or 2 bytes in the innermost loops that load 16 bytes

    @property
    def faults(self) -> list[str]:
        faults = []
        if self.stack:
            faults.append(f"spills into {self.stack} bytes of stack")
        if self.name.startswith(MAIN) and not self.wide_loads:
            faults.append("has no 16-byte loads")
        if self.name.startswith(MAIN) and self.narrow_loads:
            faults.append(f"loads {self.narrow_loads} single values in a loop of 16-byte loads")
        return faults


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def compile_kernels(architecture: str, source: Path, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-Icsrc",
        "-gencode",
        f"arch=compute_{architecture},code=sm_{architecture}",
    ]
    run("nvcc", *flags, "-cubin", str(source), "-o", str(cubin))
    objdump, disassembler = tool("cuobjdump"), tool("nvdisasm")
    assert objdump and disassembler
    return list(read(architecture, run(objdump, "-res-usage", str(cubin)), run(disassembler, "-c", str(cubin))))


def read(architecture: str, resources: str, assembly: str) -> Iterator[Kernel]:
    code = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^//-{5}|\Z)", assembly, re.MULTILINE | re.DOTALL))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", resources)
    signatures = run("c++filt", *(symbol for symbol, *_ in usage)).splitlines()
    for (symbol, registers, stack, shared), signature in zip(usage, signatures, strict=True):
        loops = innermost_loops(code[symbol])
        hot = [loop for loop in loops if re.search(r"LDG\S*\.128", loop)]
        yield Kernel(
            readable(signature),
            f"sm_{architecture}",
            int(registers),
            int(shared),
            int(stack),
            len(re.findall(r"LDG\S*\.128", code[symbol])),
            sum(len(NARROW.findall(loop)) for loop in hot),
        )


def innermost_loops(code: str) -> list[str]:
    """What lies between a label and a branch back to it, without loops that hold others."""
    labels = {match[1]: match.end() for match in re.finditer(r"^(\.L_\w+):", code, re.MULTILINE)}
    spans = []
    for branch in re.finditer(r"\bBRA\S* (?:\S+, )?`\((\.L_\w+)\)", code):
        begin = labels.get(branch[1], len(code))
        if begin < branch.start():
            spans.append((begin, branch.start()))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[begin:end] for begin, end in inner]


RULES = ("paper", "paper_max", "mergekit", "mergekit_all", "peft")
SHORTER = [
    (r"sk::cuda::|\(anonymous namespace\)::|__nv_|__(?=half)", ""),
    (r"\(sk::Rule\)(\d)", lambda match: RULES[int(match[1])]),
    (r", false\b", ""),
    (r", true\b", ", split"),
    (r"(Candidates|Tensors)<\w+> ?", r"\1"),
]


def readable(signature: str) -> str:
    """void sk::cuda::(anonymous namespace)::merge<float, (sk::Rule)0, false>(...) as merge<float, paper>."""
    for pattern, replacement in SHORTER:
        signature = re.sub(pattern, replacement, signature)
    found = re.match(r"(?:void )?(\w+(?:<[\w, ]*>)?)\(", signature)
    return found[1] if found else signature


def kernels(architectures: Sequence[str]) -> list[Kernel]:
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    work = [(architecture, source) for architecture in architectures for source in sources]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        lists = pool.map(lambda one: compile_kernels(*one, Path(folder)), work)
        return [kernel for found in lists for kernel in found]


def table(found: Sequence[Kernel]) -> str:
    names = sorted({kernel.name for kernel in found})
    architectures = list(dict.fromkeys(kernel.architecture for kernel in found))
    by = {(kernel.name, kernel.architecture): kernel for kernel in found}
    lines = ["| kernel | " + " | ".join(architectures) + " |", "| --- |" + " ---: |" * len(architectures)]
    for name in names:
        cells = [by[name, architecture] for architecture in architectures]
        shown = [f"{cell.registers} / {cell.shared} / {cell.wide_loads}" for cell in cells]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if absent := missing():
        raise SystemExit(f"{' and '.join(absent)} must be installed")
    found = kernels(arguments.architectures.split(","))
    version = re.search(r"release (\S+),", run("nvcc", "--version"))
    text = (
        "# CUDA kernels\n\nRegisters per thread / bytes of shared memory / loads of 16 bytes, nvcc "
        f"{version[1] if version else ''}: `python bench/compile_cuda.py --write`.\n\n{table(found)}\n"
    )
    faults = [f"{kernel.name} on {kernel.architecture} {fault}" for kernel in found for fault in kernel.faults]
    print(text + "\n".join(faults))
    if faults:
        sys.exit(1)
    if arguments.write:
        (ROOT / "bench/results/cuda_kernels.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
