"""Pictures as SVG that takes its colours from the page: readable in light and dark, at any width, without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40
NUM_COLORS = 8  # .c0 to .c7 of the page
TICKS = 5


def heat_map(labels: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A square of cells for values in [-1, 1], the number in each."""
    n = len(labels)
    cell = min(72, max(20, (WIDTH - LEFT - RIGHT) // max(n, 1)))
    parts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = LEFT + j * cell, TOP + i * cell
            known = math.isfinite(value)
            sign = "up" if known and value >= 0 else "down"
            opacity = 0.75 * abs(value) if known else 0  # the number is to be read over it
            name = f"{labels[i]}, {labels[j]}: {value:.4f}" if known else f"{labels[i]}, {labels[j]}: no change"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" class="{sign}" '
                f'fill-opacity="{opacity:.3f}"><title>{escape(name)}</title></rect>'
            )
            if cell >= 40:
                parts.append(
                    _text(x + cell / 2 - 1, y + cell / 2 + 4, f"{value:.2f}" if known else "-", "middle", "ink")
                )
        parts.append(_text(LEFT - 6, TOP + i * cell + cell / 2 + 4, labels[i], "end"))
        parts.append(_text(LEFT + i * cell + cell / 2, TOP + n * cell + 16, labels[i], "middle"))
    return _svg("".join(parts), TOP + n * cell + 24, "cosines of all pairs")


def lines(
    title: str,
    x_label: str,
    xs: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    named: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """One line for each series over common places, from 0 up; `named`: what is written at a place."""
    frame = _Frame(xs, [value for _, values in series for value in values], named)
    parts = [frame.axes(x_label)]
    for number, (name, values) in enumerate(series):
        points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, values, strict=True))
        parts.append(
            f'<polyline points="{points}" class="line c{number % NUM_COLORS}"><title>{escape(name)}</title></polyline>'
        )
        parts += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" class="dot c{number % NUM_COLORS}">'
            f"<title>{escape(name)}, {x_label} {named(x)}: {y:.4g}</title></circle>"
            for x, y in zip(xs, values, strict=True)
        ]
    return _svg("".join(parts), HEIGHT, title)


def bars(title: str, x_label: str, xs: Sequence[float], values: Sequence[float], marked: Sequence[float] = ()) -> str:
    """One bar at every place; those at `marked` places stand out."""
    frame = _Frame(xs, values)
    width = max(1.0, 0.8 * (WIDTH - LEFT - RIGHT) / max(1, len(xs)))
    parts = [frame.axes(x_label)]
    for x, y in zip(xs, values, strict=True):
        top = frame.y(y)
        parts.append(
            f'<rect x="{frame.x(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" class="{"down" if x in marked else "c0"} bar">'
            f"<title>{x_label} {x:g}: {y:.4g}</title></rect>"
        )
    return _svg("".join(parts), HEIGHT, title)


def legend(names: Sequence[str]) -> str:
    """What the colours of `lines` stand for."""
    items = (f'<li><span class="key c{i % NUM_COLORS}"></span>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Frame:
    """Places and values to points, with a margin at either side, and the axes."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], named: Callable[[float], str] = "{:.3g}".format
    ) -> None:
        self._first, self._last = (min(xs), max(xs)) if xs else (0.0, 1.0)
        top = max((y for y in ys if math.isfinite(y)), default=0.0) or 1.0
        power = 10.0 ** math.floor(math.log10(top / TICKS))
        self._step = next(step * power for step in (1, 2, 5, 10, 20) if step * power * TICKS >= top)
        self._top = self._step * math.ceil(top / self._step)
        self._xs, self._named = xs, named

    def x(self, value: float) -> float:
        gaps = max(1, len(self._xs))
        span = WIDTH - LEFT - RIGHT
        inner = span * (gaps - 1) / gaps
        share = (value - self._first) / (self._last - self._first) if self._last > self._first else 0.5
        return LEFT + (span - inner) / 2 + share * inner

    def y(self, value: float) -> float:
        share = min(value, self._top) / self._top if math.isfinite(value) else 1.0
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def axes(self, x_label: str) -> str:
        parts = []
        for i in range(round(self._top / self._step) + 1):
            value = self._step * i
            y = self.y(value)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
        step = -(-len(self._xs) // 12) or 1
        parts += [_text(self.x(x), HEIGHT - BOTTOM + 16, self._named(x), "middle") for x in self._xs[::step]]
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
        return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str, style: str = "soft") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(words)}</text>'


def _svg(content: str, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{content}</svg>'
