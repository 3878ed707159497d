"""A run of the benchmarks as a table and plots.

python -m pytest bench --benchmark-json=run.json
python bench/report.py run.json              # prints the table
python bench/report.py run.json --publish    # also the README's table, bench/results/*.png and the run's JSON
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plots import draw

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKERS = "<!-- benchmarks -->", "<!-- /benchmarks -->"
MERGES = {"eager": "eager", "compiled": "torch.compile", "peft": "PEFT", "mergekit": "mergekit", "ours": "ours"}
SURGERY = {"eager": "eager", "batched": "eager, tasks batched", "compiled": "torch.compile", "ours": "ours"}
TOOLKITS = {"toolkit": "its own code", "ours": "with ours"}
SECTIONS = {  # head of the first column -> its contenders and families of ops
    "8 experts": (MERGES, ["ties_merge", "trim_thresholds", "merge_state_dicts", "combine"]),
    "surgery": (SURGERY, ["surgery_adapter", "surgery_train", "representation_loss"]),
    "inside a toolkit, 8 experts": (TOOLKITS, ["mergekit", "PEFT", "FusionBench"]),
}

DISTURBED = 0.1
TIMES_NOTE = """\
Median / minimum of the rounds; in brackets, how many times as long as ours under the same semantics (median of rounds
taken in turn). Bound: base and experts read twice (`trim_thresholds`: once) and the result written once, at the
bandwidth of a large copy measured around every round; left out where everything fits in the caches. `combine` is
forward and backward; the second time it reads the incoming gradient instead of base. Surgery is forward and backward;
the bound of an adapter is one read and write of what goes in and out or, where that takes longer, its multiplications
at the rate of a large product of torch's in the same run: more than 100 % is faster than that product. The loops that
`surgery_train` replaces ran 25 of the 1000 steps, and their times are scaled. †: other processes took more than a tenth
of the processors meanwhile."""
MEMORY_NOTE = """\
Peak extra memory is what one call adds beyond inputs and output. Bytes moved are those of the inputs and outputs of
every tensor operation; what a selection or a sort moves inside itself is not counted."""

Row = dict[str, Any]


def load(run: dict[str, Any]) -> list[Row]:
    """One row per measurement that came to its end: what was measured and its times in seconds."""
    rows = []
    for benchmark in filter(lambda row: row["extra_info"], run["benchmarks"]):
        scale = benchmark["extra_info"].get("scale", 1)  # of what was run to what the row is about
        stats = {name: scale * benchmark["stats"][name] for name in ("median", "min")}
        rows.append(benchmark["extra_info"] | stats)
    return rows


def duration(seconds: float) -> tuple[float, str]:
    return next(
        (seconds * f, unit) for limit, f, unit in [(1e-3, 1e6, "µs"), (1, 1e3, "ms"), (1e9, 1, "s")] if seconds < limit
    )


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def times(*seconds: float) -> str:
    """Several times in the unit of the first."""
    value, unit = duration(seconds[0])
    return " / ".join(number(s / seconds[0] * value) for s in seconds) + f" {unit}"


def size(num_params: int) -> str:
    for limit, unit in ((10**6, "M"), (1 << 10, "k")):
        if num_params >= limit:
            return f"{num_params / limit:.0f}{unit}"
    return str(num_params)


def memory(count: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= limit:
            return f"{number(count / limit)} {unit}"
    return f"{number(max(count, 0) / 1024)} KiB"


def label(row: Row) -> str:
    """What was measured: the op, its size or shape, the dtype."""
    if "shape" not in row:
        return f"`{row['op']}` {size(row['num_params'])} {row['dtype']}"
    rank = f", rank {row['rank']}" if "rank" in row else ""
    return f"`{row['op']}` {' x '.join(map(str, row['shape']))}{rank}"


def family(row: Row) -> str:
    """The op, or the toolkit whose method it is."""
    return row["op"].split()[0]


def is_variant(row: Row) -> bool:
    """Ours under another toolkit's semantics: what that toolkit's row is compared with."""
    return row["contender"] == "ours" and row.get("semantics", "paper") != "paper"


def groups(rows: Iterable[Row], ops: list[str]) -> dict[str, dict[str, Row]]:
    """Rows by label and contender; ours under "paper" stands in the column, as eager does."""

    def order(row: Row) -> tuple[int, bool, int, int]:
        return ops.index(family(row)), row["dtype"] != "fp32", row["num_params"], row.get("rank", 0)

    chosen = sorted((row for row in rows if family(row) in ops and not is_variant(row)), key=order)
    grouped: dict[str, dict[str, Row]] = {}
    for row in chosen:
        grouped.setdefault(label(row), {})[row["contender"]] = row
    return grouped


def markdown(head: list[str], body: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def bound(row: Row) -> float | None:
    """Seconds that no implementation can beat: of the memory, or where it is longer of the arithmetic."""
    if "share_of_bound" not in row:
        return None
    arithmetic = row["flops"] / row["matmul_flops_per_second"] if "matmul_flops_per_second" in row else 0.0
    return max(row["least_bytes"] / row["copy_bytes_per_second"], arithmetic)


def share_of_bound(row: Row, least: float) -> float:
    """Against the bandwidth taken around every round where the memory is the bound."""
    by_memory = least == row["least_bytes"] / row["copy_bytes_per_second"]
    return row["share_of_bound"] if by_memory else least / row["median"]


def time_table(rows: list[Row], head: str) -> str:
    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        shown = times(row["median"], row["min"]) + ("†" if row["others_cpu_share"] > DISTURBED else "")
        return f"{shown} ({number(row['speedup'])}x)" if "speedup" in row else f"**{shown}**"

    columns, ops = SECTIONS[head]
    body = []
    for name, by in groups(rows, ops).items():
        least = bound(by["ours"]) if "ours" in by else None
        share = "" if least is None else f"{share_of_bound(by['ours'], least):.0%}"
        body.append([name, *(cell(by.get(column)) for column in columns), "" if least is None else times(least), share])
    return markdown([head, *columns.values(), "bound", "of the bound"], body)


def memory_table(rows: list[Row]) -> str:
    columns, ops = SECTIONS["8 experts"]
    body = []
    for of_group, by in groups(rows, ops).items():
        for name, field, shown in quantities(next(iter(by.values()))["num_params"]):
            if any(row.get(field) is not None for row in by.values()):
                cells = [by.get(column, {}).get(field) for column in columns]
                body.append([f"{of_group}: {name}", *("" if value is None else shown(value) for value in cells)])
    return markdown(["", *columns.values()], body)


def quantities(num_params: int) -> list[tuple[str, str, Callable[[float], str]]]:
    return [
        ("peak extra memory", "peak_extra_bytes", memory),
        ("bytes moved per parameter", "bytes_moved", lambda value: number(value / num_params)),
    ]


def report(run: dict[str, Any]) -> str:
    rows, machine, commit = load(run), run["machine_info"], run["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    rates = [row["copy_bytes_per_second"] / 1e9 for row in rows]
    changes = " with changes" if commit["dirty"] else ""
    return "\n\n".join(
        [
            TIMES_NOTE,
            *(time_table(rows, head) for head in SECTIONS),
            MEMORY_NOTE,
            memory_table(rows),
            f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, copy {min(rates):.0f} to "
            f"{max(rates):.0f} GB/s; {versions}; commit {commit['id'][:10]}{changes}, {run['datetime'][:10]}.",
        ]
    )


def write_between_markers(path: Path, text: str) -> None:
    """Leaves a document without the markers alone."""
    document = path.read_text(encoding="utf-8")
    begin, end = MARKERS
    if begin not in document or end not in document:
        return
    before, after = document.split(begin, 1)[0], document.split(end, 1)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def keep(run: dict[str, Any]) -> None:
    machine = run["machine_info"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads {machine['isa']}".lower())
    for benchmark in run["benchmarks"]:
        benchmark["stats"].pop("data", None)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{run['datetime'][:10]}-{slug}.json"
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="JSON of pytest-benchmark; a run may be taken in parts")
    parser.add_argument("--publish", action="store_true", help="write the README's table, the plots and the JSON")
    arguments = parser.parse_args()
    run, *more = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.run)
    for other in more:
        if other["machine_info"] != run["machine_info"]:
            raise SystemExit("run must be parts of one run, got different machines, versions or builds")
        run["benchmarks"] += other["benchmarks"]
    text = report(run)
    print(text)
    if arguments.publish:
        keep(run)
        draw(load(run), RESULTS)
        write_between_markers(README, text)


if __name__ == "__main__":
    main()
