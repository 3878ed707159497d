"""A run of the benchmarks as tables and plots.

python -m pytest bench --benchmark-json=run.json
python bench/report.py run.json              # prints the table
python bench/report.py run.json --publish    # also the tables and plots of docs/, and the run's JSON
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plots import draw

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "gpu.md"]
README = ROOT / "README.md"
DISTURBED = 0.1


RATIOS_NOTE = """\
Median / minimum of the rounds; in brackets, how many times as long as ours under the same semantics (median of rounds
taken in turn). †: other processes took more than a tenth of the processors meanwhile."""
MEMORY_NOTE = """\
Peak extra memory is what one call adds beyond inputs and output. Bytes moved are those of the inputs and outputs of
every tensor operation; what a selection or a sort moves inside itself is not counted."""


@dataclass(frozen=True, eq=False)
class Section:
    """A table of docs/, between markers of its own: a run replaces those that it has rows for."""

    name: str
    head: str  # of the first column
    columns: dict[str, str]  # contender -> head
    families: list[str]  # of ops, in order
    note: str
    memory_note: str = MEMORY_NOTE
    device: str = "cpu"

    @property
    def markers(self) -> tuple[str, str]:
        return f"<!-- benchmarks: {self.name} -->", f"<!-- /benchmarks: {self.name} -->"


MERGING = Section(
    "merging",
    "8 experts",
    {
        "eager": "eager",
        "compiled": "torch.compile",
        "peft": "PEFT",
        "mergekit": "mergekit",
        "fusion_bench": "FusionBench",
        "ours": "ours",
    },
    ["ties_merge", "trim_thresholds", "mix", "weighted_merge", "masks", "gram", "steps", "merge_state_dicts"],
    f"""\
{RATIOS_NOTE} Bound: base and experts read twice (`trim_thresholds`, `mix`, `weighted_merge`, `gram`, `steps`,
`masks random`, DARE and MagMax, and TIES of 1 GiB in fp32: once) and the result written once, at the bandwidth of a
large copy measured around every round; left out where everything fits in the caches.""",
)
LEARNING = Section(
    "learning",
    "forward and backward",
    {"eager": "eager", "batched": "eager, batched", "compiled": "torch.compile", "ours": "ours"},
    ["combine", "surgery_adapter", "surgery_train", "representation_loss", "gram_cross"],
    """\
Bound: what goes in read and what comes out written once each way, at the bandwidth of a copy, or where that takes
longer the multiplications at the rate of a large product of torch's in the same run: more than 100 % is faster than
that product. The loops that `surgery_train` replaces ran 25 of the 1000 steps; their times are scaled.""",
)
METHODS = Section(
    "methods",
    "one tensor",
    {"mergekit": "mergekit", "ours": "ours"},
    ["method"],
    f"""\
{RATIOS_NOTE}
8 experts of 4M entries, or one or two of 16M where the method takes no more. Bound: the inputs read as often as the
method must (where something is decided before the merge: twice) and the result written once, at the bandwidth of a
large copy measured around every round.""",
)
PAPERS = Section(
    "papers",
    "8 experts",
    {"eager": "eager", "compiled": "torch.compile", "fusion_bench": "FusionBench", "ours": "ours"},
    ["paper"],
    """\
Matrices of ViT-B/32. Median / minimum of the rounds; in brackets, how many times as long as ours
(median of rounds taken in turn). Bound: base and experts read as often as the method must, what it makes written once,
at the bandwidth of a large copy; decompositions and products of matrices (TSV-M, Iso-C, WUDI) take longer than that by
far. WUDI's steps are scaled from 5 to 300.""",
)
TOOLKITS = Section(
    "toolkits",
    "8 experts",
    {"toolkit": "the toolkit's own code", "ours": "with ours"},
    ["mergekit", "PEFT", "FusionBench"],
    "Inside a toolkit, whose file handling stays its own, and mergekit's random masks (DARE, DELLA):",
)
GPU = Section(
    "gpu",
    "8 experts",
    {"eager": "eager", "compiled": "torch.compile", "cuda": "ours, CUDA", "ours": "ours, Triton"},
    ["ties_merge", "trim_thresholds", "merge_state_dicts", "combine", "surgery_adapter"],
    """\
Median / minimum; in brackets, how many times as long as ours on Triton. `combine` and `surgery_adapter` run forward and
backward. Bound: what must be read and written, at the bandwidth of a large copy in the same run, or where that takes
longer the multiplications at the rate of a large product in that dtype.""",
    device="gpu",
)
CHECKPOINTS = Section(
    "checkpoints",
    "files to files",
    {"mergekit": "mergekit-yaml", "ours": "surgery-kernels merge"},
    ["checkpoint"],
    """\
4 experts and a base (`slerp`: one), as whole processes, from the start of Python to the last byte; the inputs are in
the page cache, but for "from disk". Random masks are drawn by counter on our side and by torch on mergekit's. Median /
minimum of the rounds; in brackets, how many times as long as ours, run just before. Bound: all inputs read once, or
where that takes longer the result written and synced, at the rates of plain reads and writes around every
round. †: other processes took more than a tenth of the processors meanwhile.""",
    "Peak memory is the most that the process had resident, pages of its mapped files included.",
)
SECTIONS = [MERGING, METHODS, PAPERS, LEARNING, TOOLKITS, CHECKPOINTS, GPU]

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
    dtype = f" {row['dtype']}" if row.get("device") == "gpu" else ""
    return f"`{row['op']}` {' x '.join(map(str, row['shape']))}{rank}{dtype}"


def family(row: Row) -> str:
    """The op, or the toolkit whose method it is."""
    return row["op"].split()[0]


def belongs(row: Row, section: Section) -> bool:
    return family(row) in section.families and row.get("device", "cpu") == section.device


def is_variant(row: Row) -> bool:
    """Ours under another toolkit's semantics: what that toolkit's row is compared with."""
    return row["contender"] == "ours" and row.get("semantics", "paper") != "paper"


def groups(section: Section, rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by label and contender; ours under "paper" stands in the column, as eager does."""

    def order(row: Row) -> tuple[int, bool, int, int]:
        return section.families.index(family(row)), row["dtype"] != "fp32", row["num_params"], row.get("rank", 0)

    chosen = sorted((row for row in rows if belongs(row, section) and not is_variant(row)), key=order)
    grouped: dict[str, dict[str, Row]] = {}
    for row in chosen:
        grouped.setdefault(label(row), {})[row["contender"]] = row
    return grouped


def markdown(head: list[str], body: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def bound(row: Row) -> float | None:
    """Seconds that no implementation can beat: of the files, of the memory, or where it is longer of the arithmetic."""
    if "share_of_bound" not in row:
        return None
    if "bound_seconds" in row:
        return row["bound_seconds"]
    arithmetic = row["flops"] / row["matmul_flops_per_second"] if "matmul_flops_per_second" in row else 0.0
    return max(row["least_bytes"] / row["copy_bytes_per_second"], arithmetic)


def share_of_bound(row: Row, least: float) -> float:
    """Against the bandwidth taken around every round where the memory is the bound."""
    by_memory = "least_bytes" in row and least == row["least_bytes"] / row["copy_bytes_per_second"]
    return row["share_of_bound"] if by_memory else least / row["median"]


def time_table(section: Section, rows: list[Row]) -> str:
    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        shown = times(row["median"], row["min"]) + ("†" if row["others_cpu_share"] > DISTURBED else "")
        return f"{shown} ({number(row['speedup'])}x)" if "speedup" in row else f"**{shown}**"

    body = []
    for name, by in groups(section, rows).items():
        least = bound(by["ours"]) if "ours" in by else None
        cells = ["", ""] if least is None else [times(least), f"{share_of_bound(by['ours'], least):.0%}"]
        body.append([name, *(cell(by.get(column)) for column in section.columns), *cells])
    head = [section.head, *section.columns.values(), "bound", "of the bound"]
    bounded = any(line[-1] for line in body)
    return markdown(head, body) if bounded else markdown(head[:-2], [line[:-2] for line in body])


def memory_table(section: Section, rows: list[Row]) -> str:
    body = []
    for of_group, by in groups(section, rows).items():
        for name, field, shown in quantities(next(iter(by.values()))["num_params"]):
            if any(row.get(field) is not None for row in by.values()):
                cells = [by.get(column, {}).get(field) for column in section.columns]
                body.append([f"{of_group}: {name}", *("" if value is None else shown(value) for value in cells)])
    return markdown(["", *section.columns.values()], body) if body else ""


def quantities(num_params: int) -> list[tuple[str, str, Callable[[float], str]]]:
    return [
        ("peak extra memory", "peak_extra_bytes", memory),
        ("bytes moved per parameter", "bytes_moved", lambda value: number(value / num_params)),
        ("peak memory", "peak_bytes", memory),
        ("start of the process", "start_seconds", times),
    ]


def rates(rows: list[Row]) -> str:
    """Of what the bounds are made."""
    kinds = {"copy": "copy", "file_read": "files read at", "file_write": "written at"}
    shown = []
    for kind, words in kinds.items():
        if found := [row[f"{kind}_bytes_per_second"] / 1e9 for row in rows if f"{kind}_bytes_per_second" in row]:
            shown.append(f"{words} {number(min(found))} to {number(max(found))} GB/s")
    return ", ".join(shown)


def report(section: Section, run: dict[str, Any]) -> str:
    """The section, or nothing if the run has no rows of it."""
    rows = [row for row in load(run) if belongs(row, section)]
    if not rows:
        return ""
    machine, commit = run["machine_info"], run["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    changes = " with changes" if commit["dirty"] else ""
    memory = memory_table(section, rows)
    return "\n\n".join(
        [
            section.note,
            time_table(section, rows),
            *([section.memory_note, memory] if memory else []),
            f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, {rates(rows)}; {versions}; "
            f"commit {commit['id'][:10]}{changes}, {run['datetime'][:10]}.",
        ]
    )


def write_between_markers(path: Path, text: str, markers: tuple[str, str]) -> None:
    """Leaves a document without the markers alone."""
    document = path.read_text(encoding="utf-8")
    begin, end = markers
    if begin not in document or end not in document:
        return
    before, after = document.split(begin, 1)[0], document.split(end, 1)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def renew_rows(path: Path, text: str) -> None:
    """Rows of a table that are shown a second time, told by their first cell."""
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| `")}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(
        "".join(f"{rows[key]}\n" if (key := line.split(" | ")[0]) in rows else line for line in lines), encoding="utf-8"
    )


def keep(run: dict[str, Any]) -> None:
    machine = run["machine_info"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads {machine['isa']}".lower())
    for benchmark in run["benchmarks"]:
        benchmark["stats"].pop("data", None)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{run['datetime'][:10]}-{run['commit_info']['id'][:7]}-{slug}.json"
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="JSON of pytest-benchmark; a run may be taken in parts")
    parser.add_argument("--publish", action="store_true", help="write the tables and plots of docs/, and the JSON")
    arguments = parser.parse_args()
    run, *more = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.run)
    for other in more:
        if other["machine_info"] != run["machine_info"]:
            raise SystemExit("run must be parts of one run, got different machines, versions or builds")
        run["benchmarks"] += other["benchmarks"]
    texts = {section: text for section in SECTIONS if (text := report(section, run))}
    print("\n\n".join(texts.values()))
    if arguments.publish:
        keep(run)
        if MERGING in texts:
            draw(load(run), ROOT / "docs" / "images")
        for section, text in texts.items():
            for page in PAGES:
                write_between_markers(page, text, section.markers)
        renew_rows(README, "\n".join(texts.values()))


if __name__ == "__main__":
    main()
