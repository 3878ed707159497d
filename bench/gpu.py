"""The benchmarks of a GPU: one JSON like those of pytest-benchmark, and a short table last. bench/gpu.sh calls it.

    python bench/gpu.py [--budget SECONDS] [--json build/gpu.json] [--dry-run]
    python bench/gpu.py --table build/gpu.json

Ours are measured first, Triton's and CUDA's, in the order of the cases' importance, then what they are compared with.
A result is checked before its time counts; bandwidth and the rate of a product are measured in the same run. The cases
run in a process of their own, which is started again behind a case that broke the device, crashed or hung: an error
costs its case alone. --dry-run goes through everything on the CPU with small tensors: its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES, DENSITY, ours, paper_merge
from comparison import differing_share
from inputs import NUM_TASKS, num_params_of, state_dict, vit_b32_shapes
from torch import Tensor

from surgery_kernels import _C, __version__, combine, merge_state_dicts, surgery_adapter, trim_thresholds

CASE_SECONDS = 60.0  # of one case: what takes longer hangs
BROKEN = 3  # exit status: the device takes no more calls
PHASES = (("ours", "cuda"), ("compiled", "eager"))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASKS, SITES, IMAGES, TOKENS, DIM = 8, 13, 16, 50, 768

Call = Callable[[], Any]


@dataclass
class Case:
    """One row of the table; its contenders are made when it is their turn."""

    op: str
    dtype: str
    num_params: int
    contenders: dict[str, Callable[[], Call]]  # "ours" first: the others are compared with it
    check: Callable[[str, Any, Any], float]  # contender, its result, ours: the share that differs; raises where wrong
    least_bytes: int
    flops: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(map(str, [self.op, self.dtype, *self.more.values()]))


class Gpu:
    """The device that is measured: the GPU, or the CPU in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.failures = 0
        self.device = torch.device("cpu" if dry else "cuda")
        self.name = platform.processor() or "CPU" if dry else torch.cuda.get_device_name()

    def times(self, call: Call) -> tuple[float, float]:
        """Median and minimum in seconds."""
        if self.dry:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start,) * 2
        import triton

        # It empties the second-level cache before every call.
        median, least = triton.testing.do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.0])
        return median / 1e3, least / 1e3

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype).mul_(scale)

    def copy_rate(self) -> float:
        source = torch.ones(1 << 16 if self.dry else 1 << 29, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.times(lambda: target.copy_(source))[0]

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second of a large product, as torch computes it by default."""
        n = 64 if self.dry else 8192
        a, b = self.randn(n, n, dtype=dtype), self.randn(n, n, dtype=dtype)
        return 2 * n**3 / self.times(lambda: a @ b)[0]


def flat_experts(gpu: Gpu, num_params: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    base = gpu.randn(num_params, dtype=dtype, scale=0.02)
    return base, [gpu.randn(num_params, dtype=dtype, scale=0.001).add_(base) for _ in range(NUM_TASKS)]


def cuda_ops() -> Any | None:
    """The CUDA kernels beside Triton's; None where the library was built without."""
    return torch.ops.surgery_kernels_cuda if _C.build_info()["cuda"] else None


def with_cuda(gpu: Gpu, call: Callable[[Any], Call]) -> dict[str, Callable[[], Call]]:
    ops = cuda_ops()
    return {} if ops is None or gpu.dry else {"cuda": lambda: call(ops)}


def ties_case(gpu: Gpu, dtype: str, num_params: int) -> Case:
    base, experts = flat_experts(gpu, num_params, DTYPES[dtype])
    density = [DENSITY] * NUM_TASKS

    def check(contender: str, result: Tensor, expected: Tensor) -> float:
        if contender in ("ours", "cuda"):
            return equal_share(result, expected)
        return differing_share(result, expected, base, experts, BASELINES[contender])

    return Case(
        "ties_merge",
        dtype,
        num_params,
        {
            "ours": lambda: lambda: ours("paper")(base, experts),
            **with_cuda(gpu, lambda ops: lambda: ops.ties_merge(base, experts, density)),
            "compiled": lambda: compiled(lambda: paper_merge(base, experts)),
            "eager": lambda: lambda: paper_merge(base, experts),
        },
        check,
        (2 * (NUM_TASKS + 1) + 1) * base.nbytes,
    )


def thresholds_case(gpu: Gpu, dtype: str, num_params: int) -> Case:
    base, experts = flat_experts(gpu, num_params, DTYPES[dtype])

    def topk() -> Tensor:
        kept = int(num_params * DENSITY) + 1
        return torch.stack([(expert - base).abs().float().topk(kept, sorted=False).values.min() for expert in experts])

    return Case(
        "trim_thresholds",
        dtype,
        num_params,
        {
            "ours": lambda: lambda: trim_thresholds(base, experts, density=DENSITY),
            **with_cuda(gpu, lambda ops: lambda: ops.trim_thresholds(base, experts, [DENSITY] * NUM_TASKS)),
            "eager": lambda: topk,
        },
        lambda _, result, expected: equal_share(result, expected),
        (NUM_TASKS + 1) * base.nbytes,
    )


def model_case(gpu: Gpu, dtype: str) -> Case:
    shapes = vit_b32_shapes(1 if gpu.dry else 12)
    base, experts = flat_experts(gpu, num_params_of(shapes), DTYPES[dtype])
    pretrained, tuned = state_dict(base, shapes), [state_dict(expert, shapes) for expert in experts]

    def merge() -> list[Tensor]:
        return list(merge_state_dicts(pretrained, tuned, density=DENSITY).values())

    def eager() -> list[Tensor]:
        flats = [torch.cat([x.flatten() for x in model.values()]) for model in (pretrained, *tuned)]
        return list(state_dict(paper_merge(flats[0], flats[1:]), shapes).values())

    def check(contender: str, result: list[Tensor], expected: list[Tensor]) -> float:
        share = equal_share if contender == "ours" else close_share
        return max(map(share, result, expected))

    contenders = {"ours": lambda: merge, "eager": lambda: eager}
    least = (2 * (NUM_TASKS + 1) + 1) * base.nbytes
    return Case("merge_state_dicts ViT-B/32", dtype, base.numel(), contenders, check, least)


def combine_case(gpu: Gpu, dtype: str, num_params: int) -> Case:
    """Forward and backward with one coefficient per expert and layer."""
    blocks = 12
    base = gpu.randn(num_params, dtype=DTYPES[dtype], scale=0.02)
    task_vectors = gpu.randn(NUM_TASKS, num_params, dtype=DTYPES[dtype], scale=0.001)
    coefficients = torch.full((NUM_TASKS, blocks), 0.3, device=gpu.device).requires_grad_()
    offsets = torch.linspace(0, num_params, blocks + 1, device=gpu.device).long()
    grad = gpu.randn(num_params, dtype=DTYPES[dtype])

    def formula() -> Tensor:
        column = coefficients.repeat_interleave(offsets.diff(), dim=1, output_size=num_params)
        return (base + (column * task_vectors).sum(dim=0)).to(base.dtype)  # summed in float32, as ours

    def step(forward: Callable[[], Tensor]) -> Call:
        def call() -> list[Tensor]:
            merged = forward()
            return [merged.detach(), *torch.autograd.grad(merged, [coefficients], grad)]

        return call

    return Case(
        "combine",
        dtype,
        num_params,
        {
            "ours": lambda: step(lambda: combine(base, task_vectors, coefficients, offsets)),
            "compiled": lambda: step(compiled(formula)),
            "eager": lambda: step(formula),
        },
        lambda _, result, expected: max(map(close_share, result, expected)),
        (2 * NUM_TASKS + 3) * base.nbytes,
    )


def adapter_case(gpu: Gpu, dtype: str, rank: int) -> Case:
    """Forward and backward of every task's adapter at every site, as one training step sees them."""
    tasks, rows, dim = (2, 8, 16) if gpu.dry else (TASKS, SITES * IMAGES * TOKENS, DIM)
    features = gpu.randn(tasks, rows, dim, dtype=DTYPES[dtype]).requires_grad_()
    down = gpu.randn(tasks, rank, dim, dtype=DTYPES[dtype], scale=dim**-0.5).requires_grad_()
    up = gpu.randn(tasks, dim, rank, dtype=DTYPES[dtype], scale=rank**-0.5).requires_grad_()
    leaves, grad = [features, down, up], gpu.randn(tasks, rows, dim, dtype=DTYPES[dtype])

    def formula(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return features - torch.relu(features @ down.mT) @ up.mT

    def step(forward: Callable[..., Tensor]) -> Call:
        def call() -> list[Tensor]:
            corrected = forward(*leaves)
            return [corrected.detach(), *torch.autograd.grad(corrected, leaves, grad)]

        return call

    def compiled_step() -> Call:
        torch.compiler.reset()
        return step(torch.compile(formula, dynamic=False))

    return Case(
        "surgery_adapter",
        dtype,
        features.numel(),
        {"ours": lambda: step(surgery_adapter), "compiled": compiled_step, "eager": lambda: step(formula)},
        lambda _, result, expected: max(map(close_share, result, expected)),
        5 * features.nbytes,
        12 * features.numel() * rank,
        {"shape": list(features.shape), "rank": rank},
    )


def cases(gpu: Gpu) -> Iterator[Callable[[], Case]]:
    """In the order of their importance; each holds memory only while it is measured."""
    large = 1 << 10 if gpu.dry else 88_000_000
    for dtype in DTYPES:
        yield lambda dtype=dtype: ties_case(gpu, dtype, large)
    for dtype in DTYPES:
        yield lambda dtype=dtype: thresholds_case(gpu, dtype, large)
        yield lambda dtype=dtype: model_case(gpu, dtype)
    for rank in (16, 64):
        yield lambda rank=rank: adapter_case(gpu, "fp32", rank)
        yield lambda rank=rank: adapter_case(gpu, "bf16", rank)
    for dtype in DTYPES:
        yield lambda dtype=dtype: combine_case(gpu, dtype, large)


def compiled(call: Call) -> Call:
    torch.compiler.reset()
    return torch.compile(call, dynamic=False)


def equal_share(result: Tensor, expected: Tensor) -> float:
    if not torch.equal(result, expected):
        raise AssertionError(f"{(result != expected).float().mean():.2%} of the results differ")
    return 0.0


def close_share(result: Tensor, expected: Tensor) -> float:
    """All but one in a thousand as near as sums in another order are: decisions on rounded numbers may flip."""
    near = 1e-4 if expected.dtype == torch.float32 and result.dtype == torch.float32 else 2e-2
    scale = expected.float().abs().max().clamp(min=1e-30)
    wrong = ((result.float() - expected.float()).abs() / scale > near).float().mean().item()
    if wrong > 1e-3:
        raise AssertionError(f"{wrong:.2%} of the results differ")
    return (result != expected).float().mean().item()


def measure(
    gpu: Gpu, case: Case, contenders: Sequence[str], rates: dict[str, float], before: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """before: the rows there are already, ours among them."""
    ours = [row["stats"]["median"] for row in before if (row["name"], contender_of(row)) == (str(case), "ours")]
    expected = None
    for contender in dict.fromkeys(("ours", *contenders)):
        timed = contender in contenders
        if contender not in case.contenders:
            continue
        try:
            call = case.contenders[contender]()
            result = call()
            expected = result if expected is None else expected
            differing = case.check(contender, result, expected)
            del result
            if not timed:
                continue
            median, minimum = gpu.times(call)
        except Exception as error:  # one contender that fails must not cost the rows of all others
            gpu.failures += 1
            print(f"failed: {case} {contender}: {type(error).__name__}: {str(error).split(chr(10))[0]}", flush=True)
            continue
        row = {
            "op": case.op,
            "dtype": case.dtype,
            "num_params": case.num_params,
            "num_tasks": NUM_TASKS,
            "contender": contender,
            "device": "gpu",
            "least_bytes": case.least_bytes,
            "differing_share": differing,
            "others_cpu_share": 0.0,
            "copy_bytes_per_second": rates["copy"],
            **case.more,
        }
        least = case.least_bytes / rates["copy"]
        if case.flops:
            row |= {"flops": case.flops, "matmul_flops_per_second": rates[case.dtype]}
            least = max(least, case.flops / rates[case.dtype])
        if contender == "ours":
            ours = [median]
        if contender == "ours" or not ours:
            row["share_of_bound"] = least / median
        else:
            row["speedup"] = median / ours[0]
        yield {"name": str(case), "extra_info": row, "stats": {"median": median, "min": minimum}}


def contender_of(row: dict[str, Any]) -> str:
    return row["extra_info"]["contender"]


def run_cases(gpu: Gpu, first: int, path: Path) -> None:
    """The units from `first` on. A unit is a case in a phase; the file says which one was begun last, and its rows."""
    rates = {"copy": gpu.copy_rate(), **{name: gpu.matmul_rate(dtype) for name, dtype in DTYPES.items()}}
    rows = json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if first else []
    units = [(contenders, make) for contenders in PHASES for make in cases(gpu)]
    for unit, (contenders, make) in enumerate(units[first:], first):
        save(path, document(gpu, rows) | {"begun": unit, "units": len(units)})
        try:
            found = list(measure(gpu, make(), contenders, rates, rows))
        except Exception as error:
            gpu.failures += 1
            found = []
            print(f"failed: case {unit}: {type(error).__name__}: {str(error).split(chr(10))[0]}", flush=True)
        rows += found
        save(path, document(gpu, rows) | {"begun": unit, "units": len(units)})
        print(short_table(found), flush=True)
        if not gpu.dry:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                print(f"the device is lost: {str(error).split(chr(10))[0]}", flush=True)
                sys.exit(BROKEN)


def save(path: Path, run: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")  # one that is killed while it writes must leave the rows before
    partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def supervise(command: Sequence[str], path: Path, budget: float, case_seconds: float = CASE_SECONDS) -> bool:
    """Runs the cases in processes of their own until all were begun; whether none was lost."""
    deadline = time.monotonic() + budget
    path.unlink(missing_ok=True)
    first, fine = 0, True
    while True:
        process = subprocess.Popen([*command, "--from", str(first)])
        begun, since = -1, time.monotonic()
        while (status := process.poll()) is None:
            time.sleep(0.05)
            at, now = progress(path)[0], time.monotonic()
            if at != begun:
                begun, since = at, now
            if now > min(deadline, since + case_seconds):
                process.kill()
                print("killed: the time is spent" if now > deadline else f"killed: case {begun} hangs", flush=True)
        begun, units = progress(path)
        fine = fine and status == 0
        if status in (0, 1) or time.monotonic() > deadline or begun + 1 >= units:
            return fine
        print(f"case {begun} was lost with status {status}", flush=True)
        first = begun + 1


def progress(path: Path) -> tuple[int, int]:
    """The case that was begun last, and how many there are; none before the first."""
    if not path.exists():
        return -1, 0
    run = json.loads(path.read_text(encoding="utf-8"))
    return run["begun"], run["units"]


def commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
            ).stdout.strip()
        except FileNotFoundError:  # a machine that only measures may have none
            return ""

    return {"id": git("rev-parse", "HEAD") or "unknown", "dirty": bool(git("status", "--porcelain", "-uno"))}


def document(gpu: Gpu, rows: list[dict[str, Any]]) -> dict[str, Any]:
    import triton

    capability = "dry run" if gpu.dry else "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {
        "machine_info": {
            "cpu": gpu.name,
            "isa": capability,
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "versions": {
                "surgery_kernels": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
            },
        },
        "commit_info": commit(),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "benchmarks": rows,
    }


def short_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        info, took = row["extra_info"], row["stats"]["median"]
        rate = info["least_bytes"] / took / 1e9
        compared = (
            f"{info['speedup']:6.2f}x ours" if "speedup" in info else f"{info['share_of_bound']:6.0%} of the bound"
        )
        lines.append(f"{row['name']:44.44} {info['contender']:9} {took * 1e3:10.3f} ms {rate:7.0f} GB/s {compared}")
    return "\n".join(lines)


def show(path: Path) -> None:
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"benchmarks": []}
    rows = run["benchmarks"]
    copy = rows[0]["extra_info"]["copy_bytes_per_second"] / 1e9 if rows else math.nan
    print(f"{run.get('machine_info', {}).get('cpu', 'nothing')}, copy {copy:.0f} GB/s, {len(rows)} rows, {path}")
    print(short_table(rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds (default 300)")
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--table", type=Path, help="show what is in this file and measure nothing")
    parser.add_argument("--from", type=int, dest="first", help="run the cases from this one on, in this process")
    arguments = parser.parse_args()
    if arguments.table:
        show(arguments.table)
        return
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if arguments.first is not None:
        torch.manual_seed(0)
        gpu = Gpu(arguments.dry_run)
        run_cases(gpu, arguments.first, arguments.json)
        sys.exit(1 if gpu.failures else 0)
    fine = supervise([sys.executable, *sys.argv], arguments.json, arguments.budget)
    show(arguments.json)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
