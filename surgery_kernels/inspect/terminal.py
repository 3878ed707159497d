"""An inspection as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .findings import findings
from .inspection import Inspection
from .numbers import SHARES, Numbers, total

WORDS = (
    "change: length of all task vectors. conflict: of changed entries, those that one expert raises and another "
    "lowers. lost: share of the change that goes against the rest of it. kept: entries that TIES keeps of any expert "
    "at density {density:g}; shared: of more than one; clashing: in both directions."
)
LAYERS_SHOWN = 40  # rows; of more layers neighbours are added up


def show(of: Inspection, width: int | None = None) -> str:
    """The tables as text, without colours."""
    console = Console(width=width or 100, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(Group(*_parts(of)))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _parts(of: Inspection) -> Iterable[RenderableType]:
    yield Text(f"base      {of.base}")
    for t, name in enumerate(of.experts):
        yield Text(f"expert {t + 1}  {name}")
    yield Text(f"{len(of.tensors)} tensors, {of.whole.numel / 1e6:.1f}M parameters\n")
    yield _experts(of)
    if len(of.experts) > 1:
        yield _pairs(of)
    yield _places("kind", list(of.by_kind.items()))
    if of.by_layer:
        yield _places("layer", in_few(of.by_layer, LAYERS_SHOWN))
    yield Text(f"\n{WORDS.format(density=of.density)}\n")
    for found in findings(of):
        yield Text(f"- {found.sentence}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _experts(of: Inspection) -> Table:
    table = _table("", "expert", "change", "of the base", "entries changed", "NaN, inf", "saturated")
    whole = of.whole
    for t, norm in enumerate(whole.norms):
        counts = (whole.census.nonfinite[t + 1].item(), whole.census.saturated[t + 1].item())
        shares = f"{whole.relative[t]:.3%}", f"{whole.changed[t]:.1%}"
        table.add_row(str(t + 1), f"{norm:.4g}", *shares, *(str(count) for count in counts))
    return table


def _pairs(of: Inspection) -> Table:
    n = len(of.experts)
    table = _table("", "cosine above", *(str(t + 1) for t in range(n)))
    cosines, against = of.whole.cosines, of.whole.against
    for i in range(n):
        cells = ["" if i == j else f"{cosines[i][j]:.3f}" if j > i else f"{against[i][j]:.1%}" for j in range(n)]
        table.add_row(str(i + 1), *cells)
    table.caption = "below the diagonal: of entries that both change, those in two directions"
    table.caption_justify = "left"
    return table


def _places(what: str, rows: list[tuple[str, Numbers]]) -> Table:
    table = _table("", what, "parameters", "change", "of the base", *SHARES)
    for name, numbers in rows:
        length = numbers.products.trace().clamp_min(0).sqrt().item()
        base = numbers.census.base_square.sqrt().item()
        relative = f"{length / base:.3%}" if base else "-"
        shares = (f"{value:.1%}" for value in numbers.shares.values())
        table.add_row(name, f"{numbers.numel / 1e6:.2f}M", f"{length:.4g}", relative, *shares)
    return table


def in_few(by_layer: dict[int, Numbers], most: int) -> list[tuple[str, Numbers]]:
    """At most so many rows, of as many neighbours each."""
    layers = list(by_layer)
    step = -(-len(layers) // most)
    rows = []
    for i in range(0, len(layers), step):
        together = layers[i : i + step]
        name = f"{together[0]}-{together[-1]}" if len(together) > 1 else str(together[0])
        rows.append((name, total(by_layer[layer] for layer in together)))
    return rows
