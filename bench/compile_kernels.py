"""Compiles the Triton kernels for GPUs that need not be there, and reports what became of them.

    python bench/compile_kernels.py [--stems surgery_adapter,trim] [--targets sm_90,gfx942] [--write]

Every launch of the calls in bench/launches is compiled as the host functions make it (types, alignment, constants,
warps), and does not run. Exit status 1 where a kernel spills more than a few registers, takes more shared memory than
GPUs have, or does not load 16 bytes at a time where it should. --write puts the tables of all --targets into
bench/results/kernels.md, in place of those of the same stems.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import triton
from launches import Launch
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MOST_SPILLS = 16  # Triton 3.6 to 3.9 spill in different kernels, a few of some thousand instructions
SHARED = {"cuda": 99 << 10, "hip": 64 << 10}  # bytes that one program may take: of sm_86, sm_89 and sm_120 too
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
STEMS = [path.stem for path in sorted(Path(__file__).with_name("launches").glob("[a-z]*.py"))]


@dataclass(frozen=True)
class Row:
    """One kernel of one launch, compiled for one target."""

    stem: str
    launch: str
    kernel: str
    target: str
    warps: int
    registers: int
    shared: int  # bytes
    spills: int  # instructions that spill or reload; registers on AMD
    matrix: int  # instructions of the matrix units
    wide: int  # global loads of 16 bytes
    narrow: int  # global loads of 1 or 2 bytes in loops that load 16 bytes too
    pace: int  # instructions for every load of 16 bytes, in the loop that has most of them; 0: there is none
    should_be_wide: bool

    @property
    def faults(self) -> list[str]:
        found = []
        if self.spills > MOST_SPILLS:
            found.append(f"spills registers, by {self.spills} instructions")
        if self.shared > SHARED[TARGETS[self.target].backend]:
            found.append(f"takes {self.shared} bytes of shared memory")
        if self.should_be_wide and not self.wide:
            found.append("has no 16-byte loads")
        if self.should_be_wide and self.narrow:
            found.append("has narrow loads in a hot loop")
        return found

    def __str__(self) -> str:
        return f"{self.stem}, {self.launch}: {self.kernel} on {self.target}"


class Absent:
    """A driver of GPUs that are not there; `target` is the one to compile for."""

    def __init__(self) -> None:
        self.target = next(iter(TARGETS))

    def get_current_device(self) -> str:
        return self.target  # kernels are cached by device

    def get_current_stream(self, _: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


class Recorder:
    """Makes launches compile instead of run, and keeps what they compiled."""

    def __init__(self) -> None:
        self.kernels: dict[int, tuple[str, Any]] = {}  # by identity: a launch may be made twice
        run = JITFunction.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = run(function, *args, grid=grid, warmup=True, **options)
            self.kernels[id(kernel)] = (function.__name__, kernel)
            return kernel

        JITFunction.run = compile_only
        Autotuner.run = Autotuner.warmup  # every configuration

    def take(self) -> list[tuple[str, Any]]:
        kernels = list(self.kernels.values())
        self.kernels.clear()
        return kernels


def compile_all(stems: Sequence[str], targets: Sequence[str]) -> Iterator[Row]:
    absent, recorder = Absent(), Recorder()
    driver.set_active(absent)
    for stem in stems:
        for target in targets:
            absent.target = target
            for launch in importlib.import_module(f"launches.{stem}").launches():
                launch.call()
                for name, kernel in recorder.take():
                    yield read(stem, launch, name, target, kernel)


def read(stem: str, launch: Launch, name: str, target: str, kernel: Any) -> Row:
    figures = read_amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else read_nvidia(kernel.asm["cubin"])
    checked = name in launch.wide and "cubin" in kernel.asm
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Row(stem, launch.name, name, target, warps, shared=shared, should_be_wide=checked, **figures)


@functools.cache  # launches share kernels
def read_nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([BINARIES / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    instructions, labels, branches = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line):
            if instruction[1].startswith("BRA") and (to := re.search(r"\.L_\w+", instruction[2])):
                branches.append((len(instructions), to[0]))
            instructions.append(instruction[1])
    loops = [(labels[to], at) for at, to in branches if labels.get(to, at) < at]
    loads = {i: name for i, name in enumerate(instructions) if name.startswith(("LDG", "UTMALDG", "UBLKCP"))}
    wide = [i for i, name in loads.items() if re.search("128|TMA|BLK", name)]
    narrow = [i for i, name in loads.items() if re.search(r"\.[US](8|16)\b", name)]

    def loop_of(i: int) -> tuple[int, int]:
        """The innermost one, as its length and its first instruction."""
        return min(((last - first, first) for first, last in loops if first <= i <= last), default=(0, i))

    hot = Counter(loop_of(i) for i in wide)
    (length, _), most = max(hot.items(), key=lambda item: item[1], default=((0, 0), 1))
    return {
        "registers": int(registers[1]),
        "spills": sum(name.startswith(("STL", "LDL")) for name in instructions),
        "matrix": sum(bool(re.match(r"[A-Z]*(MMA)\b", name)) for name in instructions),
        "wide": len(wide),
        "narrow": sum(loop_of(i) in hot for i in narrow),
        "pace": round((length + 1) / most) if length else 0,
    }


@functools.cache
def read_amd(code: str) -> dict[str, int]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": figure("vgpr_count"),
        "spills": figure("vgpr_spill_count"),
        "matrix": code.count("v_mfma"),
        "wide": len(re.findall(r"(?:global|buffer)_load_(?:b128|dwordx4)", code)),
        "narrow": 0,
        "pace": 0,
    }


def table(rows: Sequence[Row], targets: Sequence[str]) -> str:
    """As Markdown: a section per stem, a line per kernel of a launch."""
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Written by `python bench/compile_kernels.py --write` with triton {triton.__version__}; no GPU took part.",
        "Under each target: registers of a thread, bytes of shared memory, instructions of the matrix units, global",
        "loads of 16 bytes, and in the loop that has most of these how many instructions there are for each. An H100",
        "issues 158 while its memory delivers 16 bytes to every thread: a loop that takes more waits for itself.",
    ]
    kernels: dict[tuple[str, str, str, int, int], dict[str, str]] = {}
    variants: Counter[tuple[str, str, str, int, str]] = Counter()  # of a kernel within a launch
    for row in rows:
        named = (row.stem, row.launch, row.kernel, row.warps)
        variant = variants[(*named, row.target)]
        variants[(*named, row.target)] += 1
        figures = f"{row.registers}, {row.shared}, {row.matrix}, {row.wide}"
        if row.pace:
            figures += f", {row.pace}"
        kernels.setdefault((*named, variant), {})[row.target] = figures
    for stem in dict.fromkeys(row.stem for row in rows):
        lines += ["", f"## {stem}", "", f"| launch | kernel | warps | {' | '.join(targets)} |"]
        lines += [f"|---|---|---:|{'---|' * len(targets)}"]
        for (of_stem, *named, _), figures in kernels.items():
            if of_stem == stem:
                cells = [*map(str, named), *(figures.get(target, "") for target in targets)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def renewed(written: str, tables: str) -> str:
    """What is written, with the tables of some stems anew."""
    head, *new = tables.split("\n## ")
    old = written.split("\n## ")[1:]
    of_stems = {section.partition("\n")[0]: section.strip("\n") for section in (*old, *new)}
    return "\n\n## ".join([head.strip("\n"), *(of_stems[stem] for stem in sorted(of_stems))]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stems", default=",".join(STEMS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    targets = options.targets.split(",")
    rows = list(compile_all(options.stems.split(","), targets))
    print(table(rows, targets))
    if options.write:
        results = Path(__file__).with_name("results") / "kernels.md"
        results.write_text(renewed(results.read_text(), table(rows, targets)))
    faults = [f"{row} {fault}" for row in rows for fault in row.faults]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
