"""An inspection as one HTML file with pictures: it needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from . import svg
from .findings import conflicting_layers, findings
from .inspection import Inspection, short
from .numbers import SHARES, Numbers, share
from .result import ResultNumbers
from .terminal import LAYERS_SHOWN, in_few

BINS = 20
TENSORS_SHOWN = 25


def write_page(of: Inspection, path: Path) -> None:
    """
    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(page(of), encoding="utf-8")


def page(of: Inspection) -> str:
    names = ", ".join(short(name) for name in of.experts)
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"{names} over {short(of.base)}"), content="\n".join(sections(of)))


def sections(of: Inspection) -> Iterable[str]:
    labels = of.labels
    yield f'<ul class="findings">{"".join(f"<li>{escape(found.sentence)}</li>" for found in findings(of))}</ul>'
    size = f"{len(of.tensors)} tensors, {of.whole.numel / 1e6:.1f} million parameters"
    yield f'<p class="note">{size}. Base: {escape(of.base)}</p>'
    yield "<h2>Experts</h2>" + _experts(of)
    if of.result:
        yield "<h2>Result</h2>" + _result(of, of.result)
    if len(of.experts) > 1:
        yield _figure(
            "Directions",
            svg.heat_map([str(t + 1) for t in range(len(labels))], of.whole.cosines),
            "Cosine of every pair of task vectors: 1 alike, 0 nothing in common, -1 opposite.",
        )
    if len(of.by_layer) > 1:
        yield from _by_depth(of, labels)
    yield _figure(
        "How much tensors change",
        svg.lines(
            "share of tensors", "change over the base's length, %", *_histogram(of, labels), lambda x: f"{10**x:.2g}"
        ),
        "Of every expert, the share of its tensors, in %, whose change is about so long.",
    ) + svg.legend(labels)
    yield "<h2>Kinds</h2>" + _places("kind", list(of.by_kind.items()))
    if of.by_layer:
        yield "<h2>Layers</h2>" + _places("layer", in_few(of.by_layer, LAYERS_SHOWN))
    yield "<h2>Tensors that lose most</h2>" + _tensors(of)
    yield f"<dl>{''.join(f'<dt>{name}</dt><dd>{meaning}</dd>' for name, meaning in SHARES.items())}</dl>"


def _by_depth(of: Inspection, labels: Sequence[str]) -> Iterable[str]:
    layers = list(of.by_layer)
    relative = [numbers.relative for numbers in of.by_layer.values()]
    series = [(label, [100 * row[t] for row in relative]) for t, label in enumerate(labels)]
    yield _figure(
        "Change by depth",
        svg.lines("change by layer", "layer", layers, series),
        "Length of every task vector over that of the base, layer by layer, in %.",
    ) + svg.legend(labels)
    if len(of.experts) > 1:
        lost = [100 * numbers.lost for numbers in of.by_layer.values()]
        yield _figure(
            "Conflict by depth",
            svg.bars("conflict by layer", "layer", layers, lost, conflicting_layers(of)),
            "Share of the change that goes against the rest of it, in %; layers that stand out in the other colour.",
        )


def _histogram(of: Inspection, labels: Sequence[str]) -> tuple[list[float], list[tuple[str, list[float]]]]:
    """Bins of log10 of the change in %, and of every expert the share of its tensors in each."""
    rows = [tensor.numbers.relative for tensor in of.tensors]
    logs = [[math.log10(100 * value) if 0 < value < math.inf else None for value in row] for row in rows]
    known = [value for row in logs for value in row if value is not None] or [0.0]
    low, width = min(known), (max(known) - min(known) or 1.0) / BINS
    series = []
    for t, label in enumerate(labels):
        counts = [0.0] * BINS
        for row in logs:
            if (value := row[t]) is not None:
                counts[min(BINS - 1, int((value - low) / width))] += 100 / len(rows)
        series.append((label, counts))
    return [low + width * (i + 0.5) for i in range(BINS)], series


def _power_of_10(x: float) -> str:
    return f"{10**x:.2g}"


def _experts(of: Inspection) -> str:
    whole = of.whole
    rows = [
        [
            f"{t + 1} {name}",
            f"{whole.norms[t]:.4g}",
            f"{whole.relative[t]:.3%}",
            f"{whole.changed[t]:.1%}",
            str(whole.census.nonfinite[t + 1].item()),
            str(whole.census.saturated[t + 1].item()),
        ]
        for t, name in enumerate(of.experts)
    ]
    return table(["expert", "change", "of the base", "entries changed", "NaN, infinite", "saturated"], rows)


def _result(of: Inspection, result: ResultNumbers) -> str:
    kept = zip(of.whole.census.kept.tolist(), of.whole.census.changed.tolist(), strict=True)
    rows = [
        [label, f"{distance:.4g}", f"{cosine:.3f}", f"{1 - share(*counts):.1%}"]
        for label, distance, cosine, counts in zip(of.labels, result.distances, result.cosines, kept, strict=True)
    ]
    facts = [
        f"change of the result: {result.length:.4g}",
        f"lost to the dtype of the files: {result.rounded:.3%} of it",
        f"NaN or infinite: {result.census.nonfinite[1].item()}",
        f"at the limit of their dtype: {result.census.saturated[1].item()}",
    ]
    trimmed = f"below the limit of TIES at density {of.density:g}"
    return table(["expert", "distance to the result", "cosine", trimmed], rows) + f"<p>{'; '.join(facts)}.</p>"


def _places(what: str, places: Sequence[tuple[str, Numbers]]) -> str:
    return table([what, "parameters", *SHARES], [[name, f"{n.numel / 1e6:.2f}M", *_shares(n)] for name, n in places])


def _tensors(of: Inspection) -> str:
    worst = sorted(of.tensors, key=lambda tensor: -tensor.numbers.census.lesser.item())[:TENSORS_SHOWN]
    rows = [
        [tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype, *_shares(tensor.numbers)] for tensor in worst
    ]
    return table(["tensor", "shape", "dtype", *SHARES], rows)


def _shares(numbers: Numbers) -> list[str]:
    return [f"{value:.1%}" for value in numbers.shares.values()]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, picture: str, caption: str) -> str:
    return f"<h2>{title}</h2><figure>{picture}<figcaption>{caption}</figcaption></figure>"
