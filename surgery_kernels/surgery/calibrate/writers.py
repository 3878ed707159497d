"""Which layers add what they give to the stream, and where the sum is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modules.layers import Layer
from ...modules.visits import Visit
from ..seeds import generator

OUTPUT = ""  # in place of a layer's name: the sum is what the block returns


@dataclass(frozen=True)
class Writer:
    """A layer that adds to the stream."""

    layer: Layer
    after: str  # the layer that gets the sum, or OUTPUT
    turned: bool  # whether its rows lie [tokens, batch] in a stream of [batch, tokens], or the other way round

    def before(self, visit: Visit, visits: Sequence[Visit], output: Tensor) -> Tensor:
        """What it adds to, in the order of its own rows.  # [rows, out]"""
        total, term = self._sum(visit, visits, output).detach(), self._turn(self.layer.outputs(visit.output.detach()))
        wide = torch.promote_types(total.dtype, torch.float32)
        return self._turn(total.to(wide) - term.to(wide)).flatten(0, -2)

    def _turn(self, rows: Tensor) -> Tensor:
        return rows.transpose(0, 1) if self.turned else rows

    def _sum(self, writer: Visit, visits: Sequence[Visit], output: Tensor) -> Tensor:
        if self.after == OUTPUT:
            return output
        behind = visits[next(i for i, visit in enumerate(visits) if visit is writer) + 1 :]
        found = next((visit for visit in behind if visit.name == self.after), None)
        if found is None:
            raise ValueError(f"{self.after!r} must run behind {writer.name!r} in every pass, got none")
        return found.inputs


def find_writers(visits: Sequence[Visit], output: Tensor, layers: Mapping[str, Layer]) -> dict[str, Writer]:
    """Those of the layers that add to the stream, by name; from one pass through a block, with gradients.

    A sum changes as its term does, whatever else is in it.
    """
    writers: dict[str, Writer] = {}
    sums = [*((visit.name, visit.inputs) for visit in visits), (OUTPUT, output)]
    for number, visit in enumerate(visits):
        layer = layers[visit.name]
        if visit.name in writers:
            continue
        candidates = (
            Writer(layer, name, turned)
            for name, total in sums[number + 1 :]
            for turned in (False, True)
            if total.shape == output.shape and _is_sum_of(total, visit.output, layer, turned)
        )
        found = next(candidates, None)
        if found is not None:
            writers[visit.name] = found
    return writers


def _is_sum_of(total: Tensor, output: Tensor, layer: Layer, turned: bool) -> bool:
    """Whether `total` is what a layer gave and something else that does not depend on it."""

    def as_total(of_layer: Tensor) -> Tensor:
        rows = layer.outputs(of_layer)
        return rows.transpose(0, 1) if turned else rows

    term = as_total(output)
    if total.shape != term.shape or not total.requires_grad or torch.equal(total, term):
        return False
    signs = torch.randint(0, 2, total.shape, generator=generator("writers")).to(total) * 2 - 1
    with torch.enable_grad():
        along = (total * signs).sum()
    (gradient,) = torch.autograd.grad(along, output, allow_unused=True, retain_graph=True)
    return gradient is not None and torch.equal(as_total(gradient), signs)
