"""What Python and C++ take to bring a merge to a GPU or to the CPU's kernels, in microseconds; no GPU takes part.

    python bench/host_time.py [--rounds 31] [--write before]

Of CUDA tensors: the tensors of ViT-B/32 and 8 experts lie on the CPU and pass for CUDA tensors, and launches are
compiled for sm_90 once and then looked up but not made; nor are large tensors filled. What is left out is the driver:
the launches themselves (2 to 5 us each), the allocator of the device, one upload of a table, and the wait for the flag
of NaN. Of the CPU: calls on so few elements that nothing else is left. Processor time of this thread, the least of
--rounds. --write puts the column into bench/results/host_time.md.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
from compile_kernels import Absent
from inputs import NUM_TASKS, vit_b32_shapes
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import surgery_kernels as sk
from surgery_kernels.triton import MODULES, _implementation

RESULTS = Path(__file__).with_name("results") / "host_time.md"
METHODS: dict[str, dict[str, Any]] = {
    "ties": {},
    "ties, mergekit, rescale": {"semantics": "mergekit", "rescale": True, "weights": [0.3] * NUM_TASKS},
    "task_arithmetic": {"lam": 0.3},
    "average": {},
}


class Launches:
    """Makes launches end before the driver; counts them and knows when the first was made."""

    def __init__(self) -> None:
        self.count, self.first = 0, 0.0
        run = JITFunction.run

        def look_up(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            self.first = self.first or time.thread_time()
            self.count += 1
            return run(function, *args, grid=grid, warmup=True, **options)

        JITFunction.run = look_up
        driver.set_active(Absent())
        driver.active.target = "sm_90"

    def reset(self) -> None:
        self.count, self.first = 0, 0.0


@contextmanager
def tensors_pass_for_cuda() -> Iterator[None]:
    with torch.library._scoped_library("surgery_kernels", "IMPL") as library:
        with warnings.catch_warnings():  # of the override
            warnings.simplefilter("ignore", UserWarning)
            for op in MODULES:
                library.impl(op, _implementation(op), "CPU", allow_override=True)
        torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[method-assign, assignment]
        fills = {name: getattr(torch, name) for name in ("zeros", "full")}
        for name, fill in fills.items():
            setattr(torch, name, unless_large(fill))
        yield
        for name, fill in fills.items():
            setattr(torch, name, fill)
        del torch.Tensor.is_cuda


def unless_large(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What a device does on its own."""

    def filled(*shape: Any, **options: Any) -> torch.Tensor:
        sizes = shape[0] if isinstance(shape[0], (tuple, list)) else [x for x in shape if isinstance(x, int)]
        large = math.prod(sizes) > 256
        return torch.empty(sizes, **options) if large else fill(*shape, **options)

    return filled


def least(call: Callable[[], Any], rounds: int) -> float:
    def once() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    once()
    return 1e6 * min(once() for _ in range(rounds))


def of_gpu(rounds: int) -> Iterator[tuple[str, str]]:
    launches = Launches()
    base, *experts = (
        {name: torch.empty(shape) for name, shape in vit_b32_shapes().items()} for _ in range(NUM_TASKS + 1)
    )
    with tensors_pass_for_cuda():
        for name, options in METHODS.items():
            waits = []

            def call(name: str = name, options: dict[str, Any] = options, waits: list[float] = waits) -> None:
                launches.reset()
                start = time.thread_time()
                sk.merge_state_dicts(base, experts, method=name.partition(",")[0], progress=False, **options)
                waits.append(1e6 * (launches.first - start))

            took = least(call, rounds)
            first = min(waits[1:])
            yield (
                f"merge_state_dicts, {len(base)} CUDA tensors, {name}",
                f"{took:,.0f} ({took / len(base):.1f} a tensor; {first:,.0f} until the first of {launches.count} "
                f"launches)",
            )


def of_cpu(rounds: int) -> Iterator[tuple[str, str]]:
    rounds *= 20
    base, *experts = (torch.zeros(1) for _ in range(NUM_TASKS + 1))
    out = torch.empty(1)
    yield "ties_merge, 1 element", f"{least(lambda: sk.ties_merge(base, experts), rounds):.1f}"
    yield "mix, 1 element", f"{least(lambda: sk.mix(base, experts, [0.3] * NUM_TASKS), rounds):.1f}"
    yield "mix, 1 element, out", f"{least(lambda: sk.mix(base, experts, [0.3] * NUM_TASKS, out=out), rounds):.1f}"
    models = [{name: torch.zeros(8) for name in vit_b32_shapes()} for _ in range(NUM_TASKS + 1)]
    for method, options in {"ties": {}, "ties by tensor": {"scope": "tensor"}, "task_arithmetic": {}}.items():
        name = method.partition(" ")[0]
        took = least(
            lambda: sk.merge_state_dicts(models[0], models[1:], method=name, progress=False, **options),  # noqa: B023
            rounds // 20,
        )
        yield f"merge_state_dicts, 152 tensors of 8, {method}", f"{took:,.0f} ({took / 152:.1f} a tensor)"


def write(column: str, rows: list[tuple[str, str]]) -> None:
    """One more column, or this one again, beside those that are there."""
    cells: dict[str, dict[str, str]] = {}
    if RESULTS.exists():
        lines = [line.strip("| \n").split(" | ") for line in RESULTS.read_text().splitlines() if line.startswith("|")]
        for name, *values in lines[2:]:
            cells[name] = dict(zip(lines[0][1:], values, strict=True))
    for name, value in rows:
        cells.setdefault(name, {})[column] = value
    columns = list(dict.fromkeys(key for row in cells.values() for key in row))
    text = re.sub(r"\n    python[^\n]*\n", "", str(__doc__)).split("--write")[0].replace("--rounds", "many").strip()
    RESULTS.write_text(
        "\n".join(
            [
                "# Time of the host",
                "",
                f"Written by `python bench/host_time.py --write` with torch {torch.__version__}.",
                "",
                text,
                "",
                f"| call | {' | '.join(columns)} |",
                f"|---|{'---|' * len(columns)}",
                *(f"| {name} | {' | '.join(row.get(key, '') for key in columns)} |" for name, row in cells.items()),
            ]
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--write", metavar="COLUMN")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for found in (of_cpu, of_gpu):
        for name, value in found(options.rounds):
            print(f"{name:60} {value}", flush=True)
            rows.append((name, value))
    if options.write:
        write(options.write, rows)


if __name__ == "__main__":
    main()
