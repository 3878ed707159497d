"""What the papers report on CLIP ViT-B/32 and eight tasks, and where an experiment puts methods in another order.

Sources: the table in WUDI's README (average, Fisher, RegMean, task arithmetic, TIES, Consensus, PCB, AdaMerging, WUDI);
FusionBench's documentation (MagMax); SVC's table (DARE, Iso-C, Iso-CTS, TSV-M); AdaRank's (CART); a re-run of aTLAS;
Concrete's abstract; the papers of EMR, FeatCal and Representation Surgery.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

PUBLISHED = {
    "average": 65.8,
    "dare_linear": 65.8,
    "fisher": 68.3,
    "task_arithmetic": 69.1,
    "magmax": 70.7,
    "regmean": 71.8,
    "ties": 72.4,
    "consensus_ta": 73.6,
    "pcb": 76.3,
    "concrete_task_arithmetic": 77.4,
    "atlas": 79.1,
    "adamerging": 80.1,
    "surgery": 80.9,
    "iso_cts": 81.4,
    "iso_c": 83.1,
    "tsv_m": 84.0,
    "cart": 84.7,
    "wudi": 85.2,
    "calibrate": 85.5,
    "emr": 88.7,
}
APART = 2.0  # points by which papers differ through checkpoints and tuning: nearer ones have no order


def disordered(averages: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs of methods of which the papers have the second above the first, and `averages` below it."""
    known = [name for name in averages if name in PUBLISHED]
    return [
        (low, high)
        for low in known
        for high in known
        if PUBLISHED[high] - PUBLISHED[low] > APART and averages[high] < averages[low]
    ]


def num_ordered(averages: Mapping[str, float]) -> int:
    """Pairs that have an order."""
    values = [PUBLISHED[name] for name in averages if name in PUBLISHED]
    return sum(abs(a - b) > APART for i, a in enumerate(values) for b in values[:i])


def order_text(averages: Mapping[str, float], reasons: Mapping[str, str]) -> str:
    """How much of the published order is kept; each method that is out of it, with the reason where one is known."""
    pairs, count = disordered(averages), num_ordered(averages)
    lines = [
        f"The published order holds in {count - len(pairs)} of {count} pairs that are {APART:g} points apart there."
    ]
    for name, out_of_order in explained(pairs).items():
        below = [low for low, high in out_of_order if high == name]
        above = [high for low, high in out_of_order if low == name]
        places = [f"below {', '.join(below)}"] if below else []
        places += [f"above {', '.join(above)}"] if above else []
        lines.append(f"  {name} is {' and '.join(places)}")
        if name in reasons:
            lines.append(f"    {reasons[name]}")
    return "\n".join(part for line in lines for part in wrapped(line))


def wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, 110, subsequent_indent=indent, break_on_hyphens=False)


def explained(pairs: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """All pairs by as few methods as may be: those in most of them first, each with what those before leave."""
    found: dict[str, list[tuple[str, str]]] = {}
    left = list(pairs)
    while left:
        counts = {name: sum(name in pair for pair in left) for pair in left for name in pair}
        worst = max(counts, key=lambda name: counts[name])
        found[worst] = [pair for pair in left if worst in pair]
        left = [pair for pair in left if worst not in pair]
    return found
