"""The plots of one run: time by size, bytes moved, peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # needs no display
import matplotlib.pyplot as plt

Row = dict[str, Any]

# Okabe and Ito's colours, told apart by any eye; markers tell them apart in print
STYLES = {
    "eager": ("eager", "#0072B2", "o"),
    "compiled": ("torch.compile", "#56B4E9", "s"),
    "peft": ("PEFT", "#E69F00", "^"),
    "mergekit": ("mergekit", "#CC79A7", "D"),
    "ours": ("ours", "#D55E00", "*"),
}
BOUND = "#333333"
DTYPES = ("fp32", "bf16")
TIMES = ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "0.1 s", "1 s", "10 s", "100 s"]
SETTINGS = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "savefig.dpi": 150,
    "figure.facecolor": "white",
}


def draw(rows: list[Row], folder: Path) -> None:
    merges = [row for row in rows if row["op"] == "ties_merge"]
    with plt.rc_context(SETTINGS):
        time_by_size(merges, folder / "time_by_size.png")
        bars(merges, "bytes_moved", "Bytes moved per parameter, 8 experts", folder / "bytes_moved.png")
        bars(
            merges, "peak_extra_bytes", "Peak extra memory, bytes per parameter, 8 experts", folder / "peak_memory.png"
        )


def rows_of(rows: list[Row], dtype: str, contender: str) -> list[Row]:
    chosen = [row for row in rows if row["dtype"] == dtype and row["contender"] == contender]
    chosen = [row for row in chosen if contender != "ours" or row["semantics"] == "paper"]
    return sorted(chosen, key=lambda row: row["num_params"])


def time_by_size(rows: list[Row], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for panel, dtype in zip(panels, DTYPES, strict=True):
        for name, (label, colour, marker) in STYLES.items():
            points = rows_of(rows, dtype, name)
            ours = name == "ours"
            panel.plot(
                [row["num_params"] for row in points],
                [row["median"] for row in points],
                color=colour,
                marker=marker,
                markersize=11 if ours else 6,
                linewidth=2.5 if ours else 1.5,
                label=label,
                zorder=3 if ours else 2,
            )
        points = rows_of(rows, dtype, "ours")
        panel.plot(
            [row["num_params"] for row in points],
            [row["least_bytes"] / row["copy_bytes_per_second"] for row in points],
            color=BOUND,
            linestyle="--",
            label="bound: two reads, one write",
        )
        panel.set(title=f"ties_merge, 8 experts, {dtype}", xscale="log", yscale="log", xlabel="parameters")
        panel.set_xticks([1, 1e3, 1e4, 1e5, 1e6, 1e7], ["1", "1k", "10k", "100k", "1M", "10M"])
        panel.set_yticks([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100], TIMES)
        panel.minorticks_off()
        panel.set_ylim(1e-6, 1.5 * max(row["median"] for row in rows))
    panels[0].set_ylabel("median time")
    panels[0].legend(frameon=False, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def bars(rows: list[Row], field: str, title: str, path: Path) -> None:
    """One bar per contender at the largest size measured, the least possible as a line where there is one."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.0), sharey=True, sharex=True, layout="constrained")
    figure.suptitle(title)
    for panel, dtype in zip(panels, DTYPES, strict=True):
        for name, (label, colour, _) in STYLES.items():
            measured = [row for row in rows_of(rows, dtype, name) if row.get(field) is not None]
            if not measured:
                continue
            value = max(measured[-1][field], 0) / measured[-1]["num_params"]
            panel.barh(label, value, color=colour, height=0.7)
            shown = f"{value:.0f}" if value >= 100 else f"{value:.2g}"
            panel.annotate(shown, (value, label), (4, 0), textcoords="offset points", va="center")
            if name == "ours" and field == "bytes_moved":
                least = measured[-1]["least_bytes"] / measured[-1]["num_params"]
                panel.axvline(least, color=BOUND, linestyle="--", linewidth=1.2, label=f"bound {least:.0f}")
                panel.legend(frameon=False, loc="lower right")
        panel.set_title(dtype, loc="left")
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.12)
    panels[0].invert_yaxis()
    figure.savefig(path)
    plt.close(figure)
